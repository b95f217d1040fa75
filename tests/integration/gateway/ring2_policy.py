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
          - allow: {method: PUT, path: "/v1/items/**"}
          - allow: {method: DELETE, path: "/v1/items/**"}
          - allow: {method: PUT, path: "/v1/admin/**"}
          - allow: {method: POST, path: /v1/orders}
          - allow: {method: GET, path: "/store/**"}
          - allow: {method: PUT, path: "/store/**"}
        deny_rules:
          - {method: GET, path: "/v1/admin/**"}
      - {host: api.example.com, port: 443, path: /graphql, protocol: graphql, access: read-write,
         deny_rules: [{operation_type: "*", fields: [secret]}]}
      - {host: api.example.com, port: 443, path: /rpc, protocol: json-rpc, rules: [{allow: {method: reports.list}}]}
      - {host: api.example.com, port: 443, path: /mcp, protocol: mcp, mcp: {max_body_bytes: 2048},
         rules: [{allow: {method: tools/call, tool: "search_*"}}, {allow: {method: tools/list}}]}
      - {host: api.example.com, port: 443, path: /tools, protocol: mcp, mcp: {allow_all_known_mcp_methods: true}}
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
          - allow: {method: POST, path: "/team/**/git-upload-pack"}
    binaries: [{path: /usr/bin/git}]
"""
STREAMS = (
    POLICY
    + """
  streams:
    endpoints:
      - {host: api.example.com, port: 9443, protocol: websocket, rules: [
          {allow: {method: GET, path: "/**"}}, {allow: {method: WEBSOCKET_TEXT, path: "/rooms/**"}}]}
    binaries: [{path: /usr/bin/curl}]
"""
)
"""The policy with a service that takes WebSockets."""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
plaintext: ["api.example.com:8080"]
credentials:
  - {id: api-token, ref: "local:api-token", hosts: ["api.example.com:443"], paths: ["/v1/**"],
     inject: {header: X-Api-Key, format: "{secret}"}}
  - {id: git-token, ref: "local:git-token", hosts: ["git.example.com:443"], paths: ["/team/**"],
     inject: {header: Authorization, format: "Basic {b64:x-access-token:{secret}}"}}
  - {id: store-keys, ref: "file:store/{sponsor}", hosts: ["api.example.com:443"], paths: ["/store/keys/**"],
     sigv4: {service: s3, region: eu-central-1}}
  - {id: store-token, ref: "file:token/{sponsor}", hosts: ["api.example.com:443"], paths: ["/store/tokens/**"], methods: [GET],
     oauth2: {token_url: "https://api.example.com/oauth2/token", client_id: agents},
     inject: {header: Authorization, format: "Bearer {secret}"}}
  - {id: vault-key, ref: "vault:secret/keys/{sponsor}", hosts: ["api.example.com:443"], paths: ["/store/vault/**"],
     inject: {header: X-Api-Key, format: "{secret}"}}
  - {id: model-key, ref: "local:model-key", inject: {header: Authorization, format: "Bearer {secret}"}}
inference:
  routes: [{alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/api/v1", credential: model-key}]
mcp:
  servers:
    web: {transport: http, url: "https://api.example.com/mcp", tools: {
      search_web: {class: auto, args: {q: {max_length: 9}},
        definition: "sha256:f9dfd0710002e75c25ba6d0dfff12b13e0fd9e2eb9ba958c22a02fe89cdafa79"}}}
    docs:
      transport: http
      url: https://api.example.com/tools
      tools:
        read: {class: auto, args: {path: {under: /srv/docs, required: true}}}
        publish: {class: review, args: {path: {under: /srv/docs, required: true}, tags: {type: array, items: {regex: "[a-z]+"}}}}
        announce: {class: review, args: {text: {max_length: 9}},
          definition: "sha256:5a7f838cbb280119b6783397606d60c4d7a345f795689a8be42a22a7f24d4b25"}
actions:
  - {match: {host: git.example.com, method: [POST], path: "/team/asked.git/git-upload-pack"}, class: review,
     reviewers: {group: maintainers}}
  - {match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/agent/**"}}, class: staged}
  - {match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/docs"}}, class: review, expires: 2h,
     reviewers: {group: writers}}
  - {match: {host: git.example.com, git: {service: receive-pack}}, class: review, reviewers: {group: maintainers}}
  - {match: {host: api.example.com, method: [POST], path: /v1/notes}, class: auto}
  - {match: {host: api.example.com, method: [PUT], path: "/store/**"}, class: auto}
  - {match: {host: api.example.com, json_rpc: {}}, class: auto}
  - {match: {host: api.example.com, mcp: {}}, class: auto}
  - {match: {host: api.example.com, graphql: {operation_type: [mutation], fields: [note]}}, class: auto}
  - {match: {host: api.example.com, method: [POST], path: /v1/orders}, class: review, expires: 2h,
     reviewers: {group: buyers, quorum: 2}}
"""
STREAMS_GOVERNANCE = GOVERNANCE.replace(
    "inference:",
    """  - {id: room-token, ref: "local:room-token", hosts: ["api.example.com:9443"], paths: ["/rooms/**"],
     inject: {header: X-Api-Key, format: "{secret}"}}
inference:""",
).replace(
    "actions:",
    """actions:
  - {match: {host: api.example.com, port: 9443, method: [WEBSOCKET_TEXT]}, class: auto}""",
)


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
        self,
        revision: int,
        *,
        signers: int = 2,
        policy: str = POLICY,
        days: int = 30,
        lease: str = "",
        governance: str = GOVERNANCE,
    ) -> tuple[str, bytes]:
        """Return digest and bundle of a revision of ``policy``; ``lease`` is that field of its governance."""
        governance += f"lease: {lease}\n" if lease else ""
        bundle = load_members({"policy.yaml": policy.encode(), "governance.yaml": governance.encode()})
        start = self._now - timedelta(days=60)
        manifest = build_manifest(bundle, revision, start, self._now + timedelta(days=days))
        return policy_digest(manifest), sign(manifest, bundle.members, self.keys[:signers])
