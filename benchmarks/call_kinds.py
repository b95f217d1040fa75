"""What kinds of calls cost through both rings, against two plain Envoy TLS hops to the same far end, measured in one run (root).

    python benchmarks/call_kinds.py [--calls N]

The world is that of ``governed_call.py``. From the sandbox, in turns over both paths:

- a model's answer that is streamed: how long until its first word, and its last one. The far end sends 50 pieces without a pause;
- a call of a tool of an MCP server over HTTP, whose arguments the policy bounds;
- a large answer, in MiB per second.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from governed_call import FIRST, HOST, world
from results import Result, quantile, result, table

PIECES = 50
LARGE = 32
"""MiB of the large answer."""

# Runs with /usr/bin/python3 in the sandbox; writes JSON.
CLIENT = """
import http.client, json, socket, ssl, sys, time
task = json.load(sys.stdin)
def opened(path, host):
    context = ssl.create_default_context(cafile=path["ca"])
    link = http.client.HTTPSConnection(*path["address"], timeout=60, context=context)
    if path["tunnel"]:
        link.set_tunnel(host, 443)
        link.connect()
    else:
        raw = socket.create_connection(path["address"], 60)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.sock = context.wrap_socket(raw, server_hostname=path["name"])
    return link
def call(link, one, path):
    start = time.perf_counter()
    target = one["target"] if path["tunnel"] else one["plain_target"]
    link.request(one["method"], target, body=one["body"], headers={"host": one["host"], **one["headers"]})
    answer = link.getresponse()
    first = None
    size = 0
    while piece := answer.read1(1 << 20):
        first = first or (time.perf_counter() - start) * 1000
        size += len(piece)
    answer.read()
    assert answer.status == 200, (answer.status, answer.read())
    return first, (time.perf_counter() - start) * 1000, size
told = {}
for one in task["kinds"]:
    links = {path["label"]: (opened(path, one["host"]), path) for path in task["paths"]}
    times = told[one["name"]] = {label: [] for label in links}
    for turn in range(one["turns"]):
        for label, (link, path) in links.items():
            done = [call(link, one, path) for _ in range(one["round"])]
            times[label] += done if turn else []
print(json.dumps(told))
"""


async def respond(scope: Mapping[str, Any], send: Any) -> None:
    """Answer as a model, an MCP server, a store of large things, or with a short text."""
    path = scope["path"]
    if path.endswith("/chat/completions"):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for number in range(PIECES):
            piece = {"choices": [{"index": 0, "delta": {"content": f"word {number} "}, "finish_reason": None}]}
            await send({"type": "http.response.body", "body": _event(piece), "more_body": True})
        usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": PIECES, "total_tokens": 5 + PIECES}}
        await send({"type": "http.response.body", "body": _event(usage) + b"data: [DONE]\n\n"})
        return
    kind, body = b"text/plain", b"a short text"
    if path == "/tools":
        answer = {"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "did read"}]}}
        kind, body = b"application/json", json.dumps(answer).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if path == "/v1/large":
        for _ in range(LARGE):
            await send({"type": "http.response.body", "body": b"x" * (1 << 20), "more_body": True})
        body = b""
    await send({"type": "http.response.body", "body": body})


def _event(piece: object) -> bytes:
    return b"data: " + json.dumps(piece).encode() + b"\n\n"


def kinds(calls: int) -> list[dict[str, Any]]:
    """Return the kinds of calls; the first turn of each is not counted."""
    as_json = {"content-type": "application/json"}
    tool = {
        "jsonrpc": "2.0", "id": 1, "method": "tools/call",
        "params": {"name": "read", "arguments": {"path": "/srv/docs/a.md"}},
    }  # fmt: skip
    asked = {"model": "demo-1", "messages": [{"role": "user", "content": "go on"}], "stream": True}
    some = {"round": 5, "turns": 1 + max(1, calls // 5)}
    return [
        {
            "name": "tool", "host": HOST, "method": "POST", "target": "/tools", "plain_target": "/tools",
            "body": json.dumps(tool), "headers": {**as_json, "accept": "application/json, text/event-stream"}, **some,
        },
        {
            "name": "stream", "host": "inference.local", "method": "POST", "target": "/v1/chat/completions",
            "plain_target": "/api/v1/chat/completions", "body": json.dumps(asked), "headers": as_json, **some,
        },
        {
            "name": "large", "host": HOST, "method": "GET", "target": "/v1/large", "plain_target": "/v1/large",
            "body": None, "headers": {}, "round": 1, "turns": 1 + max(2, calls // 50),
        },
    ]  # fmt: skip


def measure(calls: int) -> list[Result]:
    """Measure ``calls`` calls of each kind on both paths."""
    with ExitStack() as stack:
        outer, chain, corporate = world(stack)
        outer.far.respond = respond
        task = {
            "paths": [
                {"label": "plain", "address": FIRST, "name": HOST, "ca": corporate, "tunnel": False},
                {"label": "governed", "address": ("10.200.0.1", 3128), "ca": str(chain.ca_bundle), "tunnel": True},
            ],
            "kinds": kinds(calls),
        }
        command = ["ip", "netns", "exec", chain.sandbox, "/usr/bin/python3", "-I", "-c", CLIENT]
        done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False, timeout=900)
        if done.returncode:
            raise RuntimeError(f"the client failed: {done.stderr.strip()[-800:]}")
        return rows(json.loads(done.stdout))


def rows(told: dict[str, dict[str, Any]]) -> list[Result]:
    """Return the rows of what the client told: (first byte of the body in ms, all of it in ms, bytes) of every call."""
    made = []
    for kind, name, place in (
        ("stream", "stream_first_word", 0),
        ("stream", "stream_last_word", 1),
        ("tool", "mcp_tool_call", 1),
    ):
        for share in (0.5, 0.99):
            value, baseline = (
                quantile([one[place] for one in told[kind][path]], share) for path in ("governed", "plain")
            )
            note = (
                f"{len(told[kind]['governed'])} calls; baseline: two plain Envoy TLS hops; {value - baseline:+.2f} ms"
            )
            made.append(result(f"{name}_p{round(share * 100)}", value, "ms", baseline=baseline, note=note))
    speeds = [
        quantile([one[2] / one[1] * 1000 / (1 << 20) for one in told["large"][path]], 0.5)
        for path in ("governed", "plain")
    ]
    note = f"one answer of {LARGE} MiB at a time; the far end and the client are Python"
    made.append(result("answer_throughput", speeds[0], "MiB/s", baseline=speeds[1], note=note))
    return made


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=300, help="calls of each kind on each path (default 300)")
    print(table(measure(parser.parse_args().calls)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
