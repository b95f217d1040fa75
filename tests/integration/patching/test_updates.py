"""Updates of listed sources are installed, and others are not: with real apt, unattended-upgrades and a signed repository."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from patching_rig import SECURITY, Host

from saw.audit import validate

pytestmark = pytest.mark.control("P0-02")


def versions(host: Host) -> dict[str, str]:
    return {name: host.version(name) for name in ("plain", "other", "kept")}


def test_a_listed_source_is_upgraded_from_and_no_other_and_a_held_package_waits_until_it_is_let_go(host: Host) -> None:
    host.hold("kept")
    first = host.told_by("run")
    assert versions(host) == {"plain": "2", "other": "1", "kept": "1"}
    assert [one["package"] for one in first["installed"]] == ["plain"]
    assert [one["package"] for one in first["held"]] == ["kept"]
    assert (first["ok"], first["changed"], first["left"]) == (True, True, [])
    status = host.told_by("status")
    assert status["problems"] == []
    pending = {one["package"]: (one["listed"], one["held"], one["origin"]) for one in status["pending"]}
    assert pending == {"kept": (True, True, "Debian/trixie-security"), "other": (False, False, "Acme/trixie")}
    assert "kept" in host.run("apt-mark", "showhold").stdout

    host.hold()
    second = host.told_by("run")
    assert (second["ok"], [one["package"] for one in second["installed"]]) == (True, ["kept"])
    assert versions(host) == {"plain": "2", "other": "1", "kept": "2"}
    assert host.run("apt-mark", "showhold").stdout == ""
    assert host.found() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("signed-by=/etc/apt/archive.asc", "is not signed"),
        ("trusted=yes", "trusts a source without a signature"),
    ],
)
def test_an_unsigned_source_is_refused_whoever_it_says_it_is(
    host: Host, packages: dict[tuple[str, str], Path], options: str, words: str
) -> None:
    unsigned = host.repository("unsigned", SECURITY, signed=False, options=options)
    unsigned.add(packages["other", "2"])
    refused = host.saw("run")
    assert (refused.returncode, words in refused.stderr) == (1, True), refused.stderr
    assert versions(host) == {"plain": "1", "other": "1", "kept": "1"}
    assert host.subjects("run_failed") == ["run"]


def test_an_engine_that_is_told_a_source_which_is_not_on_the_list_installs_nothing(host: Host) -> None:
    host.engine(more='Unattended-Upgrade::Origins-Pattern { "origin=Acme"; };\n')
    refused = host.saw("run", "--json")
    answer = json.loads(refused.stdout)
    assert (refused.returncode, answer["error"]["code"]) == (1, "patching_refused")
    assert "takes updates from 'origin=Acme', which is not on the list" in answer["error"]["message"]
    assert versions(host) == {"plain": "1", "other": "1", "kept": "1"}
    assert len(host.subjects("source_not_listed")) == 1


def test_an_update_that_waits_too_long_is_a_finding_once_that_leaves_the_host_and_one_in_time_is_none(
    host: Host,
) -> None:
    assert host.run("apt-get", "--quiet=2", "update").returncode == 0
    assert host.told_by("status", "--report")["problems"] == []
    host.configure(overdue_s=0.001)
    host.hold("kept")
    late = host.told_by("status", "--report")
    assert [(one["kind"], one["subject"]) for one in late["breaches"] if one["kind"] == "update_overdue"] == [
        ("update_overdue", "plain")
    ]
    host.told_by("status", "--report")
    (line,) = [line for line in host.log.lines() if 'kind="update_overdue"' in line]
    event = json.loads(line.partition("] ")[2])
    validate(event)
    assert (event["class_uid"], event["compliance"]["status"]) == (2003, "Fail")
    assert event["unmapped"]["saw"]["subject"] == "plain"
    assert (event["unmapped"]["saw"]["installed"], event["unmapped"]["saw"]["offered"]) == ("1", "2")
    assert line.split(" ")[3] == "saw-patching"
    assert host.saw("run").returncode == 0
    assert host.told_by("status", "--report")["problems"] == []


def test_a_hold_past_its_end_is_refused_by_the_role_and_red_and_upgrades_nothing_by_surprise(host: Host) -> None:
    host.hold("kept", until="2026-01-31")
    refused = host.saw("check")
    assert (refused.returncode, "the hold of kept (ann: the next one) ran out on 2026-01-31" in refused.stderr) == (
        1,
        True,
    )
    assert host.saw("run").returncode == 0
    assert versions(host) == {"plain": "2", "other": "1", "kept": "1"}
    red = host.saw("status")
    assert (red.returncode, "the hold of kept ran out on 2026-01-31" in red.stdout) == (1, True), red.stdout
    assert host.subjects("hold_expired") == ["kept"]
    host.hold("kept")
    assert (host.saw("check").returncode, host.saw("status").returncode) == (0, 0)


def test_a_package_that_somebody_holds_by_hand_is_red_until_somebody_answers_for_it(host: Host) -> None:
    assert host.run("apt-mark", "hold", "kept").returncode == 0
    red = host.saw("holds")
    assert (red.returncode, "unexplained" in red.stdout) == (1, True)
    assert host.told_by("holds", "--apply")["changed"] is False, "a hold of somebody else is left alone"
    host.hold("kept")
    forecast = host.told_by("holds", "--dry-run")
    assert (forecast["ok"], forecast["changed"]) == (True, False)
    host.hold("kept", "plain")
    assert host.told_by("holds", "--dry-run")["changes"] == ["hold plain"]
    assert host.told_by("holds", "--apply")["changes"] == ["hold plain"]
    assert host.told_by("holds", "--apply")["changed"] is False
