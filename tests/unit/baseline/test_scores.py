"""Scores of hardening scans: a report that is whole is read, any other refused; a floor and waivers decide."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.baseline.judge import Comparison, Floor, Waiver, compare, judge, read_floor
from saw.baseline.report import Finding, Report, ReportError, parse_report
from saw.cli.main import main
from saw.errors import ConfigError, SawError

TODAY = date(2026, 11, 28)
#: A report in the scanner's own form, shortened.
REPORT = """\
# Lynis Report
report_version_major=1
report_version_minor=0
report_datetime_start=2026-11-28 20:39:34
lynis_version=3.0.8
os_fullname=Debian GNU/Linux 13 (trixie)
localhost-mapped-to=::1
pam_module[]=/usr/lib/x86_64-linux-gnu/security/pam_faillock.so
pam_module[]=/usr/lib/x86_64-linux-gnu/security/pam_unix.so
warning[]=AUTH-9283|Found accounts without password|-|-|
suggestion[]=LYNIS|This release is more than 4 months old.|-|-|
suggestion[]=SSH-7408|Consider hardening SSH configuration|MaxSessions (set 10 to 2)|-|
suggestion[]=SSH-7408|Consider hardening SSH configuration|Port (set 22 to )|-|
suggestion[]=HRDN-7230|Harden the system by installing at least one malware scanner|-|Install a tool|
lynis_tests_done=246
report_datetime_end=2026-11-28 20:40:08
hardening_index=59
finish=true
"""


def report(text: str = REPORT) -> Report:
    return parse_report(text.encode())


def changed(old: str, new: str) -> str:
    assert old in REPORT
    return REPORT.replace(old, new)


def test_a_finished_report_is_read() -> None:
    found = report()
    assert (found.scanner, found.version, found.index, found.tests) == ("lynis", "3.0.8", 59, 246)
    assert found.warnings == (Finding("AUTH-9283", "Found accounts without password"),)
    assert found.suggestions[1].details == "MaxSessions (set 10 to 2)"
    assert found.suggestions[3].solution == "Install a tool"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(changed("finish=true\n", ""), "finish is missing", id="cut off"),
        pytest.param(changed("finish=true", "finish=false"), "unfinished", id="unfinished"),
        pytest.param(changed("report_version_major=1", "report_version_major=2"), "unknown version", id="version"),
        pytest.param(changed("hardening_index=59\n", ""), "hardening_index is missing", id="no score"),
        pytest.param(REPORT + "hardening_index=99\n", "states hardening_index again", id="two scores"),
        pytest.param(REPORT + "hardening_index[]=99\n", "states hardening_index again", id="a list of scores"),
        pytest.param(changed("hardening_index=59", "hardening_index=101"), "no number", id="score over 100"),
        pytest.param(changed("hardening_index=59", "hardening_index=٥٩"), "no number", id="digits of another script"),
        pytest.param(changed("hardening_index=59", "hardening_index=-1"), "no number", id="negative score"),
        pytest.param(changed("|-|-|\nsugg", "|-|\nsugg"), "no warning with test", id="finding too short"),
        pytest.param(changed("password|-", "password|-|-"), "no warning with test", id="finding too long"),
        pytest.param(changed("AUTH-9283", "9283"), "no warning with test", id="finding without test"),
        pytest.param(changed("warning[]", "warning"), "warning has to be a list", id="finding that is no list"),
        pytest.param(REPORT + "nonsense\n", "is not name=value", id="no pair"),
        pytest.param(REPORT + "pam_module[]=\x1b[2J\n", "control character", id="terminal sequence"),
        pytest.param(changed("20:40:08", "20:30:08"), "wrong order", id="ends before it starts"),
        pytest.param(changed("2026-11-28 20:40:08", "soon"), "times are none", id="no time"),
    ],
)
def test_any_other_report_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ReportError, match=r"no report of a finished scan") as refused:
        report(text)
    assert reason in refused.value.message


@given(st.integers(min_value=0, max_value=len(REPORT.encode()) - 2))
def test_a_report_that_was_cut_off_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ReportError):
        parse_report(REPORT.encode()[:length])


@given(st.one_of(st.binary(max_size=300), st.text(max_size=300).map(lambda more: (REPORT + more).encode())))
def test_whatever_the_bytes_are_it_is_read_or_refused(raw: bytes) -> None:
    try:
        assert 0 <= parse_report(raw).index <= 100
    except ReportError as error:
        assert error.message
        assert error.cure


WAIVER = Waiver("AUTH-9283", "platform", "test account", date(2026, 11, 28))


def test_a_score_at_the_floor_holds_and_one_below_does_not() -> None:
    waivers = (WAIVER,)
    assert judge(report(), Floor("lynis", 59, waivers), TODAY).problems == ()
    assert judge(report(), Floor("lynis", 60, waivers), TODAY).problems == (
        "the hardening index is 59, below the floor of 60",
    )


def test_a_warning_needs_a_waiver_that_is_still_good() -> None:
    open_ = judge(report(), Floor("lynis", 0), TODAY)
    assert open_.problems == ("warning AUTH-9283: Found accounts without password",)
    waived = judge(report(), Floor("lynis", 0, (WAIVER,)), TODAY)
    assert (waived.problems, [one.test for one in waived.waived]) == ((), ["AUTH-9283"])
    late = judge(report(), Floor("lynis", 0, (WAIVER,)), date(2026, 11, 29))
    assert late.problems == (
        "the waiver of AUTH-9283 (platform: test account) ran out on 2026-11-28",
        "warning AUTH-9283: Found accounts without password",
    )


def test_an_expired_waiver_fails_though_no_finding_needs_it() -> None:
    old = Waiver("FILE-6310", "platform", "one disk", date(2026, 1, 1))
    assert judge(report(), Floor("lynis", 0, (WAIVER, old)), TODAY).problems == (
        "the waiver of FILE-6310 (platform: one disk) ran out on 2026-01-01",
    )
    good = Waiver("FILE-6310", "platform", "one disk", date(2027, 1, 1))
    verdict = judge(report(), Floor("lynis", 0, (WAIVER, good)), TODAY)
    assert (verdict.problems, verdict.unused) == ((), ("FILE-6310",))


def test_a_waiver_with_details_covers_that_finding_alone() -> None:
    one = Waiver("SSH-7408", "platform", "as the workspaces", TODAY, details="MaxSessions (set 10 to 2)")
    waived = judge(report(), Floor("lynis", 0, (one,)), TODAY).waived
    assert [finding.details for finding in waived] == ["MaxSessions (set 10 to 2)"]


GOOD = """\
scanner: lynis
index: 50
waivers:
  - test: AUTH-9283
    owner: platform
    reason: test account
    expires: 2099-01-01
"""


def floor_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "floor.yml"
    path.write_text(text)
    return path


def test_a_floor_is_read(tmp_path: Path) -> None:
    floor = read_floor(floor_file(tmp_path, GOOD))
    assert (floor.index, floor.waivers[0].expires) == (50, date(2099, 1, 1))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        pytest.param("    owner: platform\n", "", "owner", id="nobody answers"),
        pytest.param("    reason: test account\n", "", "reason", id="no reason"),
        pytest.param("reason: test account", "reason: ' '", "no reason", id="blank reason"),
        pytest.param("    expires: 2099-01-01\n", "", "expires", id="for ever"),
        pytest.param("2099-01-01", "never", "date", id="no date"),
        pytest.param("index: 50", "index: 50\nlevel: 1", "level", id="unknown field"),
        pytest.param("index: 50", "index: 150", "0 to 100", id="score over 100"),
        pytest.param("index: 50", "index: 50\nindex: 10", "comes twice", id="two floors"),
        pytest.param("scanner: lynis", "scanner: other", "has to be lynis", id="another scanner"),
        pytest.param("index: 50", "index: &a 50\nscore: *a", "aliases", id="alias"),
        pytest.param(GOOD, "- 1\n", "object", id="a list"),
        pytest.param(GOOD, "{", "no floor", id="no YAML"),
        pytest.param("index: 50", "index: 50\n? [1]\n: 2", "no floor", id="a list as key"),
    ],
)
def test_any_other_floor_is_refused(tmp_path: Path, old: str, new: str, reason: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError, match=reason):
        read_floor(floor_file(tmp_path, GOOD.replace(old, new)))


def test_a_score_may_rise_and_not_fall() -> None:
    lines = [line for line in REPORT.splitlines() if "AUTH-9283" not in line]
    better = report("\n".join(lines).replace("index=59", "index=74"))
    up, down = compare(report(), better), compare(better, report())
    assert isinstance(up, Comparison)
    assert (up.before, up.after, up.problems, [one.test for one in up.gone]) == (59, 74, (), ["AUTH-9283"])
    assert down.problems == (
        "the hardening index fell from 74 to 59",
        "new warning AUTH-9283: Found accounts without password",
    )


@pytest.mark.parametrize("changes", [("3.0.8", "3.1.4"), ("13 (trixie)", "12 (bookworm)")])
def test_scores_of_different_scanners_or_systems_are_not_compared(changes: tuple[str, str]) -> None:
    with pytest.raises(SawError, match="reports are of another"):
        compare(report(), report(changed(*changes)))


def test_the_command_answers_people_and_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "one.dat"
    one.write_text(REPORT)
    floor = floor_file(tmp_path, GOOD)
    assert main(["baseline", "score", str(one), "--floor", str(floor)]) == 0
    assert "open: SSH-7408 Consider hardening SSH configuration (Port (set 22 to ))" in capsys.readouterr().out
    floor.write_text(GOOD.replace("index: 50", "index: 60"))
    assert main(["baseline", "score", str(one), "--floor", str(floor), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert (answer["ok"], answer["index"], answer["floor"], answer["waived"][0]["test"]) == (False, 59, 60, "AUTH-9283")
    assert main(["baseline", "compare", str(one), str(one), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "ok": True, "before": 59, "after": 59, "problems": [], "new": [], "gone": [],
    }  # fmt: skip
    assert main(["baseline", "score", str(tmp_path / "none.dat"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "report_invalid"
