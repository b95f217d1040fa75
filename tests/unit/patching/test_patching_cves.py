"""Known vulnerabilities of hosts: matched with the real tool, judged like those of an image, reported as OCSF findings."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from saw.audit import validate
from saw.cli.patch import main
from saw.errors import ConfigError, SawError

pytestmark = pytest.mark.control("P0-02")


def told(path: Path, *sources: tuple[str, str]) -> str:
    """What a host says of itself."""
    packages = [
        {"package": name, "source": name, "source_version": version, "installed": version, "architecture": "amd64"}
        for name, version in sources
    ]
    path.write_text(json.dumps({"ok": True, "problems": [], "packages": packages}))
    return str(path)


@pytest.fixture
def tracker(tmp_path: Path) -> str:
    """The tracker's form, with two vulnerabilities of a package whose names need quoting."""

    def about(**states: Any) -> dict[str, Any]:
        return {name.replace("_", "-"): {"releases": {"trixie": state}} for name, state in states.items()}

    path = tmp_path / "tracker.json"
    path.write_text(
        json.dumps(
            {
                "linux": about(CVE_2025_1000={"status": "resolved", "fixed_version": "6.1-1", "urgency": "low"}),
                "gtk+3.0": about(
                    CVE_2026_1={"status": "resolved", "fixed_version": "1:3.24.1+dfsg-2~deb13u1", "urgency": "high"},
                    CVE_2026_2={"status": "open", "urgency": "low"},
                ),
            }
        )
    )
    return str(path)


def test_a_host_that_lacks_a_released_fix_is_red_and_a_finding_and_one_that_has_it_is_neither(
    tmp_path: Path, tracker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old = told(tmp_path / "old.json", ("gtk+3.0", "1:3.24.1+dfsg-1"))
    new = told(tmp_path / "new.json", ("gtk+3.0", "1:3.24.1+dfsg-2~deb13u1"), ("other", "1"))
    log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log.bind(str(tmp_path / "log"))
    log.setblocking(False)
    report = ["--report", "--syslog", str(tmp_path / "log")]
    assert main(["cves", old, new, "--database", tracker, "--json", *report]) == 1
    hosts = json.loads(capsys.readouterr().out)["hosts"]
    assert hosts["old"]["problems"] == ["CVE-2026-1 in gtk+3.0 1:3.24.1+dfsg-1 is fixed in 1:3.24.1+dfsg-2~deb13u1"]
    assert [one["cve"] for one in hosts["old"]["open"]] == ["CVE-2026-1", "CVE-2026-2"]
    assert (hosts["new"]["problems"], [one["cve"] for one in hosts["new"]["open"]]) == ([], ["CVE-2026-2"])
    events = [json.loads(log.recv(1 << 20).decode().partition("] ")[2]) for _ in range(2)]
    with pytest.raises(BlockingIOError):
        log.recv(1)
    log.close()
    for event in events:
        validate(event)
        assert event["class_uid"] == 2002
    first, second = events
    assert [one["cve"]["uid"] for one in first["vulnerabilities"]] == ["CVE-2026-1", "CVE-2026-2"]
    assert first["vulnerabilities"][0]["affected_packages"][0]["fixed_in_version"] == "1:3.24.1+dfsg-2~deb13u1"
    assert (first["severity"], first["unmapped"]["saw"]["host"]) == ("High", "old")
    assert (second["severity"], second["unmapped"]["saw"]["host"]) == ("Low", "new")


def test_somebody_may_answer_for_a_vulnerability_until_a_day(tmp_path: Path, tracker: str) -> None:
    old = told(tmp_path / "old.json", ("gtk+3.0", "1:3.24.1+dfsg-1"))
    waivers = tmp_path / "waivers.yaml"
    text = "waivers:\n- {{cve: CVE-2026-1, package: gtk+3.0, owner: ann, reason: not reachable, expires: {}}}\n"
    waivers.write_text(text.format("2099-01-01"))
    assert main(["cves", old, "--database", tracker, "--waivers", str(waivers)]) == 0
    waivers.write_text(text.format("2026-01-01"))
    assert main(["cves", old, "--database", tracker, "--waivers", str(waivers)]) == 1


@pytest.mark.parametrize(
    ("source", "version"),
    [("Gtk", "1"), ("../../etc/passwd", "1"), ("gtk", "1 --db /etc/passwd"), ("gtk?arch=source", "1"), ("gtk", "")],
)
def test_names_that_no_package_has_are_refused_for_a_host_may_say_anything(
    tmp_path: Path, tracker: str, source: str, version: str
) -> None:
    with pytest.raises(ConfigError, match="is no answer of"):
        main(["cves", told(tmp_path / "bad.json", (source, version)), "--database", tracker])


def test_a_host_that_told_no_packages_is_refused_and_so_is_a_database_of_another_release(
    tmp_path: Path, tracker: str
) -> None:
    with pytest.raises(ConfigError, match="is no answer of"):
        main(["cves", told(tmp_path / "none.json"), "--database", tracker])
    with pytest.raises(ConfigError, match="'worst' is no urgency"):
        main(["cves", told(tmp_path / "good.json", ("gtk", "1")), "--database", tracker, "--fail-on", "worst"])
    with pytest.raises(SawError, match="knows nothing of linux in forky"):
        main(["cves", told(tmp_path / "good.json", ("gtk", "1")), "--database", tracker, "--suite", "forky"])
