"""Calls that are named in the body, through ring 2: it decides on the bytes that it sends on, whatever ring 1 would have said."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import json
import ssl
from typing import Any

import pytest
from ring2_rig import Answer, Rig, wait_for

pytestmark = [pytest.mark.control("NET-01"), pytest.mark.control("POL-04")]


def post(rig: Rig, target: str, value: object, **headers: str) -> Answer:
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return rig.call("POST", target, body=body, headers={"content-type": "application/json", **headers})


def call(method: str, number: int = 1, **params: object) -> dict[str, object]:
    return {"jsonrpc": "2.0", "id": number, "method": method, "params": params}


TOOL = call("tools/call", name="search_web", arguments={"q": "x"})
ALLOWED = [
    ("/graphql", {"query": "{viewer{login}}"}),
    ("/graphql", [{"query": "{viewer}"}, {"query": "mutation{note}"}]),
    ("/graphql", {"query": "{secret: viewer}"}),
    ("/rpc", call("reports.list")),
    ("/mcp", TOOL),
    ("/mcp", [TOOL, call("tools/list", 2)]),
]


@pytest.mark.parametrize(("target", "value"), ALLOWED)
def test_what_a_rule_names_arrives_as_it_was_judged(rig: Rig, target: str, value: object) -> None:
    assert post(rig, target, value).status == 200
    arrived = rig.far.arrived[0]
    assert (arrived["method"], arrived["target"]) == ("POST", target)
    assert arrived["sha256"] == hashlib.sha256(json.dumps(value).encode()).hexdigest()


HASH = {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "a" * 64}}}
REFUSED: list[tuple[str, Any, str, str]] = [
    ("/graphql", {"query": "subscription{events}"}, "operation_not_allowed", "graphql"),
    ("/graphql", {"query": "{viewer: secret}"}, "deny_rule", "graphql"),
    (
        "/graphql",
        {"query": "{...F} fragment F on Query{viewer ...G} fragment G on Query{secret}"},
        "deny_rule",
        "graphql",
    ),
    ("/graphql", [{"query": "{viewer}"}, {"query": "{secret}"}], "deny_rule", "graphql"),
    ("/graphql", HASH, "body_unreadable", "graphql"),
    ("/graphql", b'{"query": "{viewer}", "query": "{secret}"}', "body_unreadable", "graphql"),
    ("/graphql", b'{"query": "{viewer}"}'.ljust(65_537), "body_too_large", "graphql"),
    ("/graphql", b'{"query": "{viewer}"}'.ljust(1024 * 1024), "body_too_large", "graphql"),
    ("/graphql", b'{"query": "{viewer}"}'.ljust(3 * 1024 * 1024), "body_too_large", "graphql"),
    ("/rpc", call("reports.drop"), "operation_not_allowed", "json-rpc"),
    ("/rpc", [call("reports.list"), call("reports.drop", 2)], "operation_not_allowed", "json-rpc"),
    ("/rpc", {"jsonrpc": "2.0", "id": 1, "result": {}}, "body_unreadable", "json-rpc"),
    ("/mcp", call("tools/call", name="drop"), "operation_not_allowed", "mcp"),
    ("/mcp", [TOOL, call("tools/call", 2, name="drop")], "operation_not_allowed", "mcp"),
    ("/mcp", json.dumps(TOOL).encode().replace(b'"name"', b'"name": "drop", "name"'), "body_unreadable", "mcp"),
    ("/mcp", json.dumps(TOOL).encode().ljust(2049), "body_too_large", "mcp"),
]


@pytest.mark.parametrize(("target", "value", "reason", "protocol"), REFUSED, ids=range(len(REFUSED)))
def test_its_twin_is_refused_with_a_body_to_act_on_and_arrives_nowhere(
    rig: Rig, target: str, value: object, reason: str, protocol: str
) -> None:
    answer = post(rig, target, value)
    assert answer.outcome == (403, reason)
    told = answer.json
    assert (told["layer"], told["protocol"]) == ("ring2", protocol)
    assert told["next_steps"] or reason == "deny_rule"
    assert rig.far.arrived == []


def test_a_body_in_pieces_is_judged_whole_and_sent_as_it_was_judged(rig: Rig) -> None:
    def chunks(rig: Rig, *parts: bytes) -> Answer:
        sock: ssl.SSLSocket = rig.svid().wrap_socket(
            rig.connect("10.210.1.1", 8443), server_hostname="ring2.saw.internal"
        )
        head = (
            "POST /graphql HTTP/1.1\r\nhost: api.example.com\r\nx-saw-binary: /usr/bin/curl\r\n"
            "content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        )
        sock.sendall(head.encode())
        for part in parts:
            sock.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        sock.sendall(b"0\r\n\r\n")
        response = http.client.HTTPResponse(sock)
        response.begin()
        answer = Answer(response)
        sock.close()
        return answer

    good, bad = b'{"query": "{viewer}"}', b'{"query": "{secret}"}'
    assert chunks(rig, good[:5], good[5:]).status == 200
    assert rig.far.arrived[0]["sha256"] == hashlib.sha256(good).hexdigest()
    rig.far.arrived.clear()
    assert chunks(rig, bad[:5], bad[5:]).outcome == (403, "deny_rule")
    assert chunks(rig, good, b" " * 70_000).outcome == (403, "body_too_large")
    assert chunks(rig, good, b" " * 1024 * 1024, b"x" * 1024 * 1024).outcome == (403, "body_too_large")
    assert rig.far.arrived == []


def test_a_compressed_body_is_refused_and_plain_it_passes(rig: Rig) -> None:
    packed = gzip.compress(b'{"query": "{secret}"}')
    assert post(rig, "/graphql", packed, **{"content-encoding": "gzip"}).outcome == (403, "body_unreadable")
    assert post(rig, "/graphql", b'{"query": "{viewer}"}', **{"content-type": "text/plain"}).outcome == (
        403,
        "body_unreadable",
    )
    assert rig.far.arrived == []
    assert post(rig, "/graphql", b'{"query": "{viewer}"}').status == 200


@pytest.mark.control("REV-01")
def test_a_mutation_waits_for_a_person_and_is_sent_as_it_was_approved(rig: Rig) -> None:
    value = {"query": "mutation{createIssue{id}}"}
    answer = post(rig, "/graphql", value, **{"x-saw-ring1": "review"})
    assert answer.status == 202
    review = str(answer.json["review_id"])
    assert rig.far.arrived == []
    rig.broker.reviews.move(review, "approved")
    sent = rig.call("GET", f"/.well-known/saw/reviews/{review}?wait=20")
    assert sent.body == b"from the far end"
    assert rig.far.arrived[0]["sha256"] == hashlib.sha256(json.dumps(value).encode()).hexdigest()
    assert post(rig, "/graphql", {"query": "mutation{note}"}).status == 200, "this one needs nobody"


TOLD = b'event: message\ndata: {"jsonrpc":"2.0","method":"notifications/tools/list_changed"}\n\n'


def test_the_stream_of_a_session_flows_and_the_audit_names_what_was_asked(rig: Rig) -> None:
    async def stream(scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": TOLD, "more_body": True})
        await send({"type": "http.response.body", "body": TOLD})

    rig.far.respond = stream
    answer = rig.call("GET", "/mcp", headers={"accept": "text/event-stream", "mcp-session-id": "abc"})
    assert answer.body == 2 * TOLD
    assert dict(rig.far.arrived[0]["headers"])["mcp-session-id"] == "abc"
    rig.far.respond = None
    assert rig.call("DELETE", "/mcp", headers={"mcp-session-id": "abc"}).status == 200
    assert rig.call("DELETE", "/mcp").outcome == (403, "body_unreadable")
    assert post(rig, "/mcp", TOOL).status == 200
    wait_for(lambda: any(_asked(row) == "tools/call search_web" for row in list(rig.broker.events)), "the audit row")


def _asked(row: Any) -> str:
    return str(row.event["unmapped"]["saw"].get("operations", ""))


READ = call("tools/call", name="read", arguments={"path": "/srv/docs/a.md"})
PUBLISH = call("tools/call", name="publish", arguments={"path": "/srv/docs/a.md", "tags": ["new"]})


def changed(value: dict[str, Any], number: int, **arguments: object) -> dict[str, Any]:
    params = {**value["params"], "arguments": {**value["params"]["arguments"], **arguments}}
    return {**value, "id": number, "params": params}


TOOLS_REFUSED: list[tuple[Any, str, str]] = [
    (changed(READ, 1, path="/srv/docs/../keys"), "argument_not_allowed", "path"),
    (changed(READ, 1, path=["/srv/docs/a.md"]), "argument_not_allowed", "path"),
    (changed(READ, 1, mode="raw"), "argument_not_allowed", "mode"),
    (call("tools/call", name="read"), "argument_not_allowed", "path"),
    ([READ, changed(READ, 2, path="/etc/passwd")], "argument_not_allowed", "path"),
    (changed(PUBLISH, 1, path="/etc/passwd"), "argument_not_allowed", "path"),
    (call("tools/call", name="drop"), "tool_not_allowed", ""),
]


@pytest.mark.control("RUN-05")
def test_a_tool_with_the_arguments_that_it_may_have_arrives_as_it_was_judged(rig: Rig) -> None:
    for value in (READ, [READ, changed(READ, 2, path="/srv/docs")]):
        rig.far.arrived.clear()
        assert post(rig, "/tools", value).status == 200
        assert rig.far.arrived[0]["sha256"] == hashlib.sha256(json.dumps(value).encode()).hexdigest()


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize(("value", "reason", "argument"), TOOLS_REFUSED, ids=range(len(TOOLS_REFUSED)))
def test_with_other_arguments_it_is_refused_by_name_and_arrives_nowhere(
    rig: Rig, value: object, reason: str, argument: str
) -> None:
    answer = post(rig, "/tools", value)
    assert answer.outcome == (403, reason)
    missing = answer.json["rule_missing"]
    assert (missing["server"], missing.get("argument", "")) == ("docs", argument)
    assert answer.json["next_steps"] and b"passwd" not in answer.body
    assert rig.far.arrived == []


def told(answer: Answer) -> dict[str, Any]:
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json"), answer.body
    return dict(answer.json["result"])


@pytest.mark.control("RUN-05")
@pytest.mark.control("REV-01")
def test_a_reviewed_tool_says_ask_again_and_asking_again_gets_the_stored_answer_once(rig: Rig) -> None:
    async def server(scope: Any, send: Any) -> None:
        message = {"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "published"}]}}
        body = f"event: message\ndata: {json.dumps(message)}\n\n".encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": body})

    first = post(rig, "/tools", PUBLISH)
    waiting = told(first)
    review = first.headers["x-saw-review-id"]
    assert waiting["isError"] and review in waiting["content"][0]["text"]
    assert (first.json["id"], first.headers["x-saw-review"]) == (1, "pending")
    again = post(
        rig, "/tools", {**PUBLISH, "id": "two", "params": {**PUBLISH["params"], "_meta": {"progressToken": 2}}}
    )
    assert (again.json["id"], again.headers["x-saw-review-id"]) == ("two", review), "another number is no other call"
    assert post(rig, "/tools", changed(PUBLISH, 3, tags=["old"])).headers["x-saw-review-id"] != review
    assert rig.far.arrived == []
    stored = rig.broker.reviews.all[review].opened
    assert (stored.call.body, stored.group) == (json.dumps(PUBLISH).encode(), "team-x")
    assert stored.rule.endswith("mcp.servers.docs.tools.publish")

    rig.far.respond = server
    rig.broker.reviews.move(review, "approved")
    assert rig.call("GET", f"/.well-known/saw/reviews/{review}?wait=20").status == 200
    done = post(rig, "/tools", {**PUBLISH, "id": 7})
    assert (done.json["id"], told(done)["content"][0]["text"]) == (7, "published")
    [arrived] = rig.far.arrived
    assert arrived["sha256"] == hashlib.sha256(json.dumps(PUBLISH).encode()).hexdigest()
    assert post(rig, "/tools", {**PUBLISH, "id": 8}).headers["x-saw-review-id"] != review, "an answer is given once"
    assert len(rig.far.arrived) == 1


@pytest.mark.control("RUN-05")
@pytest.mark.control("REV-01")
def test_a_tool_that_people_refuse_is_told_so_and_sent_nowhere(rig: Rig) -> None:
    review = post(rig, "/tools", PUBLISH).headers["x-saw-review-id"]
    rig.broker.reviews.move(review, "denied")
    refused = told(post(rig, "/tools", {**PUBLISH, "id": 2}))
    assert refused["isError"] and "a person decided against this write" in refused["content"][0]["text"]
    assert post(rig, "/tools", {**PUBLISH, "id": 3}).headers["x-saw-review-id"] != review
    batch = post(rig, "/tools", [PUBLISH, {**READ, "id": 2}])
    assert (batch.status, batch.json["state"]) == (202, "pending"), (
        "a batch has no one answer: it waits as other calls do"
    )
    assert rig.far.arrived == []
