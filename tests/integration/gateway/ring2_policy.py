"""Signed releases for tests, made with the product's own signing and repository code."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Metadata, Root

from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.loader import load_members

POLICY = """
version: 1
network_policies:
  api:
    endpoints:
      - host: api.example.com
        port: 443
        protocol: rest
        rules:
          - allow: {method: GET, path: "/v1/**"}
          - allow: {method: POST, path: /v1/notes}
          - allow: {method: POST, path: "/v1/items/**"}
          - allow: {method: POST, path: /v1/orders}
        deny_rules:
          - {method: GET, path: "/v1/admin/**"}
      - host: api.example.com
        port: 8080
        protocol: rest
        rules:
          - allow: {method: GET, path: "/plain/**"}
      - host: "*.wild.example.com"
        port: 443
        protocol: rest
        access: read-only
    binaries: [{path: /usr/bin/curl}]
  git:
    endpoints:
      - host: git.example.com
        port: 443
        protocol: rest
        rules:
          - allow: {method: GET, path: "/team/**/info/refs"}
          - allow: {method: POST, path: "/team/**/git-receive-pack"}
    binaries: [{path: /usr/bin/git}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
plaintext: ["api.example.com:8080"]
credentials:
  - {id: api-token, ref: "local:api-token", hosts: ["api.example.com:443"], paths: ["/v1/**"],
     inject: {header: X-Api-Key, format: "{secret}"}}
  - {id: git-token, ref: "local:git-token", hosts: ["git.example.com:443"], paths: ["/team/**"],
     inject: {header: Authorization, format: "Basic {b64:x-access-token:{secret}}"}}
  - {id: model-key, ref: "local:model-key", inject: {header: Authorization, format: "Bearer {secret}"}}
inference:
  routes: [{alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/api/v1", credential: model-key}]
actions:
  - {match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/agent/**"}}, class: staged}
  - {match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/docs"}}, class: review, expires: 2h,
     reviewers: {group: writers}}
  - {match: {host: git.example.com, git: {service: receive-pack}}, class: review, reviewers: {group: maintainers}}
  - {match: {host: api.example.com, method: [POST], path: /v1/notes}, class: auto}
  - {match: {host: api.example.com, method: [POST], path: /v1/orders}, class: review, expires: 2h,
     reviewers: {group: buyers, quorum: 2}}
"""


class Signer:
    """Two officers, the TUF root that names them, and releases signed by both."""

    def __init__(self, directory: Path, now: datetime) -> None:
        directory.mkdir()
        self._now = now
        self.keys = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.root_file = directory / "root.json"
        root = Root(version=1, spec_version="1.0.31", expires=now.replace(microsecond=0) + timedelta(days=365))
        for index, key in enumerate([*self.keys, Ed25519PrivateKey.generate()]):
            public = SSlibKey.from_crypto(key.public_key())
            for role in ("root", "targets") if index < 3 else ("snapshot", "timestamp"):
                root.add_key(public, role)
        root.roles["root"].threshold = root.roles["targets"].threshold = 2
        metadata = Metadata(root)
        for key in self.keys:
            metadata.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key())), append=True)
        self.root_file.write_bytes(metadata.to_bytes())

    def release(
        self, revision: int, *, signers: int = 2, policy: str = POLICY, days: int = 30, lease: str = ""
    ) -> tuple[str, bytes]:
        """Return digest and bundle of a revision of ``policy``; ``lease`` is that field of its governance."""
        governance = GOVERNANCE + (f"lease: {lease}\n" if lease else "")
        bundle = load_members({"policy.yaml": policy.encode(), "governance.yaml": governance.encode()})
        start = self._now - timedelta(days=60)
        manifest = build_manifest(bundle, revision, start, self._now + timedelta(days=days))
        return policy_digest(manifest), sign(manifest, bundle.members, self.keys[:signers])
