"""A broker with pages but without network: people whom the provider has let in, two sponsors, and one workspace of each."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from image_rows import put_image
from recorded import record

from databases import installed
from saw.audit import Chain, EventFactory, Head, Subject
from saw.broker.bastion_sessions import SessionRequest
from saw.broker.clock import iso
from saw.broker.config import BrokerConfig
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.delegations import Issue
from saw.broker.forwarding_settings import ForwardingSettings
from saw.broker.job_settings import JobSettings
from saw.broker.perimeter import Shipment
from saw.broker.schema import agents, people, releases, sso_sessions, workspaces
from saw.broker.session_views import key_digest
from saw.broker.sso.pages import pages_app
from saw.broker.sso.sessions import digest_of
from saw.broker.sso_settings import ProviderSettings, SsoSettings
from saw.identity.sealed import SealKey
from saw.policy.delegation import Resource
from saw.review.messages import OpenReview, ReviewedCall
from saw.sessions.messages import Closing, Redeem

START = datetime(2026, 11, 29, 8, tzinfo=UTC)
ORIGIN = "https://saw.example.com:8445"
POLICY, RELEASED = "a" * 64, "b" * 64
OPERATOR = Caller("operator:root", "operator-socket", "request-1")
EDGE, BASTION = Caller("perimeter:edge", "10.77.0.20", "request-2"), Caller("bastion:edge", "10.77.0.20", "request-3")
ROLES: dict[str, tuple[str, ...]] = {
    "ada": ("user",), "ben": ("user",), "cleo": ("approver",), "dan": ("operator",), "eve": ("security",), "fay": ("auditor",),
}  # fmt: skip
"""``ada`` sponsors ``ws-a``, ``ben`` ``ws-b``; the others sponsor nothing."""


class Visitor:
    """A browser in which somebody is signed in (or nobody); follows nothing by itself."""

    def __init__(self, world: World, secret: str = "") -> None:
        self.world = world
        self.headers = {"cookie": f"__Host-saw-session={secret}"} if secret else {}

    def ask(self, method: str, path: str, **how: Any) -> httpx.Response:
        headers = {**self.headers, **how.pop("headers", {})}

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.world.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=ORIGIN) as client:
                return await client.request(method, path, headers=headers, **how)

        return asyncio.run(call())

    def get(self, path: str) -> httpx.Response:
        return self.ask("GET", path)

    def csrf(self) -> str:
        found = re.search(r'name="csrf" content="([^"]+)"', self.get("/reviews").text)
        return found[1] if found else ""

    def post(self, path: str, csrf: str | None = None, **fields: str) -> httpx.Response:
        token = self.csrf() if csrf is None else csrf
        return self.ask("POST", path, data={"csrf": token, **fields}, headers={"origin": ORIGIN})


class World:
    def __init__(
        self,
        directory: Path,
        *,
        operate: bool = False,
        jobs: JobSettings | None = None,
        forwarding: ForwardingSettings | None = None,
        **settings: Any,
    ) -> None:
        self.now = START
        provider = ProviderSettings(issuer="https://idp.example.com", client_id="saw")
        self.config = BrokerConfig(
            "saw.example", str(directory / "s"), str(directory / "o"), ("b.internal",),
            sso=SsoSettings(origin=ORIGIN, provider=provider, roles={"user": ("staff",)}, operate=operate),
            jobs=jobs, forwarding=forwarding, **settings,
        )  # fmt: skip
        self.config = installed(self.config, START)
        self.broker = Broker.open(self.config, lambda: self.now, os.urandom)
        assert self.broker.sso is not None
        self.app = pages_app(self.broker.sso, self.broker)
        self.chain = Chain("edge", Head())
        self.factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: os.urandom(8).hex())
        self.visitors = {name: self.sign_in(name, roles) for name, roles in ROLES.items()}
        put_image(self.broker.services.store, "workspace", "1" * 64)
        self.workspace("ws-a", 1, "Ada@Example.com")
        self.workspace("ws-b", 2, "ben@example.com")

    def close(self) -> None:
        self.broker.close()

    def __getitem__(self, name: str) -> Visitor:
        return self.visitors[name] if name in self.visitors else Visitor(self)

    def sign_in(self, name: str, roles: tuple[str, ...]) -> Visitor:
        """Put down what a sign-in leaves: the provider's word about the person, and a session."""
        secret, person, stamp = os.urandom(16).hex(), f"{name}@example.com", iso(self.now)
        until = iso(self.now + timedelta(hours=12))
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                people.insert().values(
                    name=person, issuer="https://idp", subject=name, groups="[]", roles=msgspec.json.encode(roles).decode(),
                    first_seen_at=stamp, checked_at=stamp, entitled_until=until,
                )
            )  # fmt: skip
            tx.connection.execute(
                sso_sessions.insert().values(
                    secret_sha256=digest_of(secret), id=f"ss-{name}", person=person, kind="browser", provider_sid="",
                    auth_time=stamp, created_at=stamp, seen_at=stamp, checked_at=stamp, expires_at=until,
                )
            )  # fmt: skip
        return Visitor(self, secret)

    def terminal(self, name: str) -> Visitor:
        """Have somebody signed in on the command line too."""
        secret, stamp = os.urandom(16).hex(), iso(self.now)
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                sso_sessions.insert().values(
                    secret_sha256=digest_of(secret), id=f"cli-{name}", person=f"{name}@example.com", kind="cli",
                    provider_sid="", auth_time=stamp, created_at=stamp, seen_at=stamp, checked_at=stamp,
                    expires_at=iso(self.now + timedelta(hours=12)),
                )
            )  # fmt: skip
        visitor = Visitor(self)
        visitor.headers = {"authorization": f"Bearer {secret}"}
        return visitor

    def workspace(self, name: str, number: int, sponsor: str, **changes: Any) -> None:
        """Put down what creation and attestation leave."""
        stamp = iso(self.now)
        values = {
            "id": name, "number": number, "sponsor": sponsor, "blueprint": "coding", "ring": "stable", "image": "workspace",
            "image_sha256": "1" * 64, "agent_id": f"agent-{number}", "state": "active", "state_reason": "attested",
            "state_since": stamp, "created_at": stamp, "watch_seq": 0, "policy_digest": POLICY, "attested_at": stamp,
            "lease_expires_at": iso(self.now + timedelta(hours=1)), **changes,
        }  # fmt: skip
        agent = {
            "workspace_id": name,
            "sponsor": sponsor,
            "blueprint": "coding",
            "state": "active",
            "created_at": stamp,
        }
        with self.broker.services.store.write() as tx:
            tx.connection.execute(workspaces.insert().values(**values))
            tx.connection.execute(agents.insert().values(id=values["agent_id"], name=values["agent_id"], **agent))

    def release(self, digest: str, revision: int = 1) -> None:
        """Put down a release of ring ``stable`` that is open to everybody."""
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                releases.insert().values(
                    ring="stable", blueprint="coding", revision=revision, policy_digest=digest, bundle=b"", lease_ttl_s=90,
                    released_at=iso(self.now),
                )
            )  # fmt: skip

    def delegation(self, workspace: str, task: str = "tidy the notes", parent: str = "") -> str:
        resource = Resource("api.example.com", methods=("GET",), paths=("/v1/notes",))
        wanted = Issue(workspace_id=workspace, task=task, resources=(resource,), duration_s=3600, parent=parent)
        return str(self.broker.delegations.issue(OPERATOR, wanted)["id"])

    def session(self, workspace: str, command: str = "", person: str = "", *, closed: str = "") -> str:
        """Open a session as a recorder does; ``closed`` is the digest of its recording when it has ended."""
        key = Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        who = {"person": f"{person}@example.com", "sign_in": f"ss-{person}"} if person else {}
        session = str(self.broker.sessions.request(OPERATOR, SessionRequest(workspace, key), **who)["session_id"])
        self.broker.sessions.redeem(BASTION, Redeem(session, key_digest(key), "192.0.2.7", key, command=command))
        if closed:
            self.broker.sessions.close(BASTION, session, Closing("closed", digest=closed, exit_code=0))
        return session

    def recorded(self, workspace: str, file: Path, said: str) -> str:
        """Have a session that is over, and whose recording the bastion has handed in."""
        session = self.session(workspace)
        key = SealKey(bytes.fromhex(self.broker.sessions.recording_key(OPERATOR, session)["key"]), os.urandom)
        self.broker.sessions.close(BASTION, session, record(file, session, key, said))

        raw = file.read_bytes()

        async def pieces() -> AsyncIterator[bytes]:
            yield raw

        asyncio.run(self.broker.recordings.receive(BASTION, session, pieces()))
        return session

    def review(self, workspace: str) -> str:
        call = ReviewedCall(
            method="POST",
            scheme="https",
            host="api.example.com",
            port=443,
            path="/v1/notes",
            headers=(),
            body=os.urandom(8),
        )
        asked = OpenReview(
            workspace_id=workspace, call=call, policy_digest=POLICY, group="maintainers", quorum=1, expires_in_s=3600,
            request_id="call-1",
        )  # fmt: skip
        return self.broker.reviews.open(EDGE, asked).id

    def charge(self, workspace: str, spent: int, scope: str = "workspace", **changes: Any) -> None:
        """Ship what a gatekeeper says of a call that cost ``spent`` cents, out of a budget of five dollars a day."""
        subject = {"workspace": workspace, "engagement": f"{workspace}/-", "blueprint": "coding"}[scope]
        said = {
            "charge": os.urandom(8).hex(), "id": f"coding/{scope}", "state": "settled", "scope": scope, "subject": subject,
            "period": "day", "start": "2026-11-29", "end": "2026-11-30", "currency": "USD", "limit": 5_000_000, "model": "m",
            "service": "s", "blueprint": "coding", "engagement": "", "at": "2026-11-29T07:00:00Z", "reserved": 0,
            "spent": spent * 10_000, "metered": True, **changes,
        }  # fmt: skip
        event = self.factory.http_activity(
            self.now, Subject(workspace=workspace, request_id="r-1"), method="POST", scheme="https", host="inference.local",
            port=443, path="/v1", allowed=True, detail={"budget": said},
        )  # fmt: skip
        self.broker.views.accept_events(EDGE, Shipment("edge", (self.chain.append(event),)))

    def state(self, workspace: str) -> str:
        return str(self.broker.registry.show(workspace)["state"])

    def audited(self, operation: str) -> list[tuple[str, str]]:
        """Return principal and status of the calls that the trail has under this name."""
        events = [item.event for item in self.broker.trail.page("broker", 0, 1000)["events"]]
        return [
            (event["unmapped"]["saw"]["principal"], event["status"])
            for event in events
            if event.get("api", {}).get("operation") == operation
        ]


class Outline(HTMLParser):
    """What of a page matters to those who do not see it, and to a browser that runs nothing of others."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.problems: list[str] = []
        self.labelled: set[str] = set()
        self.fields: list[str] = []
        self.open: list[str] = []
        self.captioned = True
        self.feed(text)
        self.problems += [f"field {one} has no label" for one in self.fields if one not in self.labelled]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.problems += [f"<{tag} {name}>" for name in found if name.startswith("on") or name == "style"]
        if tag == "script" and not str(found.get("src", "")).startswith("/static/"):
            self.problems.append("a script that is not ours")
        if tag == "meta" and "http-equiv" in found:
            self.problems.append("a page that goes on by itself")
        if tag == "label":
            self.labelled.add(str(found.get("for")))
        if tag in {"input", "select", "textarea"} and found.get("type") != "hidden":
            self.fields.append(str(found.get("id")))
        if tag == "table":
            self.captioned = False
        if tag == "caption":
            self.captioned = True
        if tag == "tbody" and not self.captioned:
            self.problems.append("a table without a caption")
        if tag == "th" and "scope" not in found:
            self.problems.append("a head cell without a scope")
