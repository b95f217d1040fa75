"""What a call of a stdio MCP server's tool costs behind the mediator, against the same server bare, measured in one run (root).

    python benchmarks/mcp_stdio.py [CALLS]

Governed: the client's end (``saw-mcp-connect``), the mediator with the policy's arguments, and the server in its own confinement,
started for the session as its unit does. Bare: the server's own standard input and output. Calls of both go in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

from results import Result, line_of, quantile, result, table  # noqa: E402 - the module beside this one

from saw.conformance.local import PYTHON, UID  # noqa: E402
from saw.conformance.outside import Ground  # noqa: E402
from saw.policy.loader import load_governance, load_policy  # noqa: E402
from saw.runtime.sandbox import RuntimePaths, compile_spec, encode_launch  # noqa: E402

ROUND = 10
MEDIATOR_UID = 990
WAIT_S = 60.0
PLACE = "/run/bench"
SOCKETS = "/run/saw/mcp-server/files.sock", "/run/saw/mcp/files.sock"
POLICY = f"""
version: 1
filesystem_policy: {{read_only: [/usr, {PLACE}], read_write: [/tmp]}}
landlock: {{compatibility: hard_requirement}}
process: {{run_as_user: agent, run_as_group: agent}}
"""
GOVERNANCE = f"""
schema: 1
blueprint: {{name: coding, version: 1.0.0, owner: team}}
mcp:
  servers:
    files:
      transport: stdio
      command: [{PYTHON}, -I, {PLACE}/server.py]
      tools: {{read: {{class: auto, args: {{path: {{max_length: 99, required: true}}}}}}}}
"""
SERVER = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    result = {"content": [{"type": "text", "text": "did read"}]}
    if asked["method"] == "initialize":
        result = {"protocolVersion": "2025-06-18", "capabilities": {"tools": {}}, "serverInfo": {"name": "s", "version": "1"}}
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"""


class Client:
    """An MCP client over a process's standard input and output."""

    def __init__(self, stack: ExitStack, command: list[str]) -> None:
        self._process = started(stack, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._number = 0
        about = {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "bench", "version": "1"}}
        self.ask("initialize", about)
        self._send({"method": "notifications/initialized"})

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self._process.stdin.flush()

    def ask(self, method: str, parameters: dict[str, Any]) -> float:
        """Ask and wait for the result; return the milliseconds."""
        self._number += 1
        begin = time.perf_counter()
        self._send({"id": self._number, "method": method, "params": parameters})
        line = line_of(self._process, WAIT_S)
        took = (time.perf_counter() - begin) * 1000
        answer = json.loads(line or "{}")
        if answer.get("id") != self._number or "result" not in answer:
            raise RuntimeError(f"{method} was answered {line!r}")
        return took

    def call(self) -> float:
        """Call the tool."""
        return self.ask("tools/call", {"name": "read", "arguments": {"path": "/srv/docs/a.md"}})


def started(stack: ExitStack, command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Start a process that ends with ``stack``."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(command, text=True, env=environment, cwd="/", **options)

    def end() -> None:
        process.terminate()
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=20)

    stack.callback(end)
    return process


def as_user(uid: int) -> list[str]:
    """Return the words that run a command as this user, in the agent's group."""
    return ["setpriv", f"--reuid={uid}", f"--regid={UID}", "--clear-groups"]


def appears(ground: Ground, path: str, process: subprocess.Popen[str]) -> None:
    """Wait for the socket that ``process`` makes."""
    end = time.monotonic() + WAIT_S
    while ground.run("test", "-S", path).returncode:
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"{path} did not appear; see the messages above")


def governed(stack: ExitStack, ground: Ground) -> list[str]:
    """Start server and mediator; return the command of the client's end."""
    package = ROOT / "src" / "saw" / "runtime"
    spec = compile_spec(
        load_policy(POLICY.encode()), load_governance(GOVERNANCE.encode()),
        paths=RuntimePaths(PYTHON, str(package)), account=(UID, UID, "/run/home"),
    )  # fmt: skip
    server = spec.mcp_servers[0]
    files = {
        f"{PLACE}/server.py": SERVER.encode(),
        "/run/saw/generations/current/governance.yaml": GOVERNANCE.encode(),
        "/run/saw/policy/tools.json": b'{"bound": false}',
        "/run/saw/sandbox/mcp-files.json": encode_launch(spec.mcp_launch(server)),
    }
    for path, content in files.items():
        script = 'mkdir -p "${1%/*}" && cat >"$1" && chmod 644 "$1"'
        subprocess.run([*ground.prefix(), "sh", "-ec", script, "sh", path], input=content, check=True)
    owner = (str(MEDIATOR_UID), str(UID))
    ground.run("install", "-d", "-o", owner[0], "-g", owner[1], "/run/saw/mcp", "/run/saw/mcp-server")
    launcher = [PYTHON, "-m", "saw.runtime.launcher", "--launch", "/run/saw/sandbox/mcp-files.json", "--"]
    activate = ["systemd-socket-activate", "--accept", "--inetd", "-E", f"PYTHONPATH={ROOT / 'src'}", "-l", SOCKETS[0]]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    listener = started(stack, [*ground.prefix(), *activate, *as_user(UID), *launcher, *server.command], **quiet)
    appears(ground, SOCKETS[0], listener)
    ground.run("chown", owner[0], SOCKETS[0])
    mediator = [sys.executable, "-m", "saw.cli.main", "mcp", "run", "files"]
    running = started(stack, [*ground.prefix(), *as_user(MEDIATOR_UID), *mediator], stderr=subprocess.DEVNULL)
    appears(ground, SOCKETS[1], running)
    return [*ground.prefix(), *as_user(UID), PYTHON, "-I", "-S", str(package / "mcp_connect.py"), "files"]


def measure(calls: int) -> list[Result]:
    """Measure ``calls`` calls on both ways, at least one round of each; a first round is not counted."""
    with ExitStack() as stack:
        ground = stack.enter_context(closing(Ground()))
        links = {
            "governed": Client(stack, governed(stack, ground)),
            "bare": Client(stack, [*ground.prefix(), *as_user(UID), PYTHON, "-I", f"{PLACE}/server.py"]),
        }
        times: dict[str, list[float]] = {name: [] for name in links}
        for turn in range(1 + max(1, calls // ROUND)):
            for name, link in links.items():
                took = [link.call() for _ in range(ROUND)]
                times[name] += took if turn else []
    made = []
    for share in (0.5, 0.99):
        value, baseline = (quantile(times[name], share) for name in ("governed", "bare"))
        note = f"{len(times['governed'])} calls; baseline: the same server by its own pipes; {value - baseline:+.2f} ms"
        made.append(result(f"mcp_stdio_call_p{round(share * 100)}", value, "ms", baseline=baseline, note=note))
    return made


def main() -> None:
    """Measure and print."""
    print(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 300)))


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("needs root: it makes a sandbox")
    main()
