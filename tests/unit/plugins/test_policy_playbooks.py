"""policy_release and policy_rollback as people run them, against a real broker: shown, approved, signed, released, gone back."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from broker_rig import Lab
from policy_parts import write_bundle

from saw.policy.keys import create_key, load_public_key
from saw.policy.loader import load_bundle_folder
from saw.policy.reach_diff import diff_bundles
from saw.policy.tuf_reach import nothing_like
from saw.policy.tuf_repository import init_repository

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("ada", "ben", "cleo")


class Office:
    """A broker, the officers' machine, and the playbooks on it."""

    def __init__(self, lab: Lab, base: Path) -> None:
        from datetime import UTC, datetime

        self.lab, self.base = lab, base
        private = [create_key(base / "keys", name) for name in NAMES]
        online = load_public_key(lab.config.keys / "tuf-online.pub")
        root = init_repository(base / "copy", private, online, 2, now=datetime.now(UTC))
        lab.operator.request("PUT", "/v1/policy/root", {"root": json.loads(root)})
        self.context = base / "context.json"
        self.context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        link = base / "installed/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)
        self.folder = write_bundle(base / "policies/coding")
        (base / "policies/invariants.yaml").write_text(
            "schema: 1\ninvariants:\n  - {id: no-metadata, kind: never_reach, hosts: [metadata.google.internal], why: secrets}\n"
        )

    def play(self, name: str, *options: str, keys: tuple[str, ...] = ("ada", "ben"), **more: object) -> Play:
        """Run a playbook and return what came of it."""
        prefix = name
        values = {
            f"{prefix}_repository": str(self.base / "copy"),
            f"{prefix}_directory": str(self.base / "releases"),
            f"{prefix}_keys": [str(self.base / "keys" / f"{key}.key") for key in keys],
            f"{prefix}_watch_seconds": 0,
            **({f"{prefix}_folder": self.folder} if name == "policy_release" else {}),
            **{f"{prefix}_{key}": value for key, value in more.items()},
        }
        done = subprocess.run(
            [
                Path(sys.executable).parent / "ansible-playbook",
                "-i",
                "localhost,",
                ROOT / f"playbooks/{name}.yml",
                "-e",
                json.dumps(values),
                *options,
            ],
            env={
                **os.environ,
                "ANSIBLE_COLLECTIONS_PATH": str(self.base / "installed"),
                "SAW_CONTEXT": str(self.context),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_PIPELINING": "1",
            },
            capture_output=True,
            text=True,
            check=False,
            cwd=self.base,
        )
        return Play(done)

    def release(self, *options: str, **more: object) -> Play:
        """Release to the ring canary, approving what is asked for."""
        return self.play("policy_release", *options, **{"ring": "canary", **more})

    def released(self, ring: str = "canary") -> int:
        """The revision that the broker releases to the ring, 0 for none."""
        found = self.lab.operator.request("GET", "/v1/policy/state")["releases"]
        return next((one["revision"] for one in found if one["ring"] == ring), 0)


class Play:
    """The end of a playbook."""

    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.text = done.stdout + done.stderr
        self.words = " ".join(self.text.split())
        self.ok = done.returncode == 0
        recap = re.search(r"changed=(\d+)", self.text)
        self.changed = int(recap[1]) if recap else -1
        asked = re.search(r"policy_release_approved=([0-9a-f]{64})", self.words)
        self.approval = asked[1] if asked else ""


@pytest.fixture(scope="module")
def broker() -> Iterator[Lab]:
    directory = Path(tempfile.mkdtemp(prefix="saw-playbooks-"))
    lab = Lab(directory)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.fixture(scope="module")
def office(broker: Lab, tmp_path_factory: pytest.TempPathFactory) -> Office:
    return Office(broker, tmp_path_factory.mktemp("office"))


def change(office: Office, new: str = "read-only", old: str = "") -> str:
    """The digest of the change of reach from one form of the policy to another; ``old`` empty: from the first release."""
    scratch = office.base / "scratch"
    after = load_bundle_folder(write_bundle(scratch / "new", new))
    before = load_bundle_folder(write_bundle(scratch / "old", old)) if old else nothing_like(after)
    return diff_bundles(before, after).digest


@pytest.mark.control("POL-01")
def test_1_a_first_release_is_shown_refused_without_approval_and_then_released(office: Office) -> None:
    shown = office.release("--check", "--diff")
    assert shown.ok, shown.text
    assert "GET, HEAD, OPTIONS https://git.example.com:443" in shown.text
    assert shown.text.count("reach digest") == 2, "the list and --diff both show the reach"
    assert office.released() == 0
    refused = office.release()
    assert not refused.ok
    assert "this lets ring canary reach more" in refused.words
    assert refused.approval == change(office)
    assert refused.approval in shown.text
    assert office.released() == 0
    released = office.release(approved=refused.approval)
    assert released.ok, released.text
    assert released.changed > 0
    assert office.released() == 1


def test_2_a_second_run_changes_nothing(office: Office) -> None:
    again = office.release()
    assert again.ok, again.text
    assert again.changed == 0
    assert office.released() == 1


@pytest.mark.control("POL-01")
def test_3_officers_sign_one_after_the_other(office: Office) -> None:
    write_bundle(Path(office.folder), "read-write")
    digest = change(office, "read-write", "read-only")
    for key, revision in (("ada", 1), ("ben", 1), ("ada", 2)):
        run = office.release(keys=(key,), approved=digest)
        assert run.ok, run.text
        assert ("nothing is released yet" in run.words) == (revision == 1), run.text
        assert office.released() == revision


def test_4_the_same_bundle_goes_to_the_next_ring(office: Office) -> None:
    released = office.release(ring="stable", approved=change(office, "read-write"))
    assert released.ok, released.text
    assert office.released("stable") == 2
    [canary, stable] = office.lab.operator.request("GET", "/v1/policy/rings")["rings"]
    assert canary["current"]["policy_digest"] == stable["current"]["policy_digest"]


def test_5_less_reach_needs_no_approval_and_a_hook_can_refuse(office: Office, tmp_path: Path) -> None:
    write_bundle(Path(office.folder), "read-only")
    hook = tmp_path / "hook.yml"
    hook.write_text(
        "- name: Ask the ticket system\n  ansible.builtin.assert:\n"
        "    that: not policy_release_compared.reach.lost\n    fail_msg: ticket 4711 is not closed\n"
    )
    refused = office.release(approval=str(hook))
    assert not refused.ok
    assert "ticket 4711 is not closed" in refused.text
    assert office.released() == 2
    assert office.release().ok
    assert office.released() == 3


def test_6_what_breaks_an_invariant_stops_before_anything_is_signed(office: Office) -> None:
    invariants = office.base / "policies/invariants.yaml"
    good = invariants.read_text()
    invariants.write_text(good.replace("metadata.google.internal", "git.example.com"))
    broken = office.release()
    invariants.write_text(good)
    assert not broken.ok
    assert "no-metadata" in broken.text
    assert "TASK [Sign]" not in broken.text


@pytest.mark.control("POL-02")
def test_7_a_ring_that_does_not_load_it_is_halted(office: Office) -> None:
    office.lab.workspace("ws-late", to="attesting", ring="late")
    with closing(sqlite3.connect(office.lab.config.database)) as store, store:
        store.execute(
            "UPDATE workspaces SET state = 'active' WHERE id = 'ws-late'"
        )  # as if it had attested, and fell silent
    late = office.release(ring="late", approved=change(office))
    assert not late.ok
    assert "ring late did not load revision 3 of coding (timeout); it is halted there" in late.words
    [rollout] = office.lab.operator.request("GET", "/v1/policy/rollouts/late")["rollouts"]
    assert rollout["state"] == "halted"
    assert rollout["reason"].startswith("by playbook")


@pytest.mark.control("POL-01")
def test_8_rolling_back_is_one_command_and_repeating_it_changes_nothing(office: Office) -> None:
    arguments = {"ring": "canary", "to": 2}
    shown = office.play("policy_rollback", "--check", "--diff", **arguments)
    assert shown.ok, shown.text
    assert "PATCH, POST, PUT https://git.example.com:443" in shown.text
    assert office.released() == 3
    alone = office.play("policy_rollback", keys=("ada",), **arguments)
    assert alone.ok, alone.text
    assert "nothing is released yet" in alone.words
    back = office.play("policy_rollback", keys=("ben", "ada"), **arguments)
    assert back.ok, back.text
    assert office.released() == 4
    again = office.play("policy_rollback", **arguments)
    assert again.ok, again.text
    assert again.changed == 0
    assert office.released() == 4


def test_9_a_revision_that_is_not_held_is_named(office: Office) -> None:
    refused = office.play("policy_rollback", ring="canary", to=77)
    assert not refused.ok
    assert "revision 77 is not held; held are 4, 3, 2, 1" in refused.words


def test_a_copy_that_somebody_published_past_is_refused(office: Office, tmp_path: Path) -> None:
    shutil.copytree(office.base / "copy", tmp_path / "copy")
    for path in (tmp_path / "copy/metadata").glob("*.targets.json"):
        if int(path.name.split(".")[0]) > 2:
            path.unlink()
    stale = office.release(repository=str(tmp_path / "copy"))
    assert not stale.ok
    assert "is not what ring canary runs" in stale.words


@pytest.mark.parametrize(
    ("versions", "newest"), [((1,), "1"), (range(1, 10), "9"), (range(1, 11), "10"), ((9, 10, 11, 100), "100")]
)
def test_the_newest_root_is_told_by_its_number(versions: range, newest: str, tmp_path: Path) -> None:
    import yaml

    [play] = yaml.safe_load((ROOT / "playbooks/policy_release.yml").read_text(encoding="utf-8"))
    (tmp_path / "metadata").mkdir()
    for version in versions:
        (tmp_path / f"metadata/{version}.root.json").touch()
    root = play["vars"]["policy_release_root"]
    values = {"policy_release_root": root, "policy_release_repository": str(tmp_path)}
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible", "localhost", "-m", "debug", "-a", "var=policy_release_root",
         "-e", json.dumps(values)],
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert re.search(rf'"policy_release_root": "?{newest}"?$', done.stdout, re.MULTILINE), done.stdout + done.stderr
    verify = "{{ policy_release_repository }}/metadata/{{ policy_release_root }}.root.json"
    assert verify in (ROOT / "playbooks/policy_release.yml").read_text(encoding="utf-8")
