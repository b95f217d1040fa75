"""workspace_rebuild as people run it: a real broker, the real driver with qemu-img and swtpm, in a mount namespace of its own.

The service manager at the far end is a small program. Nothing attests here, so the last step, waiting for that, is skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from broker_rig import image_record
from driver_host import ROOT, SAW, DriverHost

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own")
# The installed command; a fuse makes `saw vm rebuild` fail as on a full disk, before or after the disk was replaced.
COMMAND = """#!/bin/sh
if [ "$1 $2" = "vm rebuild" ] && [ -e {base}/fuse ]; then
  echo '{{"ok": false, "error": {{"code": "vm_failed", "message": "No space left on device", "cure": "", "details": {{}}}}}}'
  exit 1
fi
exec {saw} "$@"
"""


_NUMBERS = itertools.count()


class Hypervisor(DriverHost):
    """A VM called ``name`` on the image ``one``, registered with the broker; ``two`` is there as well.

    The hypervisor has the officers' root and asks for records; it was handed that of ``one``, and none lies beside an image.
    ``fields`` are further ones of its specification.
    """

    def __init__(self, base: Path, broker: Any, name: str, **fields: Any) -> None:
        systemctl = '#!/bin/sh\n[ "$1" != is-active ]\n'
        super().__init__(base, broker.context, command=COMMAND.format(base=base, saw=SAW), systemctl=systemctl)
        self.broker, self.name = broker, name
        self.digests = {}
        for image in ("one", "two"):
            path = base / f"state/images/{image}.qcow2"
            # No two are alike: what one test revokes is no other's image.
            size = 64 * 2**20 + next(_NUMBERS) * 2**16
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
            self.digests[image] = hashlib.sha256(path.read_bytes()).hexdigest()
            broker.register_image(image_record(f"{name}-{image}", self.digests[image]))
        broker.workspace(name, to=None, image="workspace")
        self.saw("workspace", "reprovision", name, "--image", f"{name}-one")
        for state in ("provisioning", "attesting"):
            broker.step(name, state)
        spec = {
            "id": name,
            "number": 9,
            "image": self.path("one"),
            "image_sha256": self.digests["one"],
            "data_disk_mib": 64,
            **fields,
        }
        (base / "spec.json").write_text(json.dumps(spec))
        self.pin_root(f"{name}-one")
        self.inside("/opt/saw/bin/saw", "vm", "create", "--spec", str(base / "spec.json"))

    def saw(self, *command: str) -> dict[str, Any]:
        return dict(json.loads(self.inside(str(SAW), *command, "--json").stdout))

    def play(self, name: str, values: dict[str, Any], *more: str) -> subprocess.CompletedProcess[str]:
        """Run the playbook ``name`` on this hypervisor."""
        inventory = self.base / "inventory"
        inventory.write_text(
            f"[hypervisors]\nlocalhost ansible_connection=local ansible_python_interpreter={sys.executable}\n"
        )
        playbook, book = SAW.with_name("ansible-playbook"), ROOT / f"playbooks/{name}.yml"
        options = ["-i", str(inventory), str(book), "-e", json.dumps({"workspace_id": self.name, **values}), *more]
        return self.inside(str(playbook), *options, check=False)

    def rebuild(self, image: str = "two", sha256: str = "") -> str:
        """Run the playbook and return what it said."""
        values = {
            "workspace_image": f"{self.name}-{image}", "workspace_image_path": self.path(image),
            "workspace_image_sha256": sha256 or self.digests[image], "workspace_active_retries": 1,
        }  # fmt: skip
        return self.play("workspace_rebuild", values).stdout

    def found(self) -> tuple[str, str, str]:
        """Return the image that the broker expects, the one that the disk lies on, and the workspace's state."""
        names = {digest: image for image, digest in self.digests.items()}
        shown = self.broker.operator.request("GET", f"/v1/workspaces/{self.name}")
        disk = json.loads(self.inside("/opt/saw/bin/saw", "vm", "status", self.name, "--json").stdout)
        return names[shown["image_sha256"]], names[disk["image_sha256"]], shown["state"]


@pytest.fixture
def hypervisor(tmp_path, broker_context, request):
    return Hypervisor(tmp_path, broker_context, f"reb-{abs(hash(request.node.name)) % 100000}")


@pytest.mark.thorough
@pytest.mark.control("LIF-03")
def test_a_rebuild_binds_the_workspace_and_makes_the_disk(hypervisor):
    said = hypervisor.rebuild()
    assert hypervisor.found() == ("two", "two", "attesting"), said
    # No VM answers here, so it never attests: that is said, and not an unknown error.
    assert f"{hypervisor.name} is attesting and did not attest in time" in " ".join(said.split())


@pytest.mark.control("P0-04")
def test_a_wrong_image_is_refused_before_anything_is_touched(hypervisor):
    said = hypervisor.rebuild(sha256="0" * 64)
    assert f"has SHA-256 {hypervisor.digests['two']}, wanted is {'0' * 64}" in said
    assert hypervisor.found() == ("one", "one", "attesting")


@pytest.mark.thorough
@pytest.mark.control("LIF-03")
def test_a_rebuild_that_fails_binds_the_workspace_to_its_old_image_again(hypervisor):
    (hypervisor.base / "fuse").touch()
    said = " ".join(hypervisor.rebuild().split())
    assert "Make the root disk again: No space left on device. The root disk of" in said, said
    assert "playbook workspace_start runs it as it was" in said
    assert hypervisor.found() == ("one", "one", "stopped")
    (hypervisor.base / "fuse").unlink()
    assert hypervisor.rebuild()
    assert hypervisor.found() == ("two", "two", "attesting")


@pytest.mark.thorough
def test_an_image_that_the_broker_knows_by_another_digest_is_not_used(hypervisor):
    """The file on the hypervisor is what the caller says, but it is not what was registered under that name."""
    other = hypervisor.base / "state/images/two.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(other), "80M"], check=True)
    found = hashlib.sha256(other.read_bytes()).hexdigest()
    said = " ".join(hypervisor.rebuild(sha256=found).split())
    assert f"the broker holds SHA-256 {hypervisor.digests['two']} for this image, wanted is {found}" in said, said
    assert hypervisor.found() == ("one", "one", "stopped")


@pytest.mark.control("P0-04")
def test_a_start_on_a_revoked_image_ends_at_once_with_the_reason(hypervisor):
    hypervisor.broker.step(hypervisor.name, "stopped")
    hypervisor.broker.move_image(f"{hypervisor.name}-one", "revoked")
    done = hypervisor.play("workspace_start", {"workspace_active_retries": 1})
    assert done.returncode == 2
    assert f"{hypervisor.name} may not run on {hypervisor.name}-one: the image is revoked" in done.stdout
    assert "Run the VM as it was made" not in done.stdout
    assert hypervisor.found()[2] == "stopped"


@pytest.mark.control("P0-04")
def test_a_rebuild_without_a_new_image_and_a_start_bring_the_record_that_the_hypervisor_lacks(hypervisor):
    """As on a hypervisor from before records: the officers' root was pinned by its role, and no record is there."""
    records = hypervisor.base / "state/trust/records"
    shutil.rmtree(records)
    refused = hypervisor.inside("/opt/saw/bin/saw", "vm", "start", hypervisor.name, check=False)
    assert (refused.returncode, "has no signed release record" in refused.stderr) == (1, True), refused
    assert hypervisor.play("workspace_rebuild", {"workspace_active_retries": 1}, "--check").returncode == 0
    assert not records.exists() or not list(records.iterdir())
    hypervisor.play("workspace_rebuild", {"workspace_active_retries": 1})
    (record,) = records.iterdir()
    assert hypervisor.found() == ("one", "one", "attesting")
    record.unlink()
    said = hypervisor.play("workspace_start", {"workspace_active_retries": 1}).stdout
    assert record.exists(), said


@pytest.mark.control("P0-04")
def test_an_image_that_is_revoked_is_not_started_by_hand_either(hypervisor):
    name = f"{hypervisor.name}-one"
    hypervisor.broker.move_image(name, "revoked")
    assert hypervisor.inside("/opt/saw/bin/saw", "vm", "start", hypervisor.name).returncode == 0  # nobody told it yet
    done = hypervisor.play("image_state", {"image_state_name": name, "image_state_to": "revoked"})
    assert done.returncode == 0, done.stdout + done.stderr
    refused = hypervisor.inside("/opt/saw/bin/saw", "vm", "start", hypervisor.name, check=False)
    assert (refused.returncode, f"image {name} is revoked" in refused.stderr) == (1, True), refused


@pytest.mark.thorough
@pytest.mark.control("P0-04")
def test_a_hypervisor_that_refuses_is_named_with_its_reason_and_not_with_an_error_of_the_playbook(hypervisor):
    name, root = f"{hypervisor.name}-one", hypervisor.base / "state/trust/root.json"
    kept = root.read_bytes()
    root.unlink()
    said = " ".join(hypervisor.play("workspace_rebuild", {"workspace_active_retries": 1}).stdout.split())
    assert "this hypervisor has no root of the officers" in said, said
    assert "from_json" not in said
    values = {"image_state_name": name, "image_state_to": "revoked"}
    done = hypervisor.play("image_state", values)
    said = " ".join(done.stdout.split())
    assert done.returncode == 2
    assert "the revocation is in force at the broker" in said, said
    assert "localhost did not take it: this hypervisor has no root of the officers" in said, said
    shown = hypervisor.broker.operator.request("GET", "/v1/images")["images"]
    assert [one["state"] for one in shown if one["name"] == name] == ["revoked"]
    root.write_bytes(kept)
    done = hypervisor.play("image_state", values)
    assert done.returncode == 0, done.stdout


@pytest.mark.thorough
@pytest.mark.control("P0-04")
def test_the_role_pins_the_root_that_the_broker_has_and_follows_no_other(hypervisor):
    play, pinned = hypervisor.base / "trust.yml", hypervisor.base / "state/trust/root.json"
    play.write_text(
        "- hosts: hypervisors\n  gather_facts: false\n  tasks:\n    - ansible.builtin.include_role:\n"
        "        name: secure_agent.workspace.hypervisor\n        tasks_from: trust\n"
    )
    hypervisor.play("workspace_stop", {}, "--syntax-check")  # writes the inventory

    def run(*words: str) -> str:
        command = [str(SAW.with_name("ansible-playbook")), "-i", str(hypervisor.base / "inventory"), str(play), *words]
        return " ".join(hypervisor.inside(*command, check=False).stdout.split())

    held = json.loads(pinned.read_bytes())
    shutil.rmtree(pinned.parent)
    assert "changed=1 " in run("--check")
    assert not pinned.exists()
    assert "changed=1 " in run()
    assert json.loads(pinned.read_bytes()) == held
    assert "changed=0 " in run(
        "-e", "hypervisor_control_host=localhost"
    )  # asked on the broker's host, with its command
    other = json.loads(pinned.read_bytes())
    other["signed"]["expires"] = "2030-01-01T00:00:00Z"
    (hypervisor.base / "other.json").write_text(json.dumps(other))
    said = run("-e", f"hypervisor_trusted_root={hypervisor.base}/other.json")
    assert "is not the one that this hypervisor trusts" in said, said
    assert json.loads(pinned.read_bytes()) == held
