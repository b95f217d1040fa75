"""The digest of a reviewed call: every byte counts, and no two calls share an encoding."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.review.digest import request_digest
from saw.review.messages import ReviewedCall

CALL = ReviewedCall(
    method="POST", scheme="https", host="api.example.com", port=443, path="/v1/items?a=1",
    headers=(("content-type", "application/json"), ("accept", "*/*")), body=b'{"a": 1}',
)  # fmt: skip


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "changed",
    [
        {"method": "PUT"}, {"scheme": "http"}, {"host": "api.example.co"}, {"port": 8443}, {"path": "/v1/items?a=2"},
        {"headers": ()}, {"headers": CALL.headers[::-1]}, {"headers": (("content-type", "application/json"),)},
        {"headers": (("content-typea", "pplication/json"), ("accept", "*/*"))}, {"body": b'{"a": 1} '}, {"body": b""},
        {"body": b'{"a": 2}'},
    ],
)  # fmt: skip
def test_a_change_anywhere_in_the_call_gives_another_digest(changed: dict[str, Any]) -> None:
    assert request_digest("ws-1", msgspec.structs.replace(CALL, **changed)) != request_digest("ws-1", CALL)
    assert request_digest("ws-1", msgspec.structs.replace(CALL)) == request_digest("ws-1", CALL)


@pytest.mark.control("REV-02")
def test_another_workspace_never_shares_a_digest() -> None:
    assert request_digest("ws-2", CALL) != request_digest("ws-1", CALL)


def test_the_digest_is_the_hash_of_the_length_prefixed_parts_as_documented() -> None:
    parts = [
        b"saw-reviewed-call/1", b"ws-1", b"POST", b"https", b"api.example.com", b"443", b"/v1/items?a=1", b"2",
        b"content-type", b"application/json", b"accept", b"*/*", b'{"a": 1}',
    ]  # fmt: skip
    raw = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    assert request_digest("ws-1", CALL) == hashlib.sha256(raw).hexdigest()


@given(st.binary(max_size=64))
def test_a_call_that_went_over_the_wire_has_the_same_digest(body: bytes) -> None:
    call = msgspec.structs.replace(CALL, body=body)
    assert request_digest("ws-1", msgspec.json.decode(msgspec.json.encode(call), type=ReviewedCall)) == request_digest(
        "ws-1", call
    )
