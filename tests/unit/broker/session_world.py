"""A broker whose clock the test moves, with one active workspace and one person who signed in."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from databases import installed
from saw.broker.bastion_sessions import SessionRequest
from saw.broker.clock import iso
from saw.broker.config import BrokerConfig, SessionRules
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.schema import people, sso_sessions, workspaces
from saw.broker.session_views import key_digest
from saw.sessions.messages import Redeem

START = datetime(2026, 11, 28, tzinfo=UTC)
OPERATOR, EDGE = Caller("operator:root", "local", "r"), Caller("bastion:edge", "192.0.2.1", "r")
ADA = "ada@example.com"
RULES = SessionRules(lease_s=10, max_duration_s=600)


class World:
    def __init__(self, directory: Path, rules: SessionRules = RULES, **settings: Any) -> None:
        self.now = START
        config = BrokerConfig(
            "saw.example", str(directory / "s"), str(directory / "o"), ("b.internal",), sessions=rules, **settings
        )
        self.config = installed(config, START)
        self.start()
        stamp = iso(START)
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                workspaces.insert().values(
                    id="ws-a", number=1, sponsor=ADA, blueprint="coding", ring="stable", image="i", image_sha256="1" * 64,
                    agent_id="agent-1", state="active", state_reason="t", state_since=stamp, created_at=stamp, watch_seq=0,
                )
            )  # fmt: skip
            tx.connection.execute(
                people.insert().values(
                    name=ADA, issuer="https://idp", subject="1", groups="[]", roles='["user"]', first_seen_at=stamp,
                    checked_at=stamp, entitled_until=iso(START + timedelta(days=1)),
                )
            )  # fmt: skip
            tx.connection.execute(
                sso_sessions.insert().values(
                    secret_sha256="1" * 64, id="ss-1", person=ADA, kind="cli", provider_sid="", auth_time=stamp,
                    created_at=stamp, seen_at=stamp, checked_at=stamp, expires_at=iso(START + timedelta(days=1)),
                )
            )  # fmt: skip

    def start(self) -> None:
        self.broker = Broker.open(self.config, lambda: self.now, os.urandom)
        self.sessions = self.broker.sessions

    def open(self, **who: str) -> str:
        key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        session = str(self.sessions.request(OPERATOR, SessionRequest("ws-a", key), **who)["session_id"])
        self.sessions.redeem(EDGE, Redeem(session, key_digest(key), "192.0.2.7", key))
        return session

    def passes(self, seconds: float, *kept: str) -> None:
        """Let time pass in which the bastion asks about the sessions ``kept``."""
        end = self.now + timedelta(seconds=seconds)
        while self.now < end:
            self.now = min(end, self.now + timedelta(seconds=5))
            for session in kept:
                self.sessions.watch(EDGE, session)
            self.sessions.tick()

    def state(self, session: str) -> tuple[str, str | None]:
        found = self.sessions.show(session)
        return found["state"], found["reason"]
