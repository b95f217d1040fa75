"""A broker without network whose clock the test moves, workspaces that are active, and reviewers with keys."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from image_rows import put_image

from databases import installed
from saw.broker.clock import iso
from saw.broker.config import BrokerConfig
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import BrokerError
from saw.broker.review_decisions import AskNonce
from saw.broker.review_evidence import Decide
from saw.broker.reviewers import Reviewer
from saw.broker.schema import agents, workspaces
from saw.policy.keys import public_pem
from saw.review.messages import Claimed, OpenReview, ReviewedAnswer, ReviewedCall, ReviewResult, ReviewView
from saw.review.statement import ReviewStatement, encode_statement, sign_review

START = datetime(2026, 11, 26, 8, tzinfo=UTC)
POLICY = "a" * 64
OPERATOR = Caller("operator:root", "operator-socket", "request-1")
EDGE = Caller("perimeter:edge", "10.77.0.20", "request-2")
OTHER_EDGE = Caller("perimeter:other", "10.77.0.21", "request-3")
ANSWER = ReviewedAnswer(status=201, headers=(("content-type", "text/plain"),), body=b"as the far end wrote it")
SECRET = b"transfer 4711 to the account of team A"


def call(body: bytes = SECRET, **changes: Any) -> ReviewedCall:
    fields = {
        "method": "POST",
        "scheme": "https",
        "host": "api.example.com",
        "port": 443,
        "path": "/v1/notes?account=team-a",
    }
    return ReviewedCall(**{**fields, "headers": (("content-type", "text/plain"),), "body": body, **changes})


def refused(code: str, status: int = 0) -> Any:
    """Expect a refusal with ``code``."""

    class Expected:
        def __enter__(self) -> None:
            return None

        def __exit__(self, _kind: object, error: object, _trace: object) -> bool:
            assert isinstance(error, BrokerError), error
            assert error.code == code, error
            assert not status or error.status == status
            return True

    return Expected()


class World:
    """``ada`` sponsors the workspaces; ``ben``, ``cleo`` and ``ada`` are maintainers."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.now = START
        self.config = BrokerConfig(
            "saw.example", str(directory / "state"), str(directory / "o.sock"), ("b.saw.internal",), **settings
        )
        self.config = installed(self.config, self.now)
        self.keys = {name: Ed25519PrivateKey.generate() for name in ("ada", "ben", "cleo")}
        self.open_broker()
        put_image(self.broker.services.store, "i", "1" * 64)
        for name in self.keys:
            self.reviewer(name)
        for number, name in enumerate(("ws-a", "ws-b"), 1):
            self.workspace(name, number)

    def open_broker(self) -> None:
        self.broker = Broker.open(self.config, lambda: self.now, os.urandom)

    def crash(self) -> None:
        """Open the database again as after a crash: nothing but what was written is there."""
        self.broker.services.store.close()
        self.open_broker()

    def later(self, **time: float) -> None:
        self.now += timedelta(**time)

    def reviewer(self, name: str, *groups: str) -> dict[str, Any]:
        pem = public_pem(self.keys[name].public_key()).decode()
        return self.broker.reviewers.put(OPERATOR, name, Reviewer(groups=groups or ("maintainers",), public_key=pem))

    def workspace(self, name: str, number: int) -> None:
        stamp = iso(self.now)
        values = {"sponsor": "Ada", "blueprint": "coding", "ring": "stable", "image": "i", "image_sha256": "1" * 64}
        values |= {"state_reason": "test", "state_since": stamp, "created_at": stamp, "watch_seq": 0}
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                workspaces.insert().values(
                    id=name, number=number, agent_id=f"agent-{number}", state="active", policy_digest=POLICY, **values
                )
            )
            tx.connection.execute(
                agents.insert().values(
                    id=f"agent-{number}",
                    name=f"agent-{number}",
                    workspace_id=name,
                    sponsor="Ada",
                    blueprint="coding",
                    state="active",
                    created_at=stamp,
                )
            )
        self.set(name, lease_expires_at=iso(self.now + timedelta(days=60)))

    def set(self, name: str, **values: Any) -> None:
        """Write something of a workspace that its attestation would."""
        with self.broker.services.store.write() as tx:
            tx.connection.execute(workspaces.update().where(workspaces.c.id == name).values(**values))

    def open(self, body: bytes = SECRET, caller: Caller = EDGE, **changes: Any) -> ReviewView:
        fields = {
            "workspace_id": "ws-a",
            "call": call(body),
            "policy_digest": POLICY,
            "group": "maintainers",
            "quorum": 1,
            "expires_in_s": 3600,
            "request_id": "call-1",
        }
        return self.broker.reviews.open(caller, OpenReview(**{**fields, **changes}))

    def view(self, identifier: str, workspace: str = "ws-a", caller: Caller = EDGE) -> ReviewView:
        return self.broker.reviews.view(caller, identifier, workspace)[0]

    def statement(self, identifier: str, by: str, decision: str = "approve", **changes: Any) -> ReviewStatement:
        shown = self.broker.decisions.show(identifier)
        fields = {
            "review": identifier,
            **{name: shown[name] for name in ("request_digest", "render_digest", "policy_digest")},
            "decision": decision,
            "approver": by,
            "nonce": "A" * 43,
            "not_after": shown["expires_at"],
        }
        return msgspec.convert({**fields, **changes}, ReviewStatement)

    def decide(
        self, identifier: str, by: str, decision: str = "approve", *, key: str = "", nonce: str = "", **changes: Any
    ) -> dict[str, Any]:
        """Take a nonce, sign, hand in."""
        nonce = nonce or self.broker.decisions.nonce(identifier, AskNonce(by))["nonce"]
        return self.hand_in(self.statement(identifier, by, decision, nonce=nonce, **changes), key or by)

    def hand_in(self, said: ReviewStatement, key: str, identifier: str = "") -> dict[str, Any]:
        signed = Decide(encode_statement(said).decode(), sign_review(said, self.keys[key]))
        return self.broker.decisions.decide(OPERATOR, identifier or said.review, signed)

    def approved(self, **changes: Any) -> str:
        identifier = self.open(**changes).id
        assert self.decide(identifier, "ben")["state"] == "approved"
        return identifier

    def claim(self, caller: Caller = EDGE) -> Claimed | None:
        return self.broker.reviews.claim(caller).claimed

    def tell(self, claimed: Claimed, outcome: str = "done", caller: Caller = EDGE, **changes: Any) -> ReviewView:
        answer = ANSWER if outcome == "done" else None
        told = ReviewResult(**{"claim": claimed.claim, "outcome": outcome, "answer": answer, **changes})
        return self.broker.reviews.result(caller, claimed.id, told)

    def events(self, identifier: str) -> list[dict[str, Any]]:
        page = self.broker.trail.page("broker", 0, 1000)["events"]
        return [item.event for item in page if item.event.get("entity", {}).get("uid") == identifier]
