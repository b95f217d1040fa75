"""The policy that the clients of these tests live under: every host once as the client's own, and one that none may reach."""

from __future__ import annotations

from pathlib import Path

from saw.conformance.local import HOME

HOSTS = (
    "api.example.com", "pypi.example.com", "npm.example.com", "apt.example.com", "git.example.com", "grpc.example.com",
    "chat.example.com", "models.example.com", "hidden.example.com", "graph.example.com", "tools.example.com",
)  # fmt: skip
JAVA_SETTINGS = ", ".join(sorted(str(path) for path in Path("/etc").glob("java-*-openjdk"))) or "/etc/java"
PYTHON, NODE = "/usr/bin/python3*", "/**/node"
POLICY = f"""
version: 1
filesystem_policy:
  include_workdir: true
  read_only: [/usr, /etc/ssl, {JAVA_SETTINGS}, /run/clients/python, /run/clients/node_modules, /run/clients/node]
  read_write: [/tmp, {HOME}, /dev/null]
landlock: {{compatibility: hard_requirement}}
process: {{run_as_user: agent, run_as_group: agent}}
network_policies:
  api:
    endpoints:
      - {{host: api.example.com, port: 443, protocol: rest, rules: [
          {{allow: {{method: GET, path: "/v1/**"}}}}, {{allow: {{method: POST, path: /v1/notes}}}}]}}
    binaries: [{{path: /usr/bin/curl}}, {{path: "{PYTHON}"}}, {{path: "{NODE}"}}, {{path: "/usr/lib/jvm/**"}},
      {{path: /usr/bin/rclone}}]
  pypi:
    endpoints:
      - {{host: pypi.example.com, port: 443, protocol: rest, rules: [
          {{allow: {{method: GET, path: "/simple/demo-*/**"}}}}, {{allow: {{method: GET, path: "/files/**"}}}}]}}
    binaries: [{{path: "{PYTHON}"}}]
  npm:
    endpoints:
      - {{host: npm.example.com, port: 443, protocol: rest, rules: [
          {{allow: {{method: GET, path: "/demo-*"}}}}, {{allow: {{method: GET, path: "/demo-*/**"}}}}]}}
    binaries: [{{path: "{NODE}"}}]
  apt:
    endpoints:
      - {{host: apt.example.com, port: 443, protocol: rest, rules: [{{allow: {{method: GET, path: "/debian/**"}}}}]}}
    binaries: [{{path: "/usr/lib/apt/methods/*"}}]
  git:
    endpoints:
      - {{host: git.example.com, port: 443, protocol: rest, rules: [
          {{allow: {{method: GET, path: "/team/**"}}}}, {{allow: {{method: POST, path: "/team/**/git-upload-pack"}}}}]}}
    binaries: [{{path: "/usr/lib/git-core/**"}}, {{path: /usr/bin/git}}]
  grpc:
    endpoints:
      - {{host: grpc.example.com, port: 443, protocol: rest, rules: [
          {{allow: {{method: POST, path: "/demo.Greeter/*"}}}}, {{allow: {{method: POST, path: "/demo.Held/*"}}}}]}}
    binaries: [{{path: "{PYTHON}"}}, {{path: "{NODE}"}}]
  chat:
    endpoints:
      - {{host: chat.example.com, port: 443, protocol: websocket, rules: [
          {{allow: {{method: GET, path: "/rooms/**"}}}}, {{allow: {{method: WEBSOCKET_TEXT, path: "/rooms/**"}}}}]}}
    binaries: [{{path: "{PYTHON}"}}, {{path: "{NODE}"}}]
"""
POLICY += """
  graph:
    endpoints: [{host: graph.example.com, port: 443, path: /graphql, protocol: graphql, access: read-only}]
    binaries: [{path: "/usr/bin/python3*"}]
  tools:
    endpoints:
      - {host: tools.example.com, port: 443, path: /mcp, protocol: mcp, rules: [{allow: {method: tools/call, tool: "search_*"}}]}
    binaries: [{path: "/usr/bin/python3*"}]
  db:
    endpoints: [{host: db.example.com, port: 5432, protocol: tcp}]
    binaries: [{path: "/usr/lib/postgresql/**"}, {path: "/usr/bin/python3*"}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
landlock: {minimum_abi: 6, allow_best_effort: false}
credentials:
  - {id: orders-db, ref: "file:orders-db", hosts: ["db.example.com:5432"], postgres: {user: agent, databases: [orders]}}
inference:
  routes: [{alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/v1"}]
mcp:
  servers:
    tools:
      transport: http
      url: https://tools.example.com/mcp
      tools: {search_web: {class: auto, args: {q: {max_length: 64}}}}
actions:
  - {match: {host: tools.example.com, mcp: {}}, class: auto}
  - {match: {host: db.example.com, method: [POSTGRES]}, class: auto}
  - {match: {host: api.example.com, method: [POST], path: /v1/notes}, class: auto}
  - {match: {host: grpc.example.com, method: [POST], path: "/demo.Greeter/*"}, class: auto}
  - {match: {host: chat.example.com, method: [WEBSOCKET_TEXT]}, class: auto}
  - {match: {host: git.example.com, method: [POST], path: "/team/**/git-upload-pack"}, class: auto}
"""
