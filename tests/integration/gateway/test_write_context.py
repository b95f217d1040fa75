"""The state that a write would change is read through the real ring 2 by a call that policy decides on like every other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from ring2_rig import SECRET, Rig, wait_for

from saw.review.messages import ContextResult, ReadState, StateContext
from saw.review.render import render
from saw.review.state_diff import state_of

pytestmark = [pytest.mark.control("REV-01"), pytest.mark.control("REV-02")]
ITEM = "/v1/items/7?full=yes"
NOW = b'{"amount": 100, "name": "rent"}'


class Item:
    """What the far end says of an item."""

    status, media, body = 200, "application/json; charset=utf-8", NOW

    async def respond(self, _scope: Any, send: Any) -> None:
        headers = [(b"content-type", self.media.encode()), (b"etag", b'"v1"')]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@pytest.fixture
def item(rig: Rig) -> Iterator[Item]:
    found = Item()
    rig.far.respond = found.respond
    yield found
    rig.far.respond = None


def opened(rig: Rig, method: str = "PUT", target: str = ITEM, body: bytes = b'{"amount": 4711}', **headers: str) -> Any:
    """Make a write that waits for a person, and return how the perimeter opened its review."""
    named = {"content-type": "application/json", **headers} if body else dict(headers)
    answer = rig.call(method, target, body=body, headers=named)
    assert answer.status == 202, answer.body
    return rig.broker.reviews.all[answer.json["review_id"]].opened


def read(rig: Rig, path: str = ITEM) -> ContextResult:
    """Have the perimeter read, and return what it told; a far end that was too slow is asked again, as the broker does."""
    asked = ReadState(
        id=f"rv-{8:032x}", workspace_id="ws-1", policy_digest=rig.digest, scheme="https", host="api.example.com", port=443,
        path=path, binary="/usr/bin/curl",
    )  # fmt: skip
    for _ in range(4):
        before = len(rig.broker.reviews.contexts)
        rig.broker.reviews.ask_context(asked)
        wait_for(lambda known=before: len(rig.broker.reviews.contexts) > known, "the perimeter tells what it read")
        review, result = rig.broker.reviews.contexts[-1]
        assert (review, result.step) == (asked.id, 1)
        if result.outcome != "unreached":
            break
        rig.far.arrived.clear()
    return result


def test_what_is_there_is_read_as_policy_lets_the_workspace_read_it_and_shown_beside_the_write(
    rig: Rig, item: Item
) -> None:
    write = opened(rig)
    assert write.readable
    assert rig.far.arrived == [], "nothing is asked before the broker wants it"
    result = read(rig)
    assert (result.outcome, result.answer.status, result.answer.body) == ("read", 200, NOW)
    [seen] = rig.far.arrived
    assert (seen["method"], seen["target"], seen["size"]) == ("GET", ITEM, 0)
    headers = dict(seen["headers"])
    assert (headers["x-api-key"], headers["accept"]) == (SECRET["api-token"], "application/json")
    assert not [name for name in headers if name.startswith(("x-saw-", "x-envoy-"))]
    text = render("ws-1", write.call, state_of(result.answer))
    assert '# 2 changes\n/amount: changed\n- 100\n+ 4711\n/name: removed\n- "rent"\n' in text
    assert SECRET["api-token"] not in text


def test_a_write_whose_place_policy_does_not_let_the_workspace_read_is_not_asked_about(rig: Rig, item: Item) -> None:
    assert not opened(rig, target="/v1/admin/1").readable
    refused = read(rig, "/v1/admin/1")
    assert (refused.outcome, refused.detail.partition(":")[0]) == ("unreadable", "deny_rule")
    assert rig.far.arrived == []
    assert not opened(rig, "POST").readable, "a POST has no state of its own"
    assert opened(rig, "DELETE", body=b"").readable


def test_what_the_far_end_says_instead_of_a_state_is_told_as_what_it_is(rig: Rig, item: Item) -> None:
    item.status, item.body = 404, b"{}"
    assert state_of(read(rig).answer) == StateContext(state="read", status=404)
    item.status = 403
    assert state_of(read(rig).answer).detail == "the far end answered 403"
    item.status, item.media = 200, "text/html"
    assert state_of(read(rig).answer).detail == "what is there is not marked as JSON"
    item.media, item.body = "application/json", json.dumps("x" * 300_000).encode()
    assert state_of(read(rig).answer).detail == "what is there has more than 262144 bytes"
