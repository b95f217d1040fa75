"""What counts as drift, who may answer for it, and when a finding has gone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.cli.main import main as saw
from saw.drift.findings import Standing, gone, open_store, record, standing
from saw.drift.look import Seen
from saw.drift.observed import Changed, DriftError, Lost, read_observed
from saw.drift.report import Report, Waiver, judge, read_report, read_waivers, write_report
from saw.edr.service import factory_of
from saw.edr.store import Store
from saw.errors import ConfigError

pytestmark = pytest.mark.control("P0-01")
NOW = datetime(2026, 11, 29, 8, tzinfo=UTC)
TODAY = NOW.date()


def changed(
    host: str = "edge1", task: str = "Rules", place: str = "/etc/nftables.conf", role: str = "perimeter"
) -> Changed:
    return Changed(host, "Perimeter", role, task, "ansible.builtin.copy", place, hidden=False, applied=False)


def seen(
    *changes: Changed, hosts: tuple[str, ...] = ("edge1", "edge2"), lost: tuple[Lost, ...] = (), **more: object
) -> Seen:
    return Seen(
        playbook="site", hosts=hosts, changed=changes, lost=lost, **{"missed": (), "blind": (), "problems": (), **more}
    )  # type: ignore[arg-type]


def waiver(**about: str) -> Waiver:
    fields = {"owner": "ann", "reason": "being moved", "expires": "2026-11-29", **about}
    return msgspec.convert(fields, Waiver)


AWAY = Lost("edge2", "Perimeter", "", "Look", "ansible.builtin.stat", "unreachable")


def test_no_drift_is_an_empty_report_and_one_change_is_not() -> None:
    assert judge([seen()], (), NOW).ok
    report = judge([seen(changed())], (), NOW)
    assert (report.ok, [one.place for one in report.drift]) == (False, ["/etc/nftables.conf"])


def test_a_host_that_was_lost_is_unchecked_and_never_without_drift() -> None:
    report = judge([seen(lost=(AWAY,))], (waiver(host="edge2"),), NOW)
    assert (report.ok, [(one.host, one.reason) for one in report.unchecked]) == (False, [("edge2", "unreachable")])
    failed = msgspec.structs.replace(AWAY, reason="failed", role="perimeter")
    assert judge([seen(lost=(failed,))], (), NOW).unchecked[0].task == "Look"


def test_a_host_that_the_run_never_came_to_is_unchecked() -> None:
    report = judge([seen(missed=("edge2",))], (), NOW)
    assert (report.ok, [one.reason for one in report.unchecked]) == (False, ["not_looked_at"])


def test_a_look_at_no_host_and_a_broken_run_are_no_proof() -> None:
    assert judge([seen(hosts=())], (), NOW).problems[0].startswith("no host was looked at")
    assert not judge([seen(problems=("site: ansible-playbook broke off with 250: why",))], (), NOW).ok


@pytest.mark.parametrize("about", [{"host": "edge*"}, {"role": "perimeter"}, {"task": "Rules", "host": "edge1"}])
def test_a_waiver_covers_its_drift_up_to_and_including_its_day(about: dict[str, str]) -> None:
    report = judge([seen(changed())], (waiver(**about),), NOW)
    assert (report.ok, len(report.waived), report.unused) == (True, 1, ())


@pytest.mark.parametrize("about", [{"host": "edge2"}, {"role": "broker"}, {"task": "Rules", "host": "edge2"}])
def test_a_waiver_of_something_else_covers_nothing_and_is_named(about: dict[str, str]) -> None:
    report = judge([seen(changed())], (waiver(**about),), NOW)
    assert (report.ok, report.waived, len(report.unused)) == (False, (), 1)


def test_a_waiver_that_ran_out_covers_nothing_and_is_a_problem_even_when_nothing_needs_it() -> None:
    late = waiver(host="edge1", expires="2026-11-28")
    report = judge([seen(changed())], (late,), NOW)
    assert (len(report.drift), len(report.problems)) == (1, 1)
    assert "ran out on 2026-11-28" in report.problems[0]
    assert not judge([seen()], (late,), NOW).ok


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("waivers: [{host: h, owner: ann, reason: r}]", "missing required field `expires`"),
        ("waivers: [{host: h, owner: ' ', reason: r, expires: 2026-12-01}]", "has no owner"),
        ("waivers: [{owner: ann, reason: r, expires: 2026-12-01}]", "takes everything"),
        ("waivers: [{host: h, owner: ann, reason: r, expires: 2026-12-01, until: x}]", "unknown field `until`"),
        ("waivers: [{host: h, owner: ann, reason: r, expires: never}]", "expires"),
    ],
)
def test_a_file_of_waivers_is_read_strictly(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "waivers.yml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_waivers(path)
    path.write_text("waivers: [{host: h, owner: ann, reason: r, expires: 2026-12-01}]")
    assert read_waivers(path)[0].about == "h / * / *"


def test_a_report_is_written_whole_and_read_strictly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kept/report.json"
    report = judge([seen(changed(), lost=(AWAY,))], (), NOW)
    write_report(path, report)
    assert (path.stat().st_mode & 0o777, read_report(path)) == (0o600, report)
    assert saw(["drift", "show", str(path)]) == 1
    assert "edge2 was not reached" in capsys.readouterr().out
    write_report(path, judge([seen()], (), NOW))
    assert saw(["drift", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    whole = path.read_bytes()
    for raw in (
        whole[:-20],
        whole.replace(b'"version": 1', b'"version": 2'),
        whole.replace(b'"taken"', b'"when"'),
        b"\xff",
    ):
        path.write_bytes(raw)
        with pytest.raises(DriftError, match="no drift report of format 1"):
            read_report(path)
        assert saw(["drift", "show", str(path)]) == 1
    with pytest.raises(DriftError, match="cannot be written"):
        write_report(path / "below", report)


def test_wrong_usage_is_told_from_drift(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["check"], ["check", "-i", "x", "--timeout", "0"], ["show"]):
        with pytest.raises(SystemExit) as ended:
            saw(["drift", *words])
        assert ended.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_what_the_callback_wrote_is_read_strictly_and_no_file_is_no_run(tmp_path: Path) -> None:
    path = tmp_path / "seen.json"
    assert read_observed(path) is None
    told = {"schema": 1, "playbook": "site", "plays": [], "changed": [], "lost": [], "blind": []}
    path.write_text(json.dumps(told))
    assert read_observed(path) is not None
    for change in ({"schema": 2}, {"more": 1}, {"lost": None}):
        path.write_text(json.dumps({**told, **change}))
        with pytest.raises(DriftError, match="cannot be read"):
            read_observed(path)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    found = open_store(tmp_path / "state", ("broker",))
    yield found
    found.close()


def told(report: Report, store: Store, count: list[int]) -> list[tuple[str, str]]:
    """Record a report; return kind and status of each finding that this told."""

    def uid() -> str:
        count.append(0)
        return f"00000000-0000-0000-0000-{len(count):012d}"

    numbers = record(report, store, factory_of("saw-drift"), NOW, uid)
    events = [one.event for one in store.newest() if one.seq in numbers]
    return sorted((event["finding_info"]["types"][0], event["status"]) for event in events)


def test_many_findings_are_told_one_by_one_and_each_once(store: Store) -> None:
    report = judge([seen(*(changed(place=f"/etc/{number}") for number in range(120)))], (), NOW)
    assert told(report, store, count := []) == [("drift", "New")] * 120
    assert told(report, store, count) == []
    assert told(judge([seen()], (), NOW), store, count) == [("drift", "Resolved")] * 120
    assert told(judge([seen()], (), NOW), store, count) == []


def test_what_could_not_be_looked_at_is_not_gone(store: Store) -> None:
    count: list[int] = []
    two = judge([seen(changed(), changed(host="edge2"))], (), NOW)
    assert told(two, store, count) == [("drift", "New")] * 2
    away = judge([seen(lost=(AWAY,))], (), NOW)
    assert told(away, store, count) == [("drift", "Resolved"), ("host_unchecked", "New")]
    other = judge([msgspec.structs.replace(seen(), playbook="other")], (), NOW)
    assert told(other, store, count) == []
    broken = judge([seen(problems=("site: ansible-playbook broke off with 250: why",))], (), NOW)
    assert told(broken, store, count) == [("check_incomplete", "New")]
    assert told(judge([seen()], (), NOW), store, count) == [
        ("check_incomplete", "Resolved"), ("drift", "Resolved"), ("host_unchecked", "Resolved"),
    ]  # fmt: skip


def test_what_ansible_said_of_a_run_that_broke_off_stays_in_the_report(store: Store) -> None:
    count: list[int] = []
    for said in ("the value is hunter2", "something else"):
        words = f"site: ansible-playbook broke off with 1: {said}"
        report = judge([seen(problems=(words,))], (), NOW)
        assert words in report.problems
        told(report, store, count)
    events = [one.event for one in store.newest()]
    assert [event["finding_info"]["types"] for event in events] == [["check_incomplete"]], "told again for other words"
    assert "hunter2" not in json.dumps(events)
    assert events[0]["message"] == "site: ansible-playbook broke off with 1"


NAMES = st.sampled_from(["edge1", "edge2", "edge3"])


@given(
    before=st.lists(NAMES, unique=True), now=st.lists(NAMES, unique=True), lost=st.lists(NAMES, unique=True),
    hosts=st.lists(NAMES, unique=True),
)  # fmt: skip
def test_only_a_host_that_was_checked_has_nothing_any_more(
    before: list[str], now: list[str], lost: list[str], hosts: list[str]
) -> None:
    known = standing(judge([seen(*(changed(host=one) for one in before))], (), NOW))
    drops = tuple(msgspec.structs.replace(AWAY, host=one) for one in lost)
    drifting = [changed(host=one) for one in now if one in hosts]
    report = judge([seen(*drifting, hosts=tuple(hosts), lost=drops)], (), NOW)
    over = {
        one.host for one in gone([one for one in known if isinstance(one, Standing) and one.kind == "drift"], report)
    }
    assert over == {one for one in before if one in hosts and one not in lost and one not in now}
