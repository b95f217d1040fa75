"""The last role of an image build on a tree with two kernels: check mode tells before and after, a second run changes nothing."""

from __future__ import annotations

import lzma
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saw.image.identity import TRACES, traces
from saw.lab.nspawn import LabNetwork, LightHost, known_hosts, login_key_of

ROOT = Path(__file__).resolve().parents[3]
TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"))
KERNELS = ("6.1-one", "6.2-two")
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="starts a container"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[LightHost]:
    """A root tree in which nothing is booted, as an image build has it, with two kernels and an identity."""
    number = os.getpid() % 100000
    lan = LabNetwork(f"sawh{number}", f"10.95.{number % 250}")
    made = LightHost("tree", f"{lan.prefix}.10", tmp_path / "lab", lan, booted=False)
    try:
        made.up(TARS[-1], patience=90)
        for kernel in KERNELS:
            folder = made.root / f"usr/lib/modules/{kernel}/kernel"
            folder.mkdir(parents=True)
            (folder / "some.ko.xz").write_bytes(lzma.compress(Path("/bin/true").read_bytes()))
            (made.root / f"boot/initrd.img-{kernel}").touch()
        (made.root / "etc/machine-id").write_text("0" * 32 + "\n")
        for pattern in TRACES.keys() - {"etc/machine-id"}:
            path = made.root / pattern.replace("ssh_host_*", "ssh_host_ed25519_key").replace("*", "some thing")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("an identity")
        yield made
    finally:
        made.down(purge=True)
        lan.down()


def state(tree: LightHost) -> dict[str, object]:
    """Return what the role is there for."""
    root = tree.root
    return {
        "modules": sorted(str(path.relative_to(root)) for path in (root / "usr/lib/modules").rglob("some.ko*")),
        "indexed": [(root / f"usr/lib/modules/{kernel}/modules.dep").exists() for kernel in KERNELS],
        "initrd": len(list((root / "boot").glob("initrd.img-*"))),
        "machine-id": (root / "etc/machine-id").stat().st_size,
        "host key": (root / "etc/ssh/ssh_host_ed25519_key").exists(),
        "traces": len(traces(root)),
        "masked": (root / "etc/systemd/system/apt-daily.timer").is_symlink(),
    }


@pytest.mark.thorough
@pytest.mark.control("P0-01")
def test_check_mode_tells_before_and_after_and_both_kernels_are_served(tree: LightHost, tmp_path: Path) -> None:
    link = tmp_path / "installed/ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    playbook = tmp_path / "play.yml"
    playbook.write_text("- hosts: all\n  gather_facts: false\n  roles: [secure_agent.workspace.image_hygiene]\n")
    options = f"-o UserKnownHostsFile={known_hosts(tree.lab, [tree])} -o StrictHostKeyChecking=yes"
    inventory = tmp_path / "inventory"
    inventory.write_text(
        f"{tree.address} ansible_user=root ansible_python_interpreter=/usr/bin/python3 "
        f"ansible_ssh_private_key_file={login_key_of(tree.lab)} ansible_ssh_common_args='{options}'\n"
    )

    def changes(*check: str) -> int:
        program = Path(sys.executable).with_name("ansible-playbook")
        environment = {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "installed"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
        }
        done = subprocess.run(
            [program, "-i", inventory, playbook, *check],
            capture_output=True, text=True, check=False, timeout=180, env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return int(re.findall(r"changed=(\d+)", done.stdout)[0])

    before = state(tree)
    assert before["traces"] == len(TRACES)
    forecast = changes("--check")
    assert forecast == 4
    assert state(tree) == before
    assert changes() == forecast
    assert state(tree) == {
        "modules": [f"usr/lib/modules/{kernel}/kernel/some.ko" for kernel in KERNELS],
        "indexed": [True, True],
        "initrd": 0,
        "machine-id": 0,
        "host key": False,
        "traces": 0,
        "masked": True,
    }
    assert changes() == 0
    assert changes("--check") == 0
    # The same tree for a root that is read-only: what a workspace keeps of its own is linked to /var, and is there no identity.
    verified = ("-e", "image_hygiene_root_verity=true")
    assert changes("--check", *verified) == 2
    assert changes(*verified) == 2
    for name in ("ssh_host_ed25519_key", "ssh_host_ed25519_key.pub"):
        assert str((tree.root / "etc/ssh" / name).readlink()) == f"/var/lib/saw-host/{name}"
    assert "saw-root" not in (tree.root / "etc/fstab").read_text()
    assert traces(tree.root) == []
    assert changes(*verified) == changes("--check", *verified) == 0
