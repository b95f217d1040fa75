"""A broker with a released policy that lets people decide on tools over stdio, and two workspaces that ask."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from review_world import START, World

from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.schema import releases
from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.loader import load_members
from saw.review.tool import AskTool, ClaimTool, EndTool, ToolView, params_of

PIN = f"sha256:{'7' * 64}"
POLICY_YAML = b"""
version: 1
filesystem_policy: {read_only: [/usr, /etc]}
network_policies:
  tracker:
    binaries: [{path: /usr/bin/node}]
    endpoints:
      - host: tracker.example.com
        port: 443
        path: /mcp
        protocol: mcp
        mcp: {allow_all_known_mcp_methods: true, versions: ["2025-06-18"]}
"""
GOVERNANCE_YAML = f"""
schema: 1
blueprint: {{name: coding, version: 1.0.0, owner: maintainers}}
mcp:
  servers:
    files:
      transport: stdio
      command: [/usr/bin/files, --root, /workspace]
      tools:
        read: {{class: auto, args: {{path: {{under: /workspace, required: true}}}}}}
        publish:
          class: review
          definition: {PIN}
          args: {{path: {{under: /workspace, required: true}}, text: {{max_length: 4000}}}}
        erase: {{class: deny}}
        move: {{class: review, args: {{to: {{max_length: 99}}}}}}
        ship: {{class: review, reviewers: {{group: maintainers, quorum: 2}}, expires: 2h}}
    tracker:
      transport: http
      url: https://tracker.example.com/mcp
      tools:
        move: {{class: review, args: {{to: {{max_length: 99}}}}}}
""".encode()
MEMBERS = {"policy.yaml": POLICY_YAML, "governance.yaml": GOVERNANCE_YAML}
ME = Caller("workspace:ws-a", "10.77.0.9", "request-4")
NEIGHBOUR = Caller("workspace:ws-b", "10.77.0.8", "request-5")
MINE, ANOTHER = "A" * 43, "B" * 43
ANSWER = "9" * 64
PARAMS = params_of("publish", {"path": "/workspace/notes", "text": "ready"})


class ToolWorld(World):
    """``ben`` and ``cleo`` are maintainers, who own the blueprint and so decide."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        bundle = load_members(MEMBERS)
        manifest = build_manifest(bundle, 1, START, START + timedelta(days=90))
        self.digest = policy_digest(manifest)
        super().__init__(directory, **settings)
        with self.broker.services.store.write() as tx:
            tx.connection.execute(
                releases.insert().values(
                    ring="stable", blueprint="coding", revision=1, policy_digest=self.digest, lease_ttl_s=90,
                    bundle=sign(manifest, bundle.members, [Ed25519PrivateKey.generate()]), released_at=iso(START),
                )
            )  # fmt: skip
        for name in ("ws-a", "ws-b"):
            self.set(name, policy_digest=self.digest)

    def ask(self, params: bytes = PARAMS, caller: Caller = ME, **changes: Any) -> ToolView:
        fields = {"workspace_id": "ws-a", "policy_digest": self.digest, "server": "files", "params": params}
        return self.broker.tools.ask(caller, AskTool(**{**fields, **changes}))

    def agreed(self, params: bytes = PARAMS, **changes: Any) -> str:
        identifier = self.ask(params, **changes).id
        assert self.decide(identifier, "ben")["state"] == "approved"
        return identifier

    def begin(
        self, identifier: str, claim: str = MINE, params: bytes = PARAMS, caller: Caller = ME, **changes: Any
    ) -> ToolView:
        fields = {"workspace_id": "ws-a", "policy_digest": self.digest, "server": "files", "params": params}
        return self.broker.tools.claim(caller, identifier, ClaimTool(**{**fields, "claim": claim, **changes}))

    def end(self, identifier: str, outcome: Any = "done", claim: str = MINE, caller: Caller = ME) -> ToolView:
        answer = ANSWER if outcome == "done" else ""
        told = EndTool(workspace_id="ws-a", claim=claim, outcome=outcome, answer_sha256=answer)
        return self.broker.tools.result(caller, identifier, told)

    def look(self, identifier: str, caller: Caller = ME, workspace: str = "ws-a") -> ToolView:
        return self.broker.tools.view(caller, identifier, workspace)
