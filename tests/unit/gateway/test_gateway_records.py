"""What is kept of calls of models: on disk before the call leaves, encrypted, bounded, gone after its time, read with a trace."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import sqlite3
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from test_gateway_judge import DIGEST, NOW, Bench, entry, release, view

from saw.audit.events import EventFactory
from saw.budget.errors import LedgerError
from saw.budget.ledger import Ledger
from saw.cli.inference import NotRead, ask
from saw.cli.main import main
from saw.errors import ConfigError
from saw.gateway.app import refusal_body
from saw.gateway.errors import SpoolError
from saw.gateway.metering import Meter, Reserved
from saw.gateway.record_desk import LONGEST_QUESTION, RecordDesk
from saw.gateway.record_filter import record_filter
from saw.gateway.recording import WAITING, Recorder, Told, read_told
from saw.gateway.records import (
    LEFT_FREE,
    MAX_ANSWER,
    SILENT_S,
    Facts,
    RecordStore,
    RecordUnavailable,
    RecordUnknown,
    load_key,
    purge_file,
)
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher

pytestmark = pytest.mark.control("INF-01")

KEY = bytes(range(32))
FACTS = Facts(
    time="2026-01-01T00:00:00+00:00", workspace="ws-1", sponsor="mia@example.com", agent="agent-1", delegation="", review="",
    policy_digest="d", request_id="r-1", route="m.local:443", service="https://m.example.com/v1", path="/v1/messages",
    model="demo-1", model_sent="demo-1", data_classes=("internal",), content="prompts", size=5,
)  # fmt: skip


def store(tmp_path: Path, limit: int = 10_000_000, key: bytes = KEY) -> RecordStore:
    return RecordStore(tmp_path / "records.db", key, limit)


def put(held: RecordStore, record: str = "r", *, at: float = 100.0, until: float = 200.0, answer: bool = True) -> None:
    held.keep(record, at, until, FACTS, b"a prompt", answer=answer)


def test_a_record_comes_back_as_it_was_and_lies_encrypted(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held)
    for place, text in ((1, b"the end"), (0, b"first ")):
        assert held.add("r", place, text)
    held.end("r", 2, 200)
    whole = held.read("r")
    assert (whole.body, whole.answer, whole.listed.facts) == (b"a prompt", b"first the end", FACTS)
    assert (whole.listed.answer, whole.listed.status) == ("whole", 200)
    held.close()
    raw = b"".join(path.read_bytes() for path in tmp_path.glob("records.db*"))
    for said in (b"a prompt", b"first ", b"the end", b"demo-1", b"mia@example.com"):
        assert said not in raw
    assert (tmp_path / "records.db").stat().st_mode & 0o777 == 0o600


def test_an_answer_is_whole_only_once_every_piece_is_here(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held)
    held.end("r", 2, 200)
    assert held.add("r", 1, b"b")
    assert held.read("r").listed.answer == "open"
    assert held.add("r", 0, b"a")
    assert held.read("r").listed.answer == "whole"
    assert not held.add("r", 2, b"c"), "nothing is added to what is whole"
    assert held.read("r").answer == b"ab"
    put(held, "empty")
    held.end("empty", 0, 204)
    assert held.read("empty").listed.answer == "whole"
    put(held, "prompt", answer=False)
    assert not held.add("prompt", 0, b"x"), "where no answer is kept, none is"
    assert not held.add("nobody", 0, b"x")
    assert held.read("prompt").listed.answer == "none"


def test_what_was_changed_or_moved_does_not_open(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held, "one")
    put(held, "two")
    held.close()
    database = sqlite3.connect(tmp_path / "records.db")
    database.execute("UPDATE record SET body = (SELECT body FROM record WHERE id = 'two') WHERE id = 'one'")
    database.commit()
    database.close()
    held = store(tmp_path)
    assert held.read("two").body == b"a prompt"
    with pytest.raises(RecordUnavailable, match="cannot be opened"):
        held.read("one")
    held.close()
    other = store(tmp_path, key=bytes(32))
    with pytest.raises(RecordUnavailable, match="cannot be opened"):
        other.listed()


def test_a_full_store_refuses_and_an_answer_without_room_is_cut(tmp_path: Path) -> None:
    held = store(tmp_path, limit=3000)
    put(held)
    with pytest.raises(RecordUnavailable, match="full"):
        held.add("r", 0, b"x" * 3000)
    assert held.read("r").listed.answer == "cut"
    assert not held.add("r", 1, b"x")
    put(held, "r2")
    with pytest.raises(RecordUnavailable, match="full"):
        for number in range(10):
            put(held, f"more-{number}")
    held.purge(300.0)
    put(held, "r3"), "what was removed makes room"
    held.close()
    with pytest.raises(RecordUnavailable, match="full"):
        for number in range(10):
            put(store(tmp_path, limit=3000), f"again-{number}")


def test_the_last_of_the_disk_is_left_to_the_audit_spool(tmp_path: Path) -> None:
    room = [LEFT_FREE]
    held = RecordStore(tmp_path / "records.db", KEY, 10_000_000, room=lambda _: room[0])
    with pytest.raises(RecordUnavailable, match="nearly full"):
        put(held)
    room[0] += 10_000
    put(held)
    held.close()


def test_what_is_removed_makes_room_to_the_byte_and_two_stores_count_together(tmp_path: Path) -> None:
    first, second = store(tmp_path, limit=3000), store(tmp_path, limit=3000)
    for round_ in range(20):
        put(first, f"a{round_}")
        put(second, f"b{round_}")
        with pytest.raises(RecordUnavailable, match="full"):
            first.add(f"a{round_}", 0, bytes(2000))
        first.forget(f"a{round_}")
        second.forget(f"b{round_}")
    first.close()
    second.close()


def test_records_end_also_where_nothing_is_kept_any_more(tmp_path: Path) -> None:
    path = tmp_path / "records.db"
    assert purge_file(path, 150.0) == 0, "there is no file, and none is made"
    assert not path.exists()
    held = store(tmp_path)
    put(held, "old", until=100.0)
    put(held, "young", until=200.0)
    held.close()
    assert purge_file(path, 150.0) == 1
    held = store(tmp_path)
    assert [one.id for one in held.listed()] == ["young"]
    put(held, "next")
    held.close()


def test_pieces_that_wait_are_bounded_and_hold_up_no_other_thread(tmp_path: Path) -> None:
    held, begun, go = store(tmp_path), threading.Event(), threading.Event()
    put(held)
    kept = recorder(held, Trail())
    slow = held.add

    def add(record: str, place: int, text: bytes, at: float) -> bool:
        begun.set()
        go.wait(60)
        return slow(record, place, text, at)

    held.add = add  # type: ignore[method-assign]

    async def run() -> None:
        piece = Told(record="r", piece=0, pieces=0, status=0, text=bytes(WAITING // 4))
        taken = [asyncio.create_task(kept.take(piece)) for _ in range(4)]
        await asyncio.to_thread(begun.wait, 60)
        with pytest.raises(RecordUnavailable, match="waits to be written"):
            await kept.take(piece)
        assert await asyncio.to_thread(lambda: "decided") == "decided"
        go.set()
        await asyncio.gather(*taken)
        assert kept._waiting == 0

    asyncio.run(run())
    kept.close()


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held)
    with sqlite3.connect(tmp_path / "records.db") as other:
        other.execute("DROP TABLE piece")
    other.close()
    with pytest.raises(RecordUnavailable, match="cannot be read"):
        held.read("r")
    held.close()


def test_one_answer_takes_no_more_than_its_share(tmp_path: Path) -> None:
    held = store(tmp_path, limit=10 * MAX_ANSWER)
    put(held)
    assert held.add("r", 0, bytes(MAX_ANSWER - 100))
    assert not held.add("r", 1, bytes(200))
    assert held.read("r").listed.answer == "cut"


def test_what_was_kept_long_enough_goes_with_its_pieces(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held, "old", until=150.0)
    held.add("old", 0, b"text")
    put(held, "new", at=120.0, until=900.0)
    assert held.purge(149.9) == 0
    assert held.purge(150.0) == 1
    with pytest.raises(RecordUnknown):
        held.read("old")
    assert held.read("new").body == b"a prompt"
    assert held.read("new").listed.answer == "open"
    held.close()
    database = sqlite3.connect(tmp_path / "records.db")
    assert database.execute("SELECT COUNT(*) FROM piece").fetchone() == (0,)


def test_an_answer_of_which_nothing_more_came_is_broken_off_until_something_comes_all_the_same(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held, until=1e9)

    def after(now: float) -> str:
        held.purge(now)
        return held.read("r").listed.answer

    assert after(100.0 + SILENT_S) == "open"
    assert after(100.1 + SILENT_S) == "broken_off", "no piece ever came"
    assert held.add("r", 0, b"a", 2000.0)
    assert held.read("r").listed.answer == "open"
    assert held.add("r", 1, b"b", 1999.0)
    assert after(2000.0 + SILENT_S) == "open"
    assert after(2000.1 + SILENT_S) == "broken_off"
    held.end("r", 2, 200)
    assert held.read("r").listed.answer == "whole"
    assert after(1e8) == "whole"


def test_an_answer_whose_pieces_are_lost_is_cut(tmp_path: Path) -> None:
    held = store(tmp_path)
    put(held, until=1e9)
    held.add("r", 1, b"b", 100.0)
    held.end("r", 2, 200)
    held.purge(100.0 + SILENT_S)
    assert held.read("r").listed.answer == "open"
    held.purge(100.1 + SILENT_S)
    assert held.read("r").listed.answer == "cut"
    assert not held.add("r", 0, b"a", 1e6), "nothing is added to what was given up"
    held.close()
    with sqlite3.connect(tmp_path / "records.db") as database:
        assert database.execute("SELECT COUNT(*) FROM heard").fetchone() == (0,)
    database.close()


def test_an_answer_that_broke_off_and_whose_end_is_told_late_is_cut_and_one_with_all_its_pieces_is_whole(
    tmp_path: Path,
) -> None:
    held, late = store(tmp_path), 100.1 + SILENT_S
    for record in ("lost", "whole"):
        put(held, record, until=1e9)
        held.add(record, 0, b"a", 100.0)
    held.purge(late)
    for record in ("lost", "whole"):
        assert held.read(record).listed.answer == "broken_off"
        held.end(record, 2, 200)
        assert held.read(record).listed.answer == "open", "its pieces may still come"
    assert held.add("whole", 1, b"b", late)
    held.purge(late)
    assert [held.read(record).listed.answer for record in ("lost", "whole")] == ["cut", "whole"]


def test_what_is_over_is_not_looked_through_while_nobody_else_can_write(tmp_path: Path) -> None:
    held = store(tmp_path)
    said: list[str] = []
    held._database.set_trace_callback(said.append)
    held.purge(1e9)
    held._database.set_trace_callback(None)
    changes = [text for text in said if text.startswith(("UPDATE record", "DELETE"))]
    assert len(changes) == 4
    plans = [row[3] for text in changes for row in held._database.execute(f"EXPLAIN QUERY PLAN {text}")]
    whole = [plan for plan in plans if "SCAN record" in plan and "record_open" not in plan]
    assert whole == [], plans


def test_lists_are_the_newest_first_and_bounded(tmp_path: Path) -> None:
    held = store(tmp_path)
    for number in range(5):
        put(held, f"r{number}", at=float(number))
    assert [one.id for one in held.listed(limit=2)] == ["r4", "r3"]
    assert [one.id for one in held.listed(before=2.0)] == ["r1", "r0"]
    assert held.listed(workspace="ws-9") == []
    assert len(held.listed(workspace="ws-1")) == 5


@pytest.mark.parametrize(("content", "mode"), [(KEY, 0o644), (KEY[:31], 0o600), (b"", 0o600)])
def test_a_key_that_others_read_or_that_is_none_is_refused(tmp_path: Path, content: bytes, mode: int) -> None:
    path = tmp_path / "records.key"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError):
        load_key(path)
    path.write_bytes(KEY)
    path.chmod(0o600)
    assert load_key(path) == KEY
    with pytest.raises(ConfigError):
        load_key(tmp_path / "none.key")


# -- calls


GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
data_classes: {handles: [internal]}
inference:
  routes:
    - {alias: m.local, models: ["demo-*"], aliases: {fast: demo-1}, upstream: "https://m.example.com/v1"RECORD}
"""


class Trail:
    """A spool that remembers, or fails."""

    def __init__(self) -> None:
        self.events: list[Any] = []
        self.full = False

    async def record(self, event: Any) -> int:
        if self.full:
            raise SpoolError("the audit spool is full")
        self.events.append(event)
        return len(self.events)


def recorder(held: RecordStore, trail: Any) -> Recorder:
    names = iter(f"rec-{number}" for number in range(99))
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
    return Recorder(held, trail, factory, now=lambda: datetime(2026, 1, 1, tzinfo=UTC), new_id=lambda: next(names))


def _governance(told: str, counted: str) -> str:
    return GOVERNANCE.replace("RECORD", told) + (f"limits: [{counted}]\n" if counted else "")


def judged(
    tmp_path: Path, record: str, keeper: Recorder | None, *, method: str = "POST", meter: Any = None, counted: str = ""
) -> Any:
    bench = Bench(Path(tempfile.mkdtemp(dir=tmp_path)))
    told = f", record: {record}" if record else ""
    told += ", max_output_tokens: 9, limits: [burst]" if counted else ""
    members = {"policy.yaml": b"version: 1\n", "governance.yaml": _governance(told, counted).encode()}
    bundle = load_members(members)
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    loaded = msgspec.structs.replace(release(), governance=bundle.governance, matcher=matcher)
    bench.view = view(entry(), {DIGEST: loaded})
    inside: Any = bench.judge
    inside._recorder, inside._meter = keeper, meter
    body = json.dumps({"model": "fast", "messages": ["a prompt"]}).encode() if method == "POST" else b""
    target = "/v1/messages" if method == "POST" else "/v1/models"
    call = msgspec.structs.replace(
        bench.call(), authority="m.local", method=method, target=target, binary="", body=body,
        headers={"authorization": "Bearer of-the-agent", "saw-data-class": "internal"},
    )  # fmt: skip
    return bench, asyncio.run(bench.judge.decide(call))


@pytest.mark.parametrize(
    ("content", "body", "answers"),
    [("metadata", False, False), ("prompts", True, False), ("prompts-and-responses", True, True)],
)
def test_a_call_is_kept_as_its_route_says(tmp_path: Path, content: str, body: bool, answers: bool) -> None:
    held = store(tmp_path)
    _, verdict = judged(tmp_path, f"{{content: {content}, keep: 2d}}", recorder(held, Trail()))
    assert verdict.allowed, verdict.detail
    assert verdict.record == "rec-0"
    assert verdict.dial.record == ("rec-0" if answers else "")
    assert "saw-data-class" in verdict.dial.remove
    whole = held.read("rec-0")
    assert (whole.body is not None) == body
    assert whole.listed.answer == ("open" if answers else "none")
    facts = whole.listed.facts
    assert (facts.model, facts.model_sent, facts.content) == ("fast", "demo-1", content)
    assert facts.data_classes == ("internal",)
    assert whole.listed.until - datetime(2026, 1, 1, tzinfo=UTC).timestamp() == 2 * 86400
    assert b"of-the-agent" not in msgspec.json.encode(whole), "no header is kept"


def test_without_a_word_of_policy_nothing_is_kept(tmp_path: Path) -> None:
    held = store(tmp_path)
    for record, method in (("", "POST"), ("{content: prompts, keep: 2d}", "GET")):
        _, verdict = judged(tmp_path, record, recorder(held, Trail()), method=method)
        assert verdict.allowed, verdict.detail
        assert not verdict.record
    assert held.listed() == []


def test_a_call_that_must_be_kept_and_cannot_be_is_refused(tmp_path: Path) -> None:
    wanted = "{content: prompts, keep: 2d}"
    _, verdict = judged(tmp_path, wanted, None)
    assert (verdict.allowed, verdict.reason) == (False, "record_unavailable")
    assert "keeps calls" in str(refusal_body(verdict)["next_steps"])
    assert judged(tmp_path, "", None)[1].allowed, "its twin without record passes"
    _, verdict = judged(tmp_path, wanted, recorder(store(tmp_path, limit=100), Trail()))
    assert (verdict.allowed, verdict.reason, verdict.dial) == (False, "record_unavailable", None)
    assert "full" in verdict.detail
    held = store(tmp_path)
    held.close()
    _, verdict = judged(tmp_path, wanted, recorder(held, Trail()))
    assert verdict.reason == "record_unavailable"


@pytest.mark.parametrize("limit", ["per: 1m, requests: 1", "per: day, requests: 1, tokens: 100000"])
def test_a_call_that_cannot_be_kept_takes_nothing_of_a_limit_and_its_twin_does(tmp_path: Path, limit: str) -> None:
    ledger = Ledger(tmp_path / "budget.db")
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
    names = iter(f"c-{number}" for number in range(99))
    spool: Any = Trail()
    meter = Meter(ledger, spool, factory, now=lambda: NOW, new_id=lambda: next(names))
    told = f"{{id: burst, scope: workspace, {limit}}}"

    def outcome(limit_of_store: int) -> str:
        keeper = recorder(store(Path(tempfile.mkdtemp(dir=tmp_path)), limit=limit_of_store), Trail())
        verdict = judged(tmp_path, "{content: prompts, keep: 2d}", keeper, meter=meter, counted=told)[1]
        return str(verdict.reason)

    assert [outcome(100), outcome(100)] == ["record_unavailable"] * 2
    assert outcome(10**8) == ""
    assert outcome(10**8) == ("rate_limited" if "1m" in limit else "quota_exhausted")
    ledger.close()


class _Broken:
    """A meter that admits calls and can give back nothing of what it reserved."""

    def __init__(self) -> None:
        self.uncounted: list[str] = []

    async def reserve(self, *_: Any, **__: Any) -> Reserved:
        return Reserved("charge-1", None, "counted-1")

    async def give_back(self, charge: str, _why: str) -> None:
        raise LedgerError(f"{charge} is not there")

    async def uncount(self, counted: str) -> None:
        self.uncounted.append(counted)


def test_a_charge_that_cannot_be_given_back_leaves_no_request_counted(tmp_path: Path) -> None:
    meter, keeper = _Broken(), recorder(store(tmp_path, limit=100), Trail())
    told = "{id: burst, scope: workspace, per: 1m, requests: 1}"
    verdict = judged(tmp_path, "{content: prompts, keep: 2d}", keeper, meter=meter, counted=told)[1]
    assert verdict.reason == "record_unavailable"
    assert meter.uncounted == ["counted-1"]


def test_the_record_of_a_call_that_is_not_sent_after_all_is_forgotten(tmp_path: Path) -> None:
    held = store(tmp_path)
    bench, verdict = judged(tmp_path, "{content: prompts, keep: 2d}", recorder(held, Trail()))
    assert held.read(verdict.record)
    asyncio.run(bench.judge.give_back(verdict, "the call could not be recorded"))
    with pytest.raises(RecordUnknown):
        held.read(verdict.record)


def test_what_the_filter_tells_is_read_strictly() -> None:
    assert read_told([(b"x-saw-record", b"r"), (b"x-saw-piece", b"3")], b"text") == Told(
        record="r", piece=3, pieces=0, status=0, text=b"text"
    )
    end = read_told([(b"x-saw-record", b"r"), (b"x-saw-pieces", b"4"), (b"x-saw-status", b"200")], b"")
    assert (end.piece, end.pieces, end.status) == (-1, 4, 200)
    assert read_told([(b"x-saw-piece", "²".encode("latin-1"))], b"").piece == -1


def test_every_name_in_the_filter_is_filled_in() -> None:
    source = record_filter()
    for name in ("RECORD_HEADER", "RECORD_SEAT", "PIECE_NUMBER", "PIECES_NUMBER", "STATUS_HEADER", "_BYTES"):
        assert name not in source


# -- reading


async def _asked(path: Path, keeper: Recorder, *questions: bytes) -> list[Any]:
    server = await asyncio.start_unix_server(RecordDesk(keeper).serve, path=str(path), limit=LONGEST_QUESTION)
    answers = []
    for question in questions:
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(question + b"\n")
        answers.append(json.loads(await reader.readline()))
        writer.close()
    server.close()
    return answers


def test_a_reading_is_in_the_trail_before_it_is_answered(tmp_path: Path) -> None:
    held, trail = store(tmp_path), Trail()
    put(held)
    keeper = recorder(held, trail)
    listed, whole = asyncio.run(
        _asked(tmp_path / "s", keeper, b'{"action": "list"}', b'{"action": "show", "record": "r"}')
    )
    assert listed["records"][0]["facts"]["model"] == "demo-1"
    assert whole["shown"]["body"] == "a prompt"
    assert [event["api"]["operation"] for event in trail.events] == ["inference.record.read"] * 2
    assert trail.events[1]["resources"] == [{"type": "inference_record", "uid": "r"}]
    assert trail.events[1]["actor"]["user"]["uid"] == f"local:{pwd.getpwuid(os.getuid()).pw_name}"
    trail.full = True
    [refused] = asyncio.run(_asked(tmp_path / "s2", keeper, b'{"action": "show", "record": "r"}'))
    assert not refused["ok"]
    assert "a prompt" not in json.dumps(refused)


@pytest.mark.parametrize(
    "question",
    [
        b"",
        b"[]",
        b"{}",
        b'{"action": "drop"}',
        b'{"action": "list", "more": 1}',
        b'{"action": "list", "limit": "all"}',
        b"x" * 9000,
    ],
)
def test_a_question_that_is_none_reads_nothing(tmp_path: Path, question: bytes) -> None:
    held, trail = store(tmp_path), Trail()
    put(held)
    [answer] = asyncio.run(_asked(tmp_path / "s", recorder(held, trail), question))
    assert (answer["ok"], answer["error"]) == (False, "malformed")
    assert not trail.events


def test_the_command_shows_text_that_cannot_act_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = store(tmp_path)
    held.keep(
        "r", 1.0, 2e9, msgspec.structs.replace(FACTS, model="demo-\x1b[2J"), b"a \x1b[31mprompt\nsecond", answer=False
    )
    held.keep("raw", 2.0, 2e9, FACTS, b"\xff\x00", answer=True)
    keeper, path, ready, done = recorder(held, Trail()), tmp_path / "s", threading.Event(), threading.Event()

    async def serve() -> None:
        server = await asyncio.start_unix_server(RecordDesk(keeper).serve, path=str(path), limit=LONGEST_QUESTION)
        ready.set()
        await asyncio.to_thread(done.wait, 60)
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(60)
        assert main(["inference", "log", "--socket", str(path)]) == 0
        assert "ws-1" in capsys.readouterr().out
        assert main(["inference", "show", "r", "--socket", str(path)]) == 0
        said = capsys.readouterr().out
        assert "a \\u001b[31mprompt\nsecond" in said
        assert "\x1b" not in said
        assert "demo-?[2J" in said
        raw = ask(path, {"action": "show", "record": "raw"})["shown"]
        assert (raw["body"], raw["encoded"]) == ("/wA=", ["body"])
        with pytest.raises(NotRead, match="no record"):
            ask(path, {"action": "show", "record": "other"})
    finally:
        done.set()
        thread.join(60)
    with pytest.raises(ConfigError, match="does not answer"):
        ask(tmp_path / "nowhere", {"action": "list"})
