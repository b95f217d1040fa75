"""Playbooks image_release, image_promote and image_rollback as people run them: a real broker, driver and signatures."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from driver_host import SAW
from sqlalchemy import update
from test_rebuild_playbook import Hypervisor
from uki_parts import golden_folder

from saw.audit import EventFactory
from saw.broker.context import Caller
from saw.broker.schema import workspaces
from saw.broker.store import Store
from saw.broker.wake import Waker
from warm import programs

ROOT = Path(__file__).resolve().parents[3]
REFERENCE = "reference.json"


class Fleet(Hypervisor):
    """A VM that runs the image ``one``. That it attested is told to the broker's database, as nothing attests here."""

    def __init__(self, base: Path, broker: Any, name: str) -> None:
        super().__init__(base, broker, name)
        self.active()

    def active(self) -> None:
        """Tell the broker's database what a good quote leads to."""
        store = Store.open(self.broker.config, Waker())
        events = EventFactory("saw-broker", host="test", new_uid=lambda: str(uuid.uuid4()))
        subject = Caller("test", "test", "test").subject(self.name)
        with store.write() as tx:
            tx.connection.execute(update(workspaces).where(workspaces.c.id == self.name).values(state="active"))
            tx.record(
                events.entity_management(
                    datetime.now(UTC), subject, ("workspace", self.name), activity="activate",
                    detail={"from": "attesting", "to": "active"},
                )
            )  # fmt: skip
        store.close()

    def roll_back(self, *, check: bool = False, **values: Any) -> str:
        """Run the playbook and return what it said; nothing attests here, so the wait for that ends it."""
        done = self.play("image_rollback", {"workspace_active_retries": 1, **values}, *(["--check"] if check else []))
        return " ".join(done.stdout.split())


@pytest.mark.control("LIF-03")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts in a namespace of its own")
def test_a_workspace_goes_back_to_the_image_before_without_a_name_a_path_or_a_digest(
    tmp_path: Path, broker_context: Any
) -> None:
    fleet = Fleet(tmp_path, broker_context, "roll-back")
    assert "there is no image that roll-back can go back to from roll-back-one" in fleet.roll_back()
    fleet.rebuild()
    fleet.active()
    assert fleet.found() == ("two", "two", "active")

    forecast = fleet.roll_back(check=True)
    assert "roll-back goes back from roll-back-two to roll-back-one" in forecast
    assert fleet.found() == ("two", "two", "active")

    (tmp_path / "state/images/one.qcow2").rename(tmp_path / "state/elsewhere")
    assert "no file on this hypervisor is image roll-back-one" in fleet.roll_back()
    assert fleet.found() == ("two", "two", "active")
    (tmp_path / "state/elsewhere").rename(tmp_path / "state/images/one.qcow2")

    fleet.roll_back()
    assert fleet.found() == ("one", "one", "attesting")
    fleet.active()
    again = fleet.roll_back()
    assert "roll-back has gone back to roll-back-one already" in again
    assert "changed=0" in again
    assert fleet.found() == ("one", "one", "active")


class Office:
    """A built image, two officers' keys, and the playbooks on this machine."""

    def __init__(self, base: Path, broker: Any) -> None:
        self.base, self.broker = base, broker
        self.image = golden_folder(base / "image")
        self.keys = []
        for index, key in enumerate(broker.officers.keys[:2]):
            file = base / f"officer-{index}.key"
            file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.chmod(0o600)
            self.keys.append(str(file))
        link = base / "installed/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)

    def play(self, name: str, *options: str, check: bool = False, **values: Any) -> str:
        values = {
            "ansible_python_interpreter": str(programs() / "python"),
            "image_release_saw": str(programs() / "saw"),
            **values,
        }
        done = subprocess.run(
            [str(SAW.with_name("ansible-playbook")), "-i", "localhost,", str(ROOT / f"playbooks/{name}.yml"),
             "-e", json.dumps(values), *options, *(["--check"] if check else [])],
            capture_output=True, text=True, check=False, timeout=180, stdin=subprocess.DEVNULL, cwd=self.base,
            env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(self.base / "installed"), "SAW_CONTEXT": self.broker.context,
                 "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1"},
        )  # fmt: skip
        return " ".join((done.stdout + done.stderr).split())

    def release(self, *, check: bool = False, **values: Any) -> str:
        """Release the image, which nobody searched for known vulnerabilities unless a test says so."""
        values = {"image_release_unscanned": True, **values}
        return self.play("image_release", check=check, image_release_directory=str(self.image.folder), **values)

    def state(self) -> str:
        """What the broker says of the image; empty where it is not registered."""
        images = self.broker.operator.request("GET", "/v1/images")["images"]
        return next((row["state"] for row in images if row["image_sha256"] == self.image.sha256), "")


@pytest.fixture
def office(tmp_path: Path, broker_context: Any) -> Office:
    return Office(tmp_path, broker_context)


@pytest.mark.control("IMG-01")
def test_an_image_is_recorded_signed_by_one_officer_after_the_other_and_registered(office: Office) -> None:
    office.image.measured(REFERENCE)
    assert "is no finished image" in office.play("image_release", image_release_directory=str(office.base / "nothing"))
    unsigned = office.release()
    assert "nothing is signed yet: run this again with image_release_keys" in unsigned, unsigned
    assert (office.image.folder / "release.json").is_file()

    first = office.release(image_release_keys=office.keys[:1])
    assert "2 are needed" in first, first
    assert "run this again with the next officer's key" in first
    assert office.state() == ""
    second = office.release(image_release_keys=office.keys[1:])
    assert "is registered and candidate" in second, second
    assert office.state() == "candidate"
    again = office.release(image_release_keys=office.keys)
    assert "changed=0" in again, again
    assert "changed=0" in office.release(check=True, image_release_keys=office.keys)

    record = office.image.folder / "release.json"
    whole = record.read_text()
    scan = {"database_sha256": "4" * 64, "scanned_at": "2026-11-29T00:00:00Z", "fail_on": "high", "open": 0}
    record.write_text(json.dumps({**json.loads(whole), "scan": scan}))  # as a later search writes it
    stale = office.release(image_release_state="stable")
    assert "the record changed, sign it: image_release_keys" in stale, stale
    assert office.state() == "candidate"
    record.write_text(whole)

    name = office.image.name
    assert "changed=1" in office.play("image_promote", check=True, image_state_name=name)
    assert office.state() == "candidate"
    promoted = office.play("image_promote", image_state_name=name, image_state_reason="canary ran")
    assert "changed=1" in promoted, promoted
    assert office.state() == "stable"
    assert "changed=0" in office.play("image_promote", image_state_name=name)


@pytest.mark.control("IMG-01")
def test_an_image_that_measured_something_else_is_not_released(office: Office) -> None:
    office.image.measured(REFERENCE, **{"11": "f" * 64})
    said = office.release(image_release_keys=office.keys)
    assert f"PCR 11 is {'f' * 64}, computed from the image is {office.image.expected['11']}" in said, said
    assert not (office.image.folder / "release.json").exists()


@pytest.mark.control("IMG-01")
def test_an_image_is_not_released_without_a_search_and_that_it_was_let_through_is_loud(office: Office) -> None:
    office.image.measured(REFERENCE)
    refused = office.release(image_release_unscanned=False, image_release_keys=office.keys)
    assert "no search for known vulnerabilities passed: saw image scan" in refused, refused
    assert "-e image_release_unscanned=true releases it all the same" in refused
    assert not (office.image.folder / "release.signed.json").exists()
    loud = office.release(image_release_keys=office.keys)
    assert "WARNING: image_release_unscanned is set" in loud, loud
    assert "states no passed search for known vulnerabilities" in loud
    assert office.state() == "candidate"

    record = office.image.folder / "release.json"
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    scan = {
        "database_sha256": "4" * 64, "scanned_at": now, "fail_on": "high", "open": 0,
        "image_sha256": office.image.sha256, "advisories": {"sha256": "5" * 64, "records": {"npm": 1, "pypi": 1}},
    }  # fmt: skip
    report = json.dumps({"image_sha256": office.image.sha256, "problems": []})
    digest = hashlib.sha256(report.encode()).hexdigest()
    name = f"vulnerabilities-{digest[:12]}.json"
    (office.image.folder / name).write_text(report)
    whole = json.loads(record.read_text())
    searched = {**whole, "scan": scan, "evidence": {**whole["evidence"], name: digest}}
    record.write_text(json.dumps({**searched, "scan": {**scan, "scanned_at": "2026-01-01T00:00:00Z"}}))
    old = office.release(image_release_unscanned=False, image_release_keys=office.keys)
    assert "which is too old or to come" in old, old
    record.write_text(json.dumps(searched))
    done = office.release(image_release_unscanned=False, image_release_keys=office.keys)
    assert "is registered and candidate" in done, done
    assert "WARNING" not in done


@pytest.mark.thorough
@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(("spelling", "let"), [("true", True), ("yes", True), ("false", False), ("no", False)])
def test_that_an_image_is_let_through_is_said_as_the_pages_spell_it(office: Office, spelling: str, let: bool) -> None:
    office.image.measured(REFERENCE)
    told = {"image_release_directory": str(office.image.folder), "image_release_keys": office.keys}
    said = office.play("image_release", "-e", f"image_release_unscanned={spelling}", **told)
    assert ("WARNING: image_release_unscanned is set" in said) is let, said
    assert ("no search for known vulnerabilities passed: saw image scan" in said) is not let, said
    assert office.state() == ("candidate" if let else "")


@pytest.mark.control("IMG-01")
def test_how_old_a_search_may_be_is_how_old_what_it_searches_in_may_be(office: Office) -> None:
    office.image.measured(REFERENCE)
    program, seen = office.base / "saw", office.base / "seen"
    program.write_text(f'#!/bin/sh\necho "$*" >>{seen}\nexec {programs() / "saw"} "$@"\n')
    program.chmod(0o755)
    tracker = office.base / "tracker.json"
    settled = {"releases": {"trixie": {"status": "resolved", "fixed_version": "6.1-1", "urgency": "low"}}}
    tracker.write_text(json.dumps({"linux": {"CVE-2025-1000": settled}}))
    old = datetime.now(UTC).timestamp() - 3 * 86_400
    os.utime(tracker, (old, old))
    more = {"image_release_database": str(tracker), "image_release_saw": str(program), "image_release_unscanned": False}
    said = office.release(image_release_scan_max_age="2d", **more)
    assert "3 days old, more than 2" in said, said
    scans = [text for text in seen.read_text().splitlines() if text.startswith("image scan ")]
    assert scans and all("--max-age 2d" in text for text in scans), scans
    later = office.release(image_release_scan_max_age="4d", **more)
    assert "3 days old" not in later, later
