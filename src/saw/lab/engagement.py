"""The demonstration engagement: real programs, run inside the sandbox; standard library only.

Prints one JSON object ``{"calls": [{name, control, expected, verdict, reason, policy_digest, ms, detail}, …]}``. A call's
``verdict`` is what happened (``allow`` or ``deny``), judged by the program's own outcome; ``reason`` and ``policy_digest``
come from the refusal's body.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HOME = Path("/home/agent")
API = "https://api.example.com/v1"
GIT = "https://git.example.com/team/project.git"
MODELS = "https://inference.local/v1/chat/completions"


def sh(*argv: str, stdin: str | None = None, cwd: Path | None = None, timeout: float = 90) -> tuple[int, str]:
    """Run a program; return its exit code and what it printed (both streams)."""
    try:
        done = subprocess.run(
            argv, input=stdin, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=timeout, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 124, str(error)
    return done.returncode, done.stdout + done.stderr


def body_of(text: str) -> dict[str, object]:
    """Find the refusal's JSON body in a program's output."""
    for match in re.finditer(r"\{.*\}", text, re.DOTALL):
        try:
            body = json.loads(match[0])
        except ValueError:
            continue
        if isinstance(body, dict):
            return body
    return {}


def curl(*options: str) -> tuple[str, dict[str, object], str]:
    """Run curl; return verdict, refusal body and a short detail. A status below 400 is an allowed call."""
    report = "\nstatus=%{http_code} connect=%{http_connect}\n"
    code, text = sh("curl", "--silent", "--show-error", "--max-time", "60", "--write-out", report, *options)
    status = re.search(r"status=(\d+) connect=(\d+)", text)
    number = int(status[1]) if status else 0
    head = text.partition("\nstatus=")[0]
    if code == 0 and 200 <= number < 400:
        return "allow", {}, f"HTTP {number}: {head[:120]}"
    return "deny", body_of(head), f"curl {code}, HTTP {number}, CONNECT {status[2] if status else '-'}: {head[:200]}"


def connect_refusal(authority: str) -> tuple[str, dict[str, object], str]:
    """curl to a host outside the policy; the refusal's body, which curl drops, is read with a CONNECT of our own."""
    verdict, _, detail = curl(f"https://{authority}/")
    with socket.create_connection(("10.200.0.1", 3128), timeout=30) as connection:
        connection.sendall(f"CONNECT {authority}:443 HTTP/1.1\r\nHost: {authority}:443\r\n\r\n".encode("ascii"))
        answer = b""
        while b"}" not in answer and (piece := connection.recv(65536)):
            answer += piece
    return verdict, body_of(answer.partition(b"\r\n\r\n")[2].decode("utf-8", "replace")), detail


def git_clone() -> tuple[str, dict[str, object], str]:
    """Clone the project."""
    sh("rm", "-rf", str(HOME / "work"))
    code, text = sh("git", "clone", "--quiet", GIT, str(HOME / "work"))
    return ("allow" if code == 0 and (HOME / "work/README.md").exists() else "deny"), body_of(text), text[-200:]


def git_push(ref: str) -> Callable[[], tuple[str, dict[str, object], str]]:
    """Commit something and push it to ``ref``."""

    def call() -> tuple[str, dict[str, object], str]:
        work = HOME / "work"
        if not work.is_dir():
            return "deny", {}, "there is no clone to push from"
        (work / "agent.txt").write_text(f"{time.time_ns()} {ref}\n", encoding="ascii")
        identity = ("-c", "user.name=agent", "-c", "user.email=agent@example.com", "-c", "commit.gpgsign=false")
        sh("git", "add", "agent.txt", cwd=work)
        sh("git", *identity, "commit", "--quiet", "-m", "agent: work", cwd=work)
        code, text = sh("git", "push", "--quiet", "origin", f"HEAD:{ref}", cwd=work)
        reason = "review_required" if "403" in text else ""
        return ("allow" if code == 0 else "deny"), ({"reason": reason} if code else {}), text[-300:]

    return call


def direct() -> tuple[str, dict[str, object], str]:
    """Open a connection that does not go through ring 1."""
    verdict, _, detail = curl("--noproxy", "*", "--connect-timeout", "3", "https://10.77.0.30/")
    return verdict, {"reason": "no_route"} if verdict == "deny" else {}, detail


def other_program() -> tuple[str, dict[str, object], str]:
    """Reach an allowed host with a program that its rule does not name."""
    return connect_refusal("git.example.com")


def chat(model: str) -> Callable[[], tuple[str, dict[str, object], str]]:
    """Ask the routed model endpoint for a completion."""
    message = json.dumps({"model": model, "messages": [{"role": "user", "content": "say hello"}]})
    return lambda: curl("-H", "Content-Type: application/json", "--data", message, MODELS)


class Mcp:
    """A session with the MCP file server behind its argument rules (JSON-RPC over stdio)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            ["saw-mcp-connect", "files"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.number = 0
        self.ask(
            "initialize",
            {"protocolVersion": "2025-06-18", "capabilities": {}, "clientInfo": {"name": "demo", "version": "1"}},
        )
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def send(self, message: dict[str, object]) -> None:
        """Write one message."""
        stream = self.process.stdin
        if stream is None:
            raise RuntimeError("the MCP connection has no input")
        stream.write(json.dumps(message) + "\n")
        stream.flush()

    def ask(self, method: str, parameters: dict[str, object]) -> dict[str, object]:
        """Send a request and return the answer to it."""
        self.number += 1
        self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": parameters})
        stream = self.process.stdout
        while stream is not None:
            line = stream.readline()
            if not line:
                break
            answer = json.loads(line)
            if answer.get("id") == self.number:
                return dict(answer)
        return {"error": {"message": "the MCP server went away"}}

    def close(self) -> None:
        """End the session."""
        self.process.kill()
        self.process.wait()


def mcp_call(tool: str, arguments: dict[str, object]) -> Callable[[], tuple[str, dict[str, object], str]]:
    """Call one tool of the file server."""

    def call() -> tuple[str, dict[str, object], str]:
        (HOME / "project").mkdir(exist_ok=True)
        (HOME / "project/notes.txt").write_text("written by the engagement\n", encoding="ascii")
        session = Mcp()
        try:
            answer = session.ask("tools/call", {"name": tool, "arguments": arguments})
        finally:
            session.close()
        error = answer.get("error")
        if isinstance(error, dict):
            data = error.get("data")
            body = data if isinstance(data, dict) else {}
            return "deny", body, json.dumps(error)[:300]
        return "allow", {}, json.dumps(answer)[:200]

    return call


CALLS: list[tuple[str, str, str, str, Callable[[], tuple[str, dict[str, object], str]]]] = [
    ("git clone over HTTPS", "CRED-01", "allow", "", git_clone),
    ("git push to agent/ branch", "RUN-01", "allow", "", git_push(f"refs/heads/agent/demo-{time.time_ns()}")),
    ("git push to main", "REV-01", "deny", "review_required", git_push("refs/heads/main")),
    ("read the ticket API", "CRED-01", "allow", "", lambda: curl(f"{API}/items")),
    ("write a note", "RUN-01", "allow", "", lambda: curl("--data", "text=hello", f"{API}/notes")),
    ("admin path of the API", "RUN-01", "deny", "deny_rule", lambda: curl(f"{API}/admin/users")),
    ("traversal into the admin path", "RUN-01", "deny", "", lambda: curl("--path-as-is", f"{API}/items/..%2fadmin/users")),
    ("method that no rule allows", "RUN-01", "deny", "method_or_path_not_allowed", lambda: curl("-X", "DELETE", f"{API}/items")),
    ("host that is not in the policy", "RUN-01", "deny", "host_not_allowed", lambda: connect_refusal("paste.example.net")),
    ("call that nobody handed out", "DEL-01", "deny", "outside_delegation", lambda: curl(f"{API}/reports")),
    ("metadata address", "NET-03", "deny", "", lambda: curl("http://169.254.169.254/latest/")),
    ("connection past the proxy", "NET-01", "deny", "no_route", direct),
    ("program that the rule does not name", "RUN-01", "deny", "binary_not_allowed", other_program),
    ("chat completion", "INF-01", "allow", "", chat("demo-small")),
    ("model that is not allowed", "INF-01", "deny", "model_not_allowed", chat("gigantic-1")),
    ("MCP: read a project file", "RUN-05", "allow", "", mcp_call("read_text_file", {"path": "/home/agent/project/notes.txt"})),
    ("MCP: read outside the project", "RUN-05", "deny", "argument_not_allowed",
     mcp_call("read_text_file", {"path": "/etc/passwd"})),
    ("MCP: tool that is not allowed", "RUN-05", "deny", "tool_not_allowed",
     mcp_call("move_file", {"source": "/home/agent/project/notes.txt", "destination": "/home/agent/project/x"})),
]  # fmt: skip


def main() -> int:
    """Run every call in order and print the record; the exit code is 0 when each ended as expected."""
    wanted = set(sys.argv[1:])
    os.environ.setdefault("GIT_TERMINAL_PROMPT", "0")
    calls = []
    for name, control, expected, expected_reason, action in CALLS:
        if wanted and name not in wanted:
            continue
        begin = time.monotonic()
        try:
            verdict, body, detail = action()
        except (OSError, ValueError, RuntimeError) as error:
            verdict, body, detail = "error", {}, f"{type(error).__name__}: {error}"
        reason = str(body.get("reason", ""))
        calls.append(
            {
                "name": name, "control": control, "expected": expected, "verdict": verdict, "reason": reason,
                "ok": verdict == expected and (not expected_reason or reason == expected_reason),
                "policy_digest": str(body.get("policy_digest", "")),
                "ms": round((time.monotonic() - begin) * 1000), "detail": detail,
            }
        )  # fmt: skip
    print(json.dumps({"calls": calls}))
    return 0 if all(call["ok"] for call in calls) else 1


if __name__ == "__main__":
    sys.exit(main())
