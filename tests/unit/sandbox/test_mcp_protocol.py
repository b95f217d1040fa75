"""What one mediated MCP session lets through, message by message."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy import strict_json
from saw.policy.loader import load_governance
from saw.policy.mcp import decide_tool
from saw.policy.mcp_messages import MessageInvalid, encode, parse
from saw.runtime.mcp_protocol import Session

GOVERNANCE = load_governance(b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
mcp:
  servers:
    files:
      transport: stdio
      command: [server]
      tools:
        read_file: {class: auto, args: {path: {under: /srv/tree, required: true}}}
        remove: {class: deny}
        publish: {class: review}
""")


@pytest.fixture
def session():
    records = []
    made = Session(
        "files",
        lambda: GOVERNANCE.mcp.servers["files"],
        lambda tool, arguments: decide_tool(GOVERNANCE, "files", tool, arguments),
        records.append,
    )
    made.records = records
    return made


def line(**message):
    return json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"


def call(tool, arguments, number=1):
    return line(id=number, method="tools/call", params={"name": tool, "arguments": arguments})


def only(outs):
    (out,) = outs
    return out.to, json.loads(out.line)


@pytest.mark.control("RUN-05")
def test_an_allowed_call_reaches_the_server_and_is_logged(session):
    to, message = only(session.from_client(call("read_file", {"path": "/srv/tree/a"})))
    assert (to, message["params"]["arguments"]) == ("server", {"path": "/srv/tree/a"})
    assert session.records[-1]["verdict"] == "allow"
    assert "/srv/tree/a" not in json.dumps(session.records)


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(
    ("tool", "arguments", "reason"),
    [
        ("read_file", {"path": "/etc/passwd"}, "argument_not_allowed"),
        ("read_file", {"path": "/srv/tree/../etc/passwd"}, "argument_not_allowed"),
        ("read_file", {"path": "/srv/tree/a", "extra": 1}, "argument_not_allowed"),
        ("remove", {}, "tool_not_allowed"),
        ("other", {}, "tool_not_allowed"),
    ],
)
def test_a_denied_call_is_answered_and_never_forwarded(session, tool, arguments, reason):
    to, message = only(session.from_client(call(tool, arguments)))
    assert to == "client"
    assert message["error"]["data"]["reason"] == reason
    assert message["error"]["data"]["error"] == "policy_denied"


@pytest.mark.control("RUN-05")
def test_a_tool_that_needs_a_person_is_refused_with_what_to_do(session):
    message = only(session.from_client(call("publish", {})))[1]
    assert message["error"]["data"]["reason"] == "review_required"
    assert "another class" in message["error"]["data"]["next_steps"][0]


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(
    "raw",
    [
        b'{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"remove","name":"read_file"}}\n',
        b'[{"jsonrpc":"2.0","id":1,"method":"ping"}]\n',
        b'{"jsonrpc":"2.0","id":1.0,"method":"ping"}\n',
        b'{"jsonrpc":"2.0","id":true,"method":"ping"}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","result":{}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":NaN}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":1e999}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":-1e999}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":Infinity}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":"\\ud800"}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"\\udc00":1}}\n',
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":{"x":' + b"9" * 5000 + b"}}\n",
        b'{"jsonrpc":"2.0","id":1,"method":"ping","extra":1}\n',
        b'{"id":1,"method":"ping"}\n',
        b"\xff\n",
        b'{"jsonrpc":"2.0","id":1,"method":"ping","params":' + b"[" * 100 + b"]" * 100 + b"}\n",
        b"[" * 200000 + b"\n",
    ],
)
def test_ambiguous_messages_are_refused(session, raw):
    to, message = only(session.from_client(raw))
    assert to == "client"
    assert "error" in message
    assert only(session.from_client(line(id=1, method="ping")))[0] == "server"


@pytest.mark.control("RUN-05")
def test_only_allowed_tools_are_listed(session):
    session.from_client(line(id="a", method="tools/list"))
    tools = [{"name": name} for name in ("read_file", "remove", "other")]
    to, message = only(session.from_server(line(id="a", result={"tools": tools})))
    assert (to, [tool["name"] for tool in message["result"]["tools"]]) == ("client", ["read_file"])


@pytest.mark.control("RUN-05")
def test_responses_only_for_outstanding_ids(session):
    assert session.from_server(line(id=5, result={})) == []
    session.from_client(line(id=5, method="ping"))
    assert session.from_server(line(id="5", result={})) == []
    assert only(session.from_server(line(id=5, result={})))[0] == "client"
    assert session.from_server(line(id=5, result={})) == []
    assert session.from_client(line(id=9, result={})) == []


@pytest.mark.control("RUN-05")
def test_the_client_cannot_move_roots_and_the_server_cannot_ask_for_more(session):
    opening = line(id=0, method="initialize", params={"capabilities": {"roots": {"listChanged": True}, "sampling": {}}})
    assert only(session.from_client(opening))[1]["params"]["capabilities"] == {}
    answer = line(id=0, result={"capabilities": {"tools": {}, "resources": {}}})
    assert only(session.from_server(answer))[1]["result"]["capabilities"] == {"tools": {}}
    assert session.from_client(line(method="notifications/roots/list_changed")) == []
    for method in ("sampling/createMessage", "roots/list", "elicitation/create"):
        assert only(session.from_server(line(id=1, method=method)))[0] == "server"
    assert only(session.from_server(line(id=2, method="ping")))[0] == "client"
    assert only(session.from_client(line(id=3, method="resources/read", params={})))[1]["error"]["code"] == -32601


def test_an_outstanding_id_cannot_be_used_twice(session):
    session.from_client(line(id=1, method="ping"))
    assert "outstanding" in only(session.from_client(line(id=1, method="ping")))[1]["error"]["message"]


@given(st.binary(max_size=200))
def test_parse_accepts_or_refuses_and_never_breaks(raw):
    try:
        assert parse(raw)["jsonrpc"] == "2.0"
    except MessageInvalid as problem:
        assert problem.code < 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
messages = st.fixed_dictionaries(
    {"jsonrpc": st.just("2.0"), "method": st.text()}, optional={"id": st.integers() | st.text(), "params": values}
)


@pytest.mark.control("RUN-05")
@given(messages)
@example({"jsonrpc": "2.0", "method": "x", "params": {"a": 1.7976931348623157e308, "b": "\U0001f600"}})
def test_a_message_is_passed_on_as_it_was_judged(message):
    raw = json.dumps(message).encode()
    assert encode(parse(raw)) == encode(message)
    assert json.loads(encode(parse(raw))) == message


def strictly_readable(raw: bytes) -> None:
    """What goes on must be one ASCII line that every parser reads alike."""
    assert raw.isascii()
    assert raw.endswith(b"\n")
    assert raw.count(b"\n") == 1
    strict_json.loads(raw, limit=len(raw))


@st.composite
def damaged(draw):
    """A message with a piece put in, cut out or changed."""
    raw = bytearray(json.dumps(draw(messages)).encode())
    pieces = (
        b"1e999",
        b'"\\ud800"',
        b"NaN",
        b"-Infinity",
        b",",
        b'"a":1,"a":2',
        b"[",
        b"]",
        b"{",
        b"}",
        b"\x00",
        b"\xff",
    )
    for _ in range(draw(st.integers(0, 3))):
        at, length = draw(st.integers(0, len(raw))), draw(st.integers(0, 3))
        raw[at : at + length] = draw(st.sampled_from(pieces) | st.binary(max_size=3))
    return bytes(raw)


@pytest.mark.control("RUN-05")
@settings(max_examples=examples(300))
@given(st.binary(max_size=200) | damaged())
@example(b'{"jsonrpc":"2.0","method":"x","params":1e999}')
@example(b'{"jsonrpc":"2.0","method":"x","params":"\\ud83d"}')
def test_no_bytes_are_passed_on_that_parsers_read_differently(raw):
    session = Session("files", lambda: GOVERNANCE.mcp.servers["files"], lambda *_: None, lambda _: None)
    for out in (*session.from_client(raw), *session.from_server(raw)):
        strictly_readable(out.line)
    try:
        message = parse(raw)
    except MessageInvalid:
        return
    strictly_readable(encode(message))
    assert parse(encode(message)) == message
