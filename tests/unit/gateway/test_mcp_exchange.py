"""What of the answers of an MCP server over HTTP is passed on: streams in pieces, sessions, batches, and what cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.gateway.mcp_exchange import (
    MOST_REPLIES,
    AnswerRefused,
    Asked,
    Exchange,
    Finding,
    Rules,
    Sessions,
    questions,
)
from saw.gateway.mcp_relay import MOST_EACH
from saw.gateway.mcp_stored import stored_answer
from saw.gateway.mcp_stream import Event, EventReader, EventUnreadable
from saw.policy import strict_json
from saw.policy.mcp_answers import Definitions, ServerTools
from saw.policy.mcp_messages import MAX_OUTSTANDING, MessageInvalid
from saw.policy.tool_rules import Tool
from saw.review.messages import ReviewedAnswer

pytestmark = [pytest.mark.control("RUN-05"), pytest.mark.control("POL-04")]

TOOLS = {"read": Tool(class_="auto")}
NOTE = {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": 1, "progress": 1}}
SAMPLING = {"jsonrpc": "2.0", "id": 5, "method": "sampling/createMessage", "params": {}}
ANSWER = {"jsonrpc": "2.0", "id": 1, "result": {"content": []}}


def rules() -> Rules:
    return Rules(lambda: ServerTools(TOOLS, TOOLS), Definitions())


def exchange(
    *methods: str, asked: Asked | None = None, batch: bool = False, by: Callable[[], Rules] = rules
) -> tuple[Exchange, list[Finding]]:
    found: list[Finding] = []
    mine = {(int, number): method for number, method in enumerate(methods, 1)}
    return Exchange(mine, {} if asked is None else asked, by, found.append, batch=batch), found


def event(value: object, *lines: str) -> bytes:
    return "\n".join([*lines, f"data: {json.dumps(value)}", "", ""]).encode()


def data_of(stream: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in stream.split(b"\n") if line.startswith(b"data: ") and line != b"data: "]


def test_events_are_decided_one_by_one_as_they_come() -> None:
    one, found = exchange("tools/call")
    whole = event(NOTE) + event(SAMPLING) + event(ANSWER)
    cut = len(event(NOTE)) + 10
    assert data_of(one.stream(whole[:cut])) == [NOTE], "what came whole goes on, what did not waits"
    assert data_of(one.stream(whole[cut:])) == [ANSWER]
    assert found == [Finding("dropped", "request sampling/createMessage")]
    (reply,) = map(json.loads, one.replies())
    assert (reply["id"], reply["error"]["code"]) == (5, -32601), "the server is told, in the client's place"
    assert data_of(one.stream(event(ANSWER))) == [], "an answer passes once"


def test_a_server_is_answered_in_the_clients_place_a_bounded_number_of_times() -> None:
    one, found = exchange("tools/call")
    assert one.stream(event({"jsonrpc": "2.0", "id": "p", "method": "ping"})) == b":\n\n"
    assert list(map(json.loads, one.replies())) == [{"jsonrpc": "2.0", "id": "p", "result": {}}]
    assert (one.replies(), found) == ([], [])
    one.stream(event(SAMPLING) * 100)
    assert len(one.replies()) == MOST_REPLIES - 1


def test_what_was_good_before_something_bad_in_the_same_piece_goes_on() -> None:
    one, _ = exchange("tools/call")
    with pytest.raises(AnswerRefused) as refused:
        one.stream(event(NOTE) + event(ANSWER) + b"data: {\n\n" + event(NOTE))
    assert data_of(refused.value.passed) == [NOTE, ANSWER]
    assert one.refused_events(str(refused.value)) == b""


@given(st.lists(st.integers(1, 40), max_size=30), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans())
def test_how_a_stream_is_cut_changes_nothing(cuts: list[int], end: str, bom: bool) -> None:
    text = (
        f": hello\n\nid: 7\nretry: 100\n{event(NOTE).decode()}event: message\nid: x\n{event(ANSWER).decode()}data:\n\n"
    )
    stream = (b"\xef\xbb\xbf" if bom else b"") + text.replace("\n", end).encode()
    passed, at = b"", 0
    one, _ = exchange("tools/call")
    for size in [*cuts, len(stream)]:
        if at < len(stream):
            passed += one.stream(stream[at : at + size])
        at += size
    assert data_of(passed) == [NOTE, ANSWER]
    assert passed.startswith(b":\n\nid: 7\nretry: 100\nevent: message\n")
    assert passed.endswith(b"event: message\ndata: \n\n")


def test_a_message_in_lines_is_read_as_clients_read_it_and_written_as_one() -> None:
    one, _ = exchange("tools/call")
    lines = json.dumps(ANSWER, indent=1).replace("\n", "\ndata: ")
    assert data_of(one.stream(f"data: {lines}\n\n".encode())) == [ANSWER]


@settings(max_examples=examples(300))
@given(
    st.lists(
        st.binary(max_size=40)
        | st.sampled_from(
            [
                event(ANSWER),
                event(SAMPLING),
                event([ANSWER]),
                event(NOTE, "event: endpoint"),
                b"data: ",
                b"\n\n",
                b"\r",
                b"id: \0\n",
            ]
        ),
        max_size=8,
    )
)
def test_whatever_comes_nothing_goes_on_that_is_read_differently_or_was_not_asked_for(pieces: list[bytes]) -> None:
    one, _ = exchange("tools/call")
    passed = b""
    try:
        for piece in filter(None, pieces):
            passed += one.stream(piece)
    except AnswerRefused as refused:
        passed += one.refused_events(str(refused))
    assert passed.isascii() and b"\r" not in passed and b"\0" not in passed
    assert passed == b"" or passed.endswith(b"\n\n")
    told = [strict_json.loads(line[6:], limit=4096) for line in passed.split(b"\n") if line.startswith(b"data: {")]
    assert all(isinstance(message, dict) and message.get("method") != "sampling/createMessage" for message in told)
    assert sum("id" in message for message in told if isinstance(message, dict)) <= 1


def test_an_event_of_another_type_is_dropped_and_its_twin_passes() -> None:
    one, found = exchange("tools/call")
    assert one.stream(event(ANSWER, "event: endpoint", "id: 4")) == b"id: 4\n\n", "what resuming needs goes on"
    assert found[0].kind == "dropped"
    assert data_of(one.stream(event(ANSWER, "event: message"))) == [ANSWER]


def test_an_event_beyond_bounds_ends_the_stream_and_one_within_passes() -> None:
    reader = EventReader(most=100)
    assert reader.feed(b"data: " + b"x" * 90 + b"\n\n") == [Event(data=b"x" * 90)]
    for long in (b"data: " + b"x" * 100, b"data: 1\n" * 20):
        with pytest.raises(EventUnreadable):
            EventReader(most=100).feed(long)


def test_what_cannot_be_read_ends_a_stream_with_an_error_for_each_question() -> None:
    one, _ = exchange("tools/call", "tools/call")
    assert data_of(one.stream(event(ANSWER))) == [ANSWER]
    with pytest.raises(AnswerRefused) as refused:
        one.stream(b'data: {"jsonrpc":"2.0","id":2,"id":2,"result":{}}\n\n')
    (error,) = data_of(one.refused_events(str(refused.value)))
    assert (error["id"], error["error"]["data"]["reason"]) == (2, "answer_unreadable")
    assert one.refused_events("again") == b"", "a question is answered once"


def test_an_answer_may_come_on_another_stream_of_its_session_and_on_no_other() -> None:
    sessions = Sessions()
    first, _ = exchange("tools/list", asked=sessions.asked("ws-1", "web", "s-1"))
    first.stream(b"id: 1\ndata:\n\n")
    first.over(resumable=True)
    listed = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "read"}, {"name": "erase"}]}}
    for workspace, server, session in (("ws-2", "web", "s-1"), ("ws-1", "docs", "s-1"), ("ws-1", "web", "s-2")):
        other, _ = exchange(asked=sessions.asked(workspace, server, session))
        assert data_of(other.stream(event(listed))) == []
    resumed, _ = exchange(asked=sessions.asked("ws-1", "web", "s-1"))
    (passed,) = data_of(resumed.stream(event(listed)))
    assert passed["result"]["tools"] == [{"name": "read"}], "by its question, it is decided as on its own stream"
    assert data_of(resumed.stream(event(listed))) == []


def test_an_id_is_used_again_after_its_answer_and_not_before() -> None:
    asked: Asked = {}
    one, _ = exchange("tools/list", asked=asked)
    with pytest.raises(AnswerRefused):
        exchange("tools/call", asked=asked)
    one.stream(event({"jsonrpc": "2.0", "id": 1, "error": {"code": 1, "message": "no"}}))
    exchange("tools/call", asked=asked)[0].over(resumable=True)
    exchange("tools/call", asked=asked)[0].over(resumable=False)
    assert asked == {}, "a stream without ids of events cannot be resumed"


def test_what_is_remembered_is_bounded() -> None:
    asked: Asked = {(int, number): "ping" for number in range(1000, 1000 + MAX_OUTSTANDING)}
    exchange("tools/call", asked=asked)
    assert len(asked) == MAX_OUTSTANDING and (int, 1000) not in asked and (int, 1) in asked
    sessions = Sessions(most=2)
    first = sessions.asked("ws-1", "web", "a")
    assert sessions.asked("ws-1", "web", "b") is not first
    assert sessions.asked("ws-2", "web", "a") is not first
    assert sessions.asked("ws-1", "web", "a") is first
    sessions.asked("ws-1", "web", "c")
    assert sessions.asked("ws-1", "web", "a") is first and sessions.asked("ws-1", "web", "b") is not first
    assert MOST_EACH > 8


def test_a_batch_is_answered_by_one_and_no_other_question_is() -> None:
    two = [ANSWER, {"jsonrpc": "2.0", "id": 2, "result": {"tools": [{"name": "erase"}]}}]
    one, _ = exchange("tools/call", "tools/list", batch=True)
    assert json.loads(one.whole(json.dumps(two).encode())) == [ANSWER, {**two[1], "result": {"tools": []}}]
    for body, batch in ((two, False), (ANSWER, True)):
        with pytest.raises(AnswerRefused):
            exchange("tools/call", "tools/list", batch=batch)[0].whole(json.dumps(body).encode())
    events, _ = exchange("tools/call", "tools/list", batch=True)
    assert data_of(events.stream(event(two))) == [[ANSWER, {**two[1], "result": {"tools": []}}]]


def test_a_workspace_that_was_cut_off_gets_nothing_more() -> None:
    stands = [True]

    def current() -> Rules:
        if not stands[0]:
            raise AnswerRefused("workspace_not_active: workspace ws-1 is suspended")
        return rules()

    one, _ = exchange("tools/call", by=current)
    assert data_of(one.stream(event(NOTE))) == [NOTE]
    stands[0] = False
    for more in (event(NOTE), b"id: 1\n\n", b": here\n\ndata: x\n\n"):
        with pytest.raises(AnswerRefused, match="workspace_not_active"):
            one.stream(more)


def test_the_words_of_an_http_error_are_told_where_they_are_an_error_of_json_rpc() -> None:
    error = {"jsonrpc": "2.0", "id": None, "error": {"code": -32001, "message": "Session not found"}}
    one, _ = exchange("tools/call")
    assert json.loads(one.error_body(json.dumps(error).encode(), 404)) == error
    assert json.loads(one.error_body(json.dumps({**error, "id": 1}).encode(), 400))["id"] == 1
    for body in (b"<html>run this</html>", json.dumps(ANSWER).encode(), b'{"error": {"code": 1}, "error": 2}', b""):
        told = one.error_body(body, 500)
        assert "HTTP 500" in json.loads(told)["error"]["message"] and b"run" not in told


def test_what_a_client_offers_is_taken_out_of_initialize_and_all_else_is_sent_as_it_came() -> None:
    opening = {
        "jsonrpc": "2.0",
        "id": 0,
        "method": "initialize",
        "params": {"capabilities": {"sampling": {}, "roots": {}}},
    }
    said = questions(json.dumps(opening).encode())
    assert json.loads(said.body)["params"]["capabilities"] == {}
    assert (said.asked, said.batch) == ({(int, 0): "initialize"}, False)
    call = b'{ "jsonrpc": "2.0", "id": "a", "method": "tools/call", "params": {"name": "read"} }'
    assert questions(call).body == call
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "a"}}
    assert questions(json.dumps([cancel]).encode()).cancelled == ((str, "a"),)
    with pytest.raises(MessageInvalid):
        questions(b'{"id": 1, "id": 2}')


CALL = b'{"jsonrpc":"2.0","id":1,"method":"tools/list"}'
LISTED = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "read"}, {"name": "erase"}]}}


def stored(
    body: bytes, kind: str, *, status: int = 200, call: bytes = CALL, truncated: bool = False, **headers: str
) -> ReviewedAnswer:
    fields = (("content-type", kind), *((name.replace("_", "-"), value) for name, value in headers.items()))
    answer = ReviewedAnswer(status=status, headers=fields, body=body, truncated=truncated)
    return stored_answer(answer, call, rules, lambda _: None)


def test_what_is_kept_of_an_approved_calls_answer_is_looked_at_like_any_other() -> None:
    text = json.dumps(LISTED).encode()
    kept = stored(text, "application/json; charset=utf-8", mcp_session_id="s")
    assert json.loads(kept.body)["result"]["tools"] == [{"name": "read"}]
    assert dict(kept.headers) == {"content-type": "application/json", "mcp-session-id": "s"}
    assert data_of(stored(event(SAMPLING) + event(LISTED), "text/event-stream").body)[0]["result"]["tools"] == [
        {"name": "read"}
    ]
    cut = stored(event(NOTE) + event(LISTED)[:20], "text/event-stream", truncated=True)
    assert (data_of(cut.body), cut.truncated) == ([NOTE], True)
    assert json.loads(stored(b"gone", "text/html", status=404).body)["error"]["message"].startswith(
        "the server answered HTTP 404"
    )
    for refused in (
        stored(text, "text/html"),
        stored(text, "application/json", content_encoding="gzip"),
        stored(text, "application/json", truncated=True),
        stored(text.replace(b'"id"', b'"id": 1, "id"'), "application/json"),
    ):
        told = json.loads(refused.body)
        assert (told["id"], told["error"]["data"]["reason"], refused.truncated) == (1, "answer_unreadable", False)
    (error,) = data_of(stored(event({"id": 1}), "text/event-stream").body)
    assert error["error"]["data"]["reason"] == "answer_unreadable"
    notified = stored(
        b"ignore this", "text/plain", status=202, call=b'{"jsonrpc":"2.0","method":"notifications/initialized"}'
    )
    assert (notified.body, dict(notified.headers)) == (b"", {})
