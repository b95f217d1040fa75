"""A broker with a released policy for two workspaces, whose agents ask for more than it allows."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from review_world import OPERATOR, START, World

from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.policy_request_views import AnsweredRequest, AnswerRequest
from saw.broker.schema import metadata, releases
from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.loader import load_members
from saw.policy.policy_request import Asked, AskMore

POLICY_YAML = """
version: 1
filesystem_policy: {read_only: [/usr, /etc]}
network_policies:
  api:
    binaries: [{path: /usr/bin/curl}]
    endpoints:
      - host: api.example.com
        port: 443
        protocol: rest
        rules: [{allow: {method: GET, path: "/v1/**"}}, {allow: {method: POST, path: /v1/notes}}MORE]
"""
GOVERNANCE_YAML = b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: maintainers}
credentials:
  - {id: key, ref: "file:the-secret-place", hosts: ["api.example.com:443"], inject: {header: X-Key, format: "{secret}"}}
"""
ME = Caller("workspace:ws-a", "10.77.0.9", "request-4")
NEIGHBOUR = Caller("workspace:ws-b", "10.77.0.8", "request-5")
_OURS = {"policy_requests", "audit_events", "audit_heads", "audit_covered", "registry", "notifications"}


def ask_more(**changes: Any) -> AskMore:
    fields = {
        "workspace_id": "ws-a", "policy_digest": "a" * 64, "host": "api.example.com", "port": 443, "scheme": "https",
        "method": "GET", "path": "/v2/list", "program": "/usr/bin/curl", "reason": "the task names this list",
    }  # fmt: skip
    return msgspec.convert({**fields, **changes}, AskMore)


class RequestWorld(World):
    """``ws-a`` and ``ws-b`` are active under the first of two releases."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(directory, **settings)
        self.digest = self.release(1)
        for name in ("ws-a", "ws-b"):
            self.set(name, policy_digest=self.digest)

    def release(self, revision: int, more: str = "") -> str:
        """Put down a release; ``more`` are rules on top."""
        members = {"policy.yaml": POLICY_YAML.replace("MORE", more).encode(), "governance.yaml": GOVERNANCE_YAML}
        bundle = load_members(members)
        manifest = build_manifest(bundle, revision, START, START + timedelta(days=90))
        digest = policy_digest(manifest)
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                releases.insert().values(
                    ring="stable", blueprint="coding", revision=revision, policy_digest=digest, lease_ttl_s=90,
                    bundle=sign(manifest, bundle.members, [Ed25519PrivateKey.generate()]), released_at=iso(START),
                )
            )  # fmt: skip
        return digest

    def ask(self, caller: Caller = ME, **changes: Any) -> Asked:
        return self.broker.policy_requests.ask(caller, ask_more(**{"policy_digest": self.digest, **changes}))

    def answer(
        self, identifier: str, decision: str = "accept", comment: str = "it fits", by: Caller = OPERATOR
    ) -> AnsweredRequest:
        body = msgspec.convert({"decision": decision, "comment": comment}, AnswerRequest)
        return self.broker.policy_requests.answer(by, identifier, body)

    def told(self, identifier: str = "") -> list[dict[str, Any]]:
        """Return the events about requests (of one), the oldest first."""
        page = self.broker.trail.page("broker", 0, 1000)["events"]
        found = [
            one.event for one in page if str(one.event.get("api", {}).get("operation", "")).startswith("policy.request")
        ]
        return [one for one in found if not identifier or one["resources"][0]["uid"] == identifier]

    def everything_else(self) -> dict[str, list[tuple[Any, ...]]]:
        """Return each table but those of requests, messages and the trail: what decides about calls is among them."""
        with self.broker.services.store.read() as connection:
            return {
                name: sorted((tuple(row) for row in connection.execute(table.select())), key=repr)
                for name, table in metadata.tables.items()
                if name not in _OURS
            }
