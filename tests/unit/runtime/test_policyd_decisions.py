"""Decisions on their way out of the workspace: which are told, which of them together, and what cannot be forged."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit.workspace_decisions import MOST, MOST_IDS, PATH, Decisions
from saw.runtime.decision_log import DecisionLog, is_told
from saw.runtime.policyd_decisions import Entry, batch_of

pytestmark = pytest.mark.control("AUD-01")
CALL = {
    "event": "ring1_decision",
    "verdict": "deny",
    "reason": "host_not_allowed",
    "policy_digest": "a" * 64,
    "policy": "",
    "rule": "",
    "host": "a.example.com",
    "port": 443,
    "method": "GET",
    "path": "/x",
    "binary": "/usr/bin/curl",
}
TOOL = {"event": "tool_call", "verdict": "deny", "reason": "tool_not_allowed", "server": "files", "tool": "write"}


def entry(number: int, record: dict[str, Any], unit: str = "saw-decide.service", process: str = "1" * 32) -> Entry:
    message = json.dumps({"n": number, **record})
    return Entry(cursor=f"c{number}", time_us=str(number * 1000), message=message, unit=unit, process=process)


def batch(*entries: Entry, numbers: dict[str, int] | None = None) -> Decisions:
    said, _ = batch_of(entries, numbers or {})
    assert msgspec.json.decode(msgspec.json.encode(said), type=Decisions) == said, "the broker would not take it"
    return said


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (CALL, True),
        ({**CALL, "verdict": "allow"}, False),
        ({**CALL, "verdict": "review"}, False),
        (TOOL, True),
        ({**TOOL, "verdict": "review"}, True),
        ({**TOOL, "verdict": "allow"}, True),
        ({"event": "message_refused", "server": "files", "reason": "method x"}, True),
        ({"event": "message_dropped", "server": "files", "reason": "notification x"}, False),
        ({"event": "tools_list", "server": "files"}, False),
    ],
)
def test_what_nobody_outside_sees_is_numbered_and_stands_out_and_the_rest_does_not(record, told):
    assert is_told(record) is told
    stream = io.StringIO()
    log = DecisionLog(stream, journal=True)
    log(record)
    log(record)
    lines = stream.getvalue().splitlines()
    level = ("<5>" if record.get("verdict") == "allow" else "<4>") if told else '{"e'
    assert [line[:3] for line in lines] == [level] * 2
    assert [json.loads(line[3:] if told else line).get("n") for line in lines] == ([1, 2] if told else [None, None])


def test_the_priority_is_for_the_journal_alone(tmp_path: Path, monkeypatch):
    with (tmp_path / "out").open("w+", encoding="utf-8") as stream:
        state = os.fstat(stream.fileno())
        for said, prefix in ((f"{state.st_dev}:{state.st_ino}", "<4>"), ("1:1", ""), ("", "")):
            monkeypatch.setenv("JOURNAL_STREAM", said)
            stream.seek(0)
            stream.truncate()
            DecisionLog(stream)(CALL)
            stream.seek(0)
            assert stream.read().startswith(f'{prefix}{{"event"')


def test_no_line_is_so_long_that_the_journal_breaks_it_in_two():
    stream = io.StringIO()
    DecisionLog(stream, journal=True)({**CALL, "path": "/" + "é" * 60_000, "host": "h" * 60_000})
    assert len(stream.getvalue()) < 48 * 1024


def test_alike_decisions_are_one_with_their_number_and_the_first_request_ids():
    said = batch(*(entry(number, {**CALL, "request_id": f"r{number}"}) for number in range(1, 13)))
    (one,) = said.decided
    assert (one.uid, one.count, one.first, one.last) == (f"{'1' * 32}:1", 12, 1, 12)
    assert one.request_ids == tuple(f"r{number}" for number in range(1, MOST_IDS + 1))
    other = batch(entry(1, CALL), entry(2, {**CALL, "path": "/y"}))
    assert [one.path for one in other.decided] == ["/x", "/y"]


def test_what_is_beyond_a_batch_is_counted_by_reason():
    said = batch(*(entry(number, {**CALL, "host": f"h{number}.example.com"}) for number in range(1, MOST + 6)))
    assert (len(said.decided), said.more) == (MOST, {"host_not_allowed": 5})


def test_numbers_that_are_left_out_are_missing_and_those_of_another_start_are_not():
    assert batch(entry(1, CALL), entry(2, CALL)).missing == 0
    assert batch(entry(3, CALL), entry(7, CALL)).missing == 5
    assert batch(entry(3, CALL), numbers={"1" * 32: 2}).missing == 0
    assert batch(entry(1, CALL), entry(2, CALL, process="2" * 32)).missing == 1
    assert batch(entry(1, CALL), entry(2, {**CALL, "reason": "No Reason"}), entry(3, CALL)).missing == 1
    assert batch_of([entry(4, CALL)], {f"{n:032x}": 9 for n in range(16)})[1] == {
        **{f"{n:032x}": 9 for n in range(1, 16)},
        "1" * 32: 4,
    }


@pytest.mark.parametrize(
    "unit", ["saw-mcp-server-files@1.service", "saw-agent@x.service", "saw-mcp-files.socket", "saw-mcp-.service", ""]
)
def test_what_another_unit_writes_is_no_decision_whatever_it_looks_like(unit):
    assert batch(entry(1, TOOL, unit), entry(1, CALL, unit)) == Decisions()


def test_a_tool_is_told_with_the_server_whose_mediator_wrote_it():
    (one,) = batch(entry(1, {**TOOL, "server": "another"}, "saw-mcp-files.service")).decided
    assert (one.layer, one.server, one.tool, one.reason) == ("mcp", "files", "write", "tool_not_allowed")
    (one,) = batch(entry(1, {**TOOL, "verdict": "allow", "reason": None}, "saw-mcp-files.service")).decided
    assert (one.verdict, one.reason, one.tool) == ("allow", "", "write")
    said = {"event": "message_refused", "server": "files", "reason": "method\nresources/list"}
    (one,) = batch(entry(1, said, "saw-mcp-files.service")).decided
    assert (one.reason, one.text, one.tool) == ("message_refused", "method\nresources/list", "")


@pytest.mark.parametrize("message", [None, 7, [1, 2], "", "text", "[]", "{}", '{"event":"ring1_decision"', "null"])
def test_what_cannot_be_read_is_passed_over(message):
    odd = msgspec.structs.replace(entry(1, CALL), message=message)
    assert batch(odd, entry(1, CALL)).missing == 0
    assert len(batch(odd, entry(1, CALL)).decided) == 1


@pytest.mark.parametrize("number", [0, -1, True, "1", 1.5, None])
def test_a_decision_without_a_number_is_none(number):
    assert batch(entry(1, {**CALL, "n": number})) == Decisions()


def test_long_texts_are_cut_where_ring_2_cuts_them():
    (one,) = batch(entry(1, {**CALL, "path": "/" * 5000, "host": "h" * 5000, "binary": None, "port": None})).decided
    assert (len(one.path), len(one.host), one.binary, one.port) == (PATH, 256, "", 0)
