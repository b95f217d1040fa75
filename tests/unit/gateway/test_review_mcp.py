"""Calls of MCP tools that wait for a person: which calls are the same one, and what is read out of a stored answer."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from saw.gateway.judge import Call, Verdict
from saw.gateway.review_mcp import (
    MOST_REMEMBERED,
    Remembered,
    ToolAsked,
    ToolReviews,
    tool_asked,
    tool_ended,
    tool_waits,
)
from saw.policy.model import Decision, Operation
from saw.review.messages import ReviewedAnswer, ReviewView

pytestmark = [pytest.mark.control("RUN-05"), pytest.mark.control("REV-01")]

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
VIEW = ReviewView(
    id=f"rv-{'a' * 32}", workspace_id="ws-1", state="done", request_digest="b" * 64, opened_at="2026-01-02T03:04:05Z",
    expires_at="2026-01-03T03:04:05Z",
)  # fmt: skip
CALLED = Call(
    listener="1", peer="", scheme="https", authority="mcp.example.com", port="443", method="POST", target="/mcp",
    binary="/usr/bin/node", ancestors=(), request_id="r", headers={}, body=None, body_complete=True,
)  # fmt: skip
DECISION = Decision(verdict="deny", protocol="mcp", operations=(Operation("tools/call", "publish"),))
VERDICT = Verdict(
    call=CALLED, time=NOW, allowed=False, host="mcp.example.com", port=443, workspace_id="ws-1", policy_digest="d" * 64,
    decision=DECISION,
)  # fmt: skip
MESSAGE: dict[str, Any] = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "tools/call",
    "params": {"name": "publish", "arguments": {"path": "/a", "n": 1}},
}


def asked(verdict: Verdict = VERDICT, **changes: Any) -> ToolAsked | None:
    return tool_asked(verdict, json.dumps({**MESSAGE, **changes}).encode())


def params(**changes: Any) -> dict[str, Any]:
    return {"params": {**MESSAGE["params"], **changes}}


def test_tool_and_arguments_make_a_call_the_same_and_its_number_and_spelling_do_not() -> None:
    first = asked()
    assert first is not None
    for same in (
        {"id": "x"},
        params(_meta={"progressToken": 5}),
        {"params": {"arguments": {"n": 1, "path": "/a"}, "name": "publish"}},
    ):
        again = asked(**same)
        assert again is not None and again.fingerprint == first.fingerprint
    others = [
        params(name="other"),
        params(arguments={"path": "/a", "n": 1.0}),
        params(arguments={"path": "/a", "n": True}),
        params(arguments={"path": "/a", "n": "1"}),
        params(arguments={}),
    ]
    found = [asked(**other) for other in others]
    moved = [
        msgspec.structs.replace(VERDICT, **{field: value})
        for field, value in (
            ("workspace_id", "ws-2"),
            ("policy_digest", "e" * 64),
            ("host", "x.example.com"),
            ("port", 1),
        )
    ]
    moved += [
        msgspec.structs.replace(VERDICT, call=msgspec.structs.replace(CALLED, **{field: value}))
        for field, value in (("target", "/other"), ("binary", "/usr/bin/curl"), ("scheme", "http"))
    ]
    found += [asked(verdict) for verdict in moved]
    assert len({one.fingerprint for one in [first, *found] if one is not None}) == len(found) + 1


def test_what_has_no_one_answer_waits_as_other_calls_do() -> None:
    def decided(*kinds: str, protocol: str = "mcp") -> Verdict:
        operations = tuple(Operation(kind, "publish") for kind in kinds)
        return msgspec.structs.replace(
            VERDICT, decision=Decision(verdict="deny", protocol=protocol, operations=operations)
        )

    assert asked() is not None
    assert asked(decided("tools/call", "tools/call")) is None
    assert asked(decided("vendor/write")) is None
    assert asked(decided("tools/call", protocol="json-rpc")) is None
    assert asked(msgspec.structs.replace(VERDICT, decision=None)) is None
    assert asked(**params(task={"ttl": 1})) is None
    notification = {key: value for key, value in MESSAGE.items() if key != "id"}
    assert tool_asked(VERDICT, json.dumps(notification).encode()) is None
    assert tool_asked(VERDICT, b'{"id": 1, "id": 2}') is None


def test_what_is_remembered_is_bounded_for_each_workspace() -> None:
    known = ToolReviews()
    calls = [ToolAsked(number, f"{number}") for number in range(MOST_REMEMBERED + 1)]
    known.keep("ws-2", calls[0], "rv-other")
    for call in calls:
        known.keep("ws-1", call, f"rv-{call.identifier}")
    assert known.find("ws-1", calls[0]) is None, "the oldest is forgotten"
    assert known.find("ws-1", calls[1]) == Remembered("rv-1", 1)
    assert known.find("ws-2", calls[0]) == Remembered("rv-other", 0)
    known.forget("ws-1", calls[1])
    known.forget("ws-3", calls[1])
    assert known.find("ws-1", calls[1]) is None


RESULT = {"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "é"}]}}
PLAIN = json.dumps(RESULT).encode()
NOTE = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {}}
# Data on two lines is joined by a newline, which JSON takes between its tokens.
HALVES = json.dumps(RESULT).split(" ", 1)
STREAM = f": hi\nevent: message\ndata: {json.dumps(NOTE)}\n\nid: 4\ndata:{HALVES[0]}\ndata: {HALVES[1]}\n".encode()
JSON, EVENTS = "application/json; charset=utf-8", "text/event-stream"


def ended(
    body: bytes, kind: str = JSON, status: int = 200, *, truncated: bool = False, **headers: str
) -> dict[str, Any]:
    fields = (("content-type", kind), *((name.replace("_", "-"), value) for name, value in headers.items()))
    stored = ReviewedAnswer(status=status, headers=fields, body=body, truncated=truncated)
    view = msgspec.structs.replace(VIEW, answer=stored)
    code, found, content = tool_ended(view, Remembered(VIEW.id, 1), ToolAsked("new", "f"))
    assert code == 200 and (b"x-saw-review", b"done") in found
    answer: dict[str, Any] = json.loads(content)
    assert answer["id"] == "new"
    return answer


@pytest.mark.parametrize(
    ("body", "kind", "headers"),
    [
        (PLAIN, JSON, {}),
        (STREAM, EVENTS, {}),
        (STREAM.replace(b"\n", b"\r\n"), EVENTS, {}),
        (gzip.compress(PLAIN), JSON, {"content_encoding": "gzip"}),
    ],
    ids=["json", "stream", "stream with CRLF", "gzip"],
)
def test_the_stored_answer_is_given_under_the_number_that_asks(body: bytes, kind: str, headers: dict[str, str]) -> None:
    assert ended(body, kind, **headers)["result"] == RESULT["result"]


@pytest.mark.parametrize(
    ("body", "options"),
    [
        (PLAIN, {"status": 404}),
        (PLAIN, {"truncated": True}),
        (PLAIN.replace(b'"id": 1', b'"id": 2'), {}),
        (PLAIN.replace(b'"id": 1', b'"id": "1"'), {}),
        (PLAIN.replace(b'"id": 1', b'"id": true'), {}),
        (PLAIN.replace(b'"id": 1', b'"id": 2, "id": 1'), {}),
        (json.dumps(NOTE).encode(), {}),
        (b"<html>", {"kind": "text/html"}),
        (gzip.compress(PLAIN)[:-9], {"content_encoding": "gzip"}),
        (gzip.compress(b" " * 5_000_000 + PLAIN), {"content_encoding": "gzip"}),
        (PLAIN, {"content_encoding": "br"}),
        (b"data: " + PLAIN, {}),
    ],
    ids=range(12),
)
def test_what_is_no_answer_to_the_call_is_never_passed_off_as_one(body: bytes, options: dict[str, Any]) -> None:
    result = ended(body, **options)["result"]
    assert result["isError"] and "it was sent once" in result["content"][0]["text"]


@pytest.mark.parametrize("state", ["pending", "approved", "executing"])
def test_while_it_waits_the_tool_says_ask_again_and_names_the_review(state: Any) -> None:
    status, headers, content = tool_waits(msgspec.structs.replace(VIEW, state=state), ToolAsked(5, "f"))
    answer = json.loads(content)
    assert (status, answer["id"], answer["result"]["isError"]) == (200, 5, True)
    assert VIEW.id in answer["result"]["content"][0]["text"]
    assert answer["result"]["_meta"]["saw/review"]["state"] == state
    assert (b"x-saw-review-id", VIEW.id.encode()) in headers


@pytest.mark.parametrize("state", ["denied", "expired", "cancelled", "failed", "unknown"])
def test_how_a_review_ended_without_an_answer_is_told_as_an_error_of_the_tool(state: Any) -> None:
    view = msgspec.structs.replace(VIEW, state=state, detail="by the sponsor")
    answer = json.loads(tool_ended(view, Remembered(VIEW.id, 1), ToolAsked(5, "f"))[2])
    assert answer["result"]["isError"] and "by the sponsor" in answer["result"]["content"][0]["text"]
