"""How a reviewer's own machine looks at a call and decides: it shows and digests the bytes itself, then signs."""

from __future__ import annotations

from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from saw.errors import SawError
from saw.policy.keys import key_id
from saw.policy.signers import Signer
from saw.review.digest import request_digest
from saw.review.gate import GateRequest, check_gate, gate_digest, render_gate
from saw.review.messages import ReviewedCall
from saw.review.render import context_kind, render
from saw.review.statement import (
    AFTER,
    Decision,
    ReviewStatement,
    encode_statement,
    render_digest,
    sign_review,
)
from saw.review.tool import ReviewedTool, render_tool, tool_digest

_LOOKS = 3


class Client(Protocol):
    """The operator's client of the broker (:class:`saw.broker.client.OperatorClient`)."""

    def request(self, method: str, path: str, json: object | None = None) -> dict[str, Any]:
        """Call the broker and return its answer."""
        ...


class ShownOtherwise(SawError):
    """What the broker says of a call is not what this machine makes of the same bytes."""

    code = "rendering_differs"


class NoReviewer(SawError):
    """The key belongs to no active reviewer."""

    code = "not_a_reviewer"


class Seen(msgspec.Struct, frozen=True):
    """A review as the broker tells it, what it is about, and the digest and the text that this machine makes of that."""

    told: dict[str, Any]
    content: ReviewedCall | GateRequest | ReviewedTool
    digest: str
    rendering: str

    @property
    def body(self) -> bytes:
        """The exact body of the call, the parameters of a tool, or the statement of a gate in canonical form."""
        if isinstance(self.content, ReviewedTool):
            return self.content.params
        return self.content.body if isinstance(self.content, ReviewedCall) else check_gate(self.content.statement)


def review_path(identifier: str) -> str:
    """Return the path of a review in the operator API."""
    return f"/v1/reviews/{quote(identifier, safe='')}"


def look(client: Client, identifier: str) -> Seen:
    """Return a review whose bytes are kept; raise :class:`ShownOtherwise` when this machine makes something else of them."""
    for _ in range(_LOOKS - 1):
        seen = _look(client, identifier)
        # What the far end told meanwhile may have come between the two answers.
        if (seen.digest, seen.rendering) == (seen.told["request_digest"], seen.told["rendering"]):
            return seen
    seen = _look(client, identifier)
    if (seen.digest, seen.rendering) != (seen.told["request_digest"], seen.told["rendering"]):
        raise ShownOtherwise(
            f"this machine and the broker show {identifier[:64]} differently",
            cure="use the version of saw that the broker has",
        )
    return seen


def _look(client: Client, identifier: str) -> Seen:
    told = client.request("GET", review_path(identifier))
    raw = client.request("GET", f"{review_path(identifier)}/call")
    content: ReviewedCall | GateRequest | ReviewedTool
    if told["kind"] == "gate":
        content = msgspec.convert(raw["gate"], GateRequest)
        digest, rendering = gate_digest(told["perimeter"], content.statement), render_gate(told["perimeter"], content)
    elif told["kind"] == "tool":
        content = msgspec.convert(raw["tool"], ReviewedTool)
        digest, rendering = tool_digest(told["workspace_id"], content), render_tool(told["workspace_id"], content)
    else:
        content = msgspec.convert(raw["call"], ReviewedCall)
        kind = context_kind(content)
        context = None if kind is None or raw["context"] is None else msgspec.convert(raw["context"], kind)
        digest = request_digest(told["workspace_id"], content)
        rendering = render(told["workspace_id"], content, context)
    return Seen(told, content, digest, rendering)


def reviewer_of(client: Client, signer: Signer) -> str:
    """Return the name of the active reviewer whose key ``signer`` has; raise :class:`NoReviewer` when there is none."""
    mine = key_id(signer.public_key())
    for one in client.request("GET", "/v1/reviewers")["reviewers"]:
        if one["key_id"] == mine and one["state"] == "active":
            return str(one["name"])
    raise NoReviewer(f"the key {mine[:16]}… is no active reviewer's", cure="saw review reviewer add registers one")


def ends_at(decision: Decision, told: dict[str, Any], given: dict[str, Any]) -> str:
    """Return when ``decision`` ceases to count, of a review as it was told and a nonce as it was given."""
    if decision == "break_glass":
        return str(given.get("break_glass_until", told["expires_at"]))
    return str(given["after_review_until"] if decision in AFTER else told["expires_at"])


def decide(client: Client, seen: Seen, signer: Signer, decision: Decision, comment: str = "") -> dict[str, Any]:
    """Take a nonce, sign ``decision`` about what was seen, hand it in, and return the broker's answer."""
    path, name = review_path(seen.told["id"]), reviewer_of(client, signer)
    given = client.request("POST", f"{path}/nonce", {"approver": name})
    statement = ReviewStatement(
        review=seen.told["id"],
        request_digest=seen.digest,
        render_digest=render_digest(seen.rendering),
        policy_digest=seen.told["policy_digest"],
        decision=decision,
        approver=name,
        nonce=given["nonce"],
        not_after=ends_at(decision, seen.told, given),
        comment=comment,
    )
    body = {"statement": encode_statement(statement).decode(), "signature": sign_review(statement, signer)}
    return client.request("POST", f"{path}/decide", body)
