"""``saw patch images`` at a real broker: what is pending in images in force, with the advisories of today, and who runs them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from broker_rig import Lab, image_record

from saw.audit import validate
from saw.cli.patch import main
from saw.errors import SawError
from saw.image.disk import ImageError, digest_of
from saw.patching.vulnerable import Source, Told, bill_of

pytestmark = pytest.mark.control("P0-02")
ROOT = Path(__file__).resolve().parents[3]
BILL = "sbom/debian.cdx.json"


def tracker(path: Path, *, openssh: dict[str, str] | None = None) -> Path:
    """The tracker's form: the kernel, and one vulnerability of openssh."""

    def about(state: dict[str, str]) -> dict[str, Any]:
        return {"releases": {"trixie": state}}

    settled = {"status": "resolved", "fixed_version": "6.1-1", "urgency": "low"}
    found: dict[str, Any] = {"linux": {"CVE-2025-1000": about(settled)}}
    if openssh:
        found["openssh"] = {"CVE-2026-1": about(openssh)}
    path.write_text(json.dumps(found))
    return path


FIXED = {"status": "resolved", "fixed_version": "1:10.0p1-8", "urgency": "medium"}
OPEN_LOW = {"status": "open", "urgency": "low"}


class Fleet:
    """Images with their bills in a folder, registered at the broker."""

    def __init__(self, broker: Lab, folder: Path) -> None:
        self.broker, self.folder = broker, folder
        self.context = folder / "context.json"
        self.context.write_text(json.dumps({"broker": {"socket": broker.config.operator_socket, "ssh": None}}))

    def image(self, name: str, openssh: str, *, days: int = 1, bill: bool = True, promoted: bool = True) -> None:
        file = self.folder / "images" / name / BILL
        file.parent.mkdir(parents=True)
        told = Told((Source("linux", "6.12.10-1"), Source("openssh", openssh)))
        file.write_text(json.dumps(bill_of(told)))
        record = image_record(name, f"{len(name):064x}")
        record["created"] = (datetime.now(UTC) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
        if bill:
            record["evidence"] = {BILL: digest_of(file)}
        self.broker.register_image(record, promoted=promoted)

    def workspace(self, name: str, image: str) -> None:
        body = {"id": name, "sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable", "image": image}
        self.broker.operator.request("POST", "/v1/workspaces", body)

    def asked(self, capsys: pytest.CaptureFixture[str], database: Path, *options: str) -> tuple[int, dict[str, Any]]:
        folder = str(self.folder / "images")
        code = main(["images", folder, "--database", str(database), "--context", str(self.context), "--json", *options])
        return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def fleet(own_broker: Lab, tmp_path: Path) -> Fleet:
    return Fleet(own_broker, tmp_path)


def test_a_released_fix_is_pending_in_each_workspace_of_an_old_image_and_in_none_of_a_new_one(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.image("old", "1:10.0p1-7", days=40)
    fleet.image("newer", "1:10.0p1-8")
    for name, image in (("ws-a", "old"), ("ws-b", "old"), ("ws-c", "newer"), ("ws-gone", "old")):
        fleet.workspace(name, image)
    fleet.broker.step("ws-gone", "decommissioned")
    code, calm = fleet.asked(capsys, tracker(tmp_path / "before.json"), "--overdue", "60d")
    assert (code, calm["ok"]) == (0, True), "when it was released, nothing was known"
    database = tracker(tmp_path / "today.json", openssh=FIXED)
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(tmp_path / "log"))
    log.setblocking(False)
    code, told = fleet.asked(capsys, database, "--report", "--syslog", str(tmp_path / "log"))
    assert code == 1
    found = {one["name"]: one for one in told["images"]}
    assert (found["old"]["pending"], found["old"]["overdue"], found["old"]["workspaces"]) == (1, True, ["ws-a", "ws-b"])
    assert found["old"]["problems"] == [
        "it is 40 days old, more than 30: build a newer one, and rebuild its workspaces on that",
        "CVE-2026-1 in openssh 1:10.0p1-7 is fixed in 1:10.0p1-8",
    ]
    assert (found["newer"]["pending"], found["newer"]["overdue"], found["newer"]["problems"]) == (0, False, [])
    rows = [(one["id"], one["image"], one["pending"], one["ok"]) for one in told["workspaces"]]
    assert rows == [("ws-a", "old", 1, False), ("ws-b", "old", 1, False), ("ws-c", "newer", 0, True)]
    events = [json.loads(log.recv(1 << 20).decode().partition("] ")[2]) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        log.recv(1)
    log.close()
    for event in events:
        validate(event)
        assert event["unmapped"]["saw"]["workspaces"] == ["ws-a", "ws-b"]
    assert [event["class_uid"] for event in events] == [2002, 2003]
    assert events[0]["vulnerabilities"][0]["affected_packages"][0]["fixed_in_version"] == "1:10.0p1-8"


def test_only_images_in_force_are_asked_for(fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fleet.image("kept", "1:10.0p1-8")
    fleet.image("retired", "1:10.0p1-7")
    fleet.image("fresh-candidate", "1:10.0p1-8", promoted=False)
    fleet.workspace("ws-a", "retired")
    fleet.broker.move_image("retired", "deprecated")
    database = tracker(tmp_path / "today.json", openssh=FIXED)
    code, told = fleet.asked(capsys, database)
    assert (code, {one["name"] for one in told["images"]}) == (1, {"kept", "retired", "fresh-candidate"}), (
        "somebody runs it"
    )
    fleet.broker.step("ws-a", "decommissioned")
    code, told = fleet.asked(capsys, database)
    assert (code, {one["name"] for one in told["images"]}) == (0, {"kept", "fresh-candidate"})


def test_a_bill_that_is_not_the_records_does_not_count(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.image("kept", "1:10.0p1-7")
    fleet.image("no-bill-named", "1:10.0p1-7", bill=False)
    database = tracker(tmp_path / "today.json")
    code, told = fleet.asked(capsys, database)
    assert (code, told["incomplete"]) == (3, ["no-bill-named"])
    assert [len(one["problems"]) for one in told["images"]] == [0, 1]
    assert told["images"][1]["problems"][0].startswith("not judged: its record names no bill of Debian packages (")
    file = tmp_path / "images/kept" / BILL
    file.write_text(file.read_text().replace("1:10.0p1-7", "1:10.0p1-9"))
    code, told = fleet.asked(capsys, database)
    assert (code, "is not the bill that its record names" in told["images"][0]["problems"][0]) == (3, True)


def test_an_image_whose_bill_is_gone_is_named_with_a_cure_and_the_others_are_judged(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("gone", "kept", "fine"):
        fleet.image(name, "1:10.0p1-8" if name == "fine" else "1:10.0p1-7")
    fleet.workspace("ws-a", "gone")
    shutil.rmtree(tmp_path / "images/gone")
    database = tracker(tmp_path / "today.json", openssh=FIXED)
    code, told = fleet.asked(capsys, database)
    found = {one["name"]: one for one in told["images"]}
    assert (code, told["ok"], told["incomplete"]) == (3, False, ["gone"])
    assert (found["gone"]["judged"], found["gone"]["workspaces"]) == (False, ["ws-a"])
    assert "is not there, the image is gone from there (copy sbom/debian.cdx.json" in found["gone"]["problems"][0]
    assert found["kept"]["problems"] == ["CVE-2026-1 in openssh 1:10.0p1-7 is fixed in 1:10.0p1-8"]
    assert found["fine"]["problems"] == []
    fleet.broker.move_image("gone", "deprecated")
    fleet.broker.step("ws-a", "decommissioned")
    code, told = fleet.asked(capsys, database)
    assert (code, told["incomplete"]) == (1, []), "the cure worked"

    def broken(bill: Path, *_: object) -> tuple[()]:
        if "/kept/" in str(bill):
            raise ImageError("debsbom cannot read it")
        return ()

    monkeypatch.setattr("saw.image.vulnerabilities.scan", broken)
    code, told = fleet.asked(capsys, database)
    assert (code, told["incomplete"]) == (3, ["kept"])


def test_what_is_open_can_be_waived_and_the_gate_is_that_of_images(
    fleet: Fleet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet.image("kept", "1:10.0p1-7")
    code, told = fleet.asked(capsys, tracker(tmp_path / "low.json", openssh=OPEN_LOW))
    assert (code, len(told["images"][0]["open"]), told["images"][0]["pending"]) == (0, 1, 0), (
        "open, and no fix is released"
    )
    database = tracker(tmp_path / "today.json", openssh=FIXED)
    waivers = tmp_path / "waivers.yml"
    text = "waivers:\n- {{cve: CVE-2026-1, package: openssh, owner: ann, reason: not reachable, expires: {}}}\n"
    waivers.write_text(text.format("2099-01-01"))
    code, told = fleet.asked(capsys, database, "--waivers", str(waivers))
    assert (code, len(told["images"][0]["waived"])) == (0, 1)
    waivers.write_text(text.format("2026-01-01"))
    assert fleet.asked(capsys, database, "--waivers", str(waivers))[0] == 1
    with pytest.raises(SawError, match="--overdue"):
        fleet.asked(capsys, database, "--overdue", "soon")


def play(fleet: Fleet, database: Path) -> subprocess.CompletedProcess[str]:
    """Run the playbook with no hosts but the controller."""
    inventory = fleet.folder / "inventory"
    inventory.write_text("[control_plane]\n[perimeter]\n[hypervisors]\n")
    values = {"images": fleet.folder / "images", "database": database, "output": fleet.folder / "told"}
    options = [option for name, value in values.items() for option in ("-e", f"patching_report_{name}={value}")]
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.run(
        [str(program), "-i", str(inventory), str(ROOT / "playbooks/patching_report.yml"), *options],
        capture_output=True, text=True, check=False, timeout=300, cwd=fleet.folder,
        env={
            **os.environ, "ANSIBLE_HOME": str(fleet.folder / "home"), "ANSIBLE_FORCE_COLOR": "0", "COLUMNS": "500",
            "SAW_CONTEXT": str(fleet.context),
        },
    )  # fmt: skip


@pytest.mark.thorough
def test_the_playbook_keeps_the_answer_and_fails_with_the_names_of_images_that_lack_a_fix(
    fleet: Fleet, tmp_path: Path
) -> None:
    fleet.image("kept", "1:10.0p1-7")
    fleet.workspace("ws-a", "kept")
    done = play(fleet, tracker(tmp_path / "calm.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "told/images.json").read_text())["workspaces"][0]["id"] == "ws-a"
    done = play(fleet, tracker(tmp_path / "today.json", openssh=FIXED))
    assert done.returncode != 0
    assert "CVE-2026-1 in openssh 1:10.0p1-7 is fixed in 1:10.0p1-8" in done.stdout
    assert json.loads((tmp_path / "told/images.json").read_text())["images"][0]["pending"] == 1
