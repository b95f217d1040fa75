"""The demonstration engagement: real programs, run inside the sandbox; standard library only.

Prints one JSON object ``{"calls": [{name, control, expected, verdict, reason, ok, policy_digest, requests, ms, detail}, …]}``.

A verdict is what the evidence says, never what was hoped for. ``allow``: the program did its work. ``deny``: a refusal of
the policy was read in the answer itself (HTTP 403 or JSON-RPC error with a reason), or no connection could be made at all.
``error``: anything else, such as a far end that is down. ``reason`` and ``policy_digest`` are those of the answer; an allowed
call names its ``requests``, under which the gatekeeper recorded it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HOME = Path("/home/agent")
PROXY = ("10.200.0.1", 3128)
API_HOST = "api.example.com"
API = f"https://{API_HOST}/v1"
FAR_END = "10.77.0.30"
GIT = "https://git.example.com/team/project.git"
MODELS = "https://inference.local/v1/chat/completions"
POLICY_DENIED = -32001
"""JSON-RPC error code of a tool call that the policy refused."""
UNREACHED = {
    errno.ENETUNREACH: "network_unreachable",
    errno.EHOSTUNREACH: "host_unreachable",
    errno.ECONNREFUSED: "connection_refused",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
}
CURL_NOT_CONNECTED, CURL_TIMEOUT = 7, 28

Requests = tuple[tuple[str, str, str], ...]
"""Method, host and path with query of each governed request that a call consists of."""


class Outcome(NamedTuple):
    """How a call ended, and the words of the answer that say so."""

    verdict: str
    reason: str
    detail: str
    policy_digest: str = ""
    requests: Requests = ()


def sh(*argv: str, cwd: Path | None = None, timeout: float = 90, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Run a program; return its exit code and what it printed (both streams)."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, cwd=cwd, capture_output=True, text=True, errors="replace", timeout=timeout,
            check=False, env={**os.environ, **(env or {})},
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return 124, str(error)
    return done.returncode, done.stdout + done.stderr


def refusal_in(text: str) -> dict[str, object]:
    """Return the policy's refusal that ``text`` holds, or an empty mapping: a 403 of anybody else is none."""
    for match in re.finditer(r"\{.*\}", text, re.DOTALL):
        try:
            body = json.loads(match[0])
        except ValueError:
            continue
        if isinstance(body, dict) and body.get("error") == "policy_denied" and body.get("reason"):
            return body
    return {}


def denied(body: dict[str, object], detail: str) -> Outcome:
    """Return the outcome of a refusal whose body was read."""
    return Outcome("deny", str(body["reason"]), detail, str(body.get("policy_digest") or ""))


def curl(url: str, *options: str, method: str = "GET") -> Outcome:
    """Run curl. Allowed is a status below 400, denied a 403 with the policy's own body; the rest is an error."""
    report = "\nstatus=%{http_code} connect=%{http_connect}\n"
    arguments = ("--silent", "--show-error", "--max-time", "60", "--write-out", report, "--request", method)
    code, text = sh("curl", *arguments, *options, url)
    found = re.search(r"\nstatus=(\d+) connect=(\d+)\n", text)
    status = int(found[1]) if found else 0
    body = text[: found.start()] if found else text
    detail = f"curl {code}, HTTP {status}, CONNECT {found[2] if found else '-'}: {body[:200]}"
    if code == 0 and 200 <= status < 400:
        host, _, path = url.partition("://")[2].partition("/")
        return Outcome("allow", "", detail, requests=((method, host, f"/{path}"),))
    refusal = refusal_in(body) if status == 403 else {}
    if refusal:
        return denied(refusal, detail)
    return Outcome("error", "connect_refused" if found and found[2] == "403" else "", detail)


def connect_refusal(host: str) -> Outcome:
    """Call a host with curl, which must be refused at CONNECT; curl drops that body, so a CONNECT of our own reads it."""
    seen = curl(f"https://{host}/")
    if seen.reason != "connect_refused":
        return seen if seen.verdict == "allow" else seen._replace(verdict="error")
    with socket.create_connection(PROXY, timeout=30) as connection:
        connection.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode("ascii"))
        answer = b""
        while b"}" not in answer and (piece := connection.recv(65536)):
            answer += piece
    head, _, body = answer.decode("utf-8", "replace").partition("\r\n\r\n")
    refusal = refusal_in(body) if head.split(" ")[1:2] == ["403"] else {}
    return (
        denied(refusal, f"{seen.detail}; {body[:300]}") if refusal else seen._replace(detail=f"{seen.detail}; {head}")
    )


class Exchange(NamedTuple):
    """One request of git and its answer."""

    method: str
    path: str
    status: int
    body: str
    waits_under: str = ""
    """Policy digest of an answer that says that the call waits for a person."""


def exchanges(trace: str) -> list[Exchange]:
    """Read what git sent and received out of its own trace (``GIT_TRACE_CURL``), the bodies of refusals included."""
    found: list[Exchange] = []
    for line in trace.splitlines():
        part = re.search(r"(=> Send header|<= Recv header|<= Recv data): ?(.*)$", line)
        if part is None:
            continue
        kind, text = part[1], part[2]
        if kind == "=> Send header" and (request := re.match(r"([A-Z]+) (\S+) HTTP/", text)):
            found.append(Exchange(request[1], request[2], 0, ""))
        elif found and kind == "<= Recv header" and (status := re.match(r"HTTP/\S+ (\d{3})", text)):
            found[-1] = found[-1]._replace(status=int(status[1]), body="")
        elif (
            found and kind == "<= Recv header" and (under := re.match(r"(?i)x-saw-policy-digest: ([0-9a-f]{64})", text))
        ):
            found[-1] = found[-1]._replace(waits_under=under[1])
        elif found and kind == "<= Recv data":
            found[-1] = found[-1]._replace(body=found[-1].body + text)
    return found


def git(*arguments: str, cwd: Path | None = None) -> Outcome:
    """Run git and judge it by its exit code and by the answers that it got."""
    with tempfile.TemporaryDirectory(prefix="saw-trace-") as scratch:
        trace = Path(scratch, "trace")
        code, text = sh("git", *arguments, cwd=cwd, env={"GIT_TRACE_CURL": str(trace)})
        seen = exchanges(trace.read_text(encoding="utf-8", errors="replace")) if trace.exists() else []
    detail = f"git {code}, HTTP {' '.join(str(item.status) for item in seen) or '-'}: {text[-200:]}"
    for item in seen:
        refusal = refusal_in(item.body) if item.status == 403 else {}
        if refusal:
            return denied(refusal, f"{item.method} {item.path}; {detail}") if code else Outcome("error", "", detail)
        if code and item.waits_under:
            return Outcome("deny", "review_required", f"{item.method} {item.path}; {detail}", item.waits_under)
    host = GIT.partition("://")[2].partition("/")[0]
    requests = tuple((item.method, host, item.path) for item in seen if item.method != "CONNECT" and item.status < 300)
    return Outcome("error", "", detail) if code or not requests else Outcome("allow", "", detail, requests=requests)


def git_clone() -> Outcome:
    """Clone the project."""
    work = HOME / "work"
    shutil.rmtree(work, ignore_errors=True)
    done = git("clone", "--quiet", GIT, str(work))
    if done.verdict == "allow" and not (work / "README.md").exists():
        return done._replace(verdict="error", detail=f"{done.detail}; the clone has no README.md")
    return done


def git_push(ref: str) -> Callable[[], Outcome]:
    """Commit something and push it to ``ref``."""

    def call() -> Outcome:
        work = HOME / "work"
        if not work.is_dir():
            return Outcome("error", "", "there is no clone to push from")
        (work / "agent.txt").write_text(f"{time.time_ns()} {ref}\n", encoding="ascii")
        identity = ("-c", "user.name=agent", "-c", "user.email=agent@example.com", "-c", "commit.gpgsign=false")
        sh("git", "add", "agent.txt", cwd=work)
        sh("git", *identity, "commit", "--quiet", "-m", "agent: work", cwd=work)
        return git("push", "--quiet", "origin", f"HEAD:{ref}", cwd=work)

    return call


def unreached(address: str, port: int) -> str:
    """Try a TCP connection; return an empty text when it came about, else which way it did not."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return ""
    except TimeoutError:
        return "no_answer"
    except OSError as error:
        return UNREACHED.get(error.errno or 0, errno.errorcode.get(error.errno or 0, "unknown").lower())


def pinned() -> Outcome:
    """The twin of :func:`direct`: the same program, URL and address, but through the proxy."""
    return curl(f"{API}/items", "--resolve", f"{API_HOST}:443:{FAR_END}")


def direct() -> Outcome:
    """Open a connection that does not go through ring 1, to an address at which the twin's far end answers."""
    options = ("--noproxy", "*", "--connect-timeout", "5", "--resolve", f"{API_HOST}:443:{FAR_END}")
    report = "\nconnected=%{time_connect}\n"
    code, text = sh("curl", "--silent", "--show-error", "--write-out", report, *options, f"{API}/items")
    seconds = re.search(r"connected=([\d.]+)", text)
    why = unreached(FAR_END, 443)
    detail = f"curl {code}: {text[:200].strip()}; connect: {why or 'it came about'}"
    if not why or (seconds and float(seconds[1]) > 0):
        return Outcome("allow", "", detail)
    return Outcome("deny" if code in {CURL_NOT_CONNECTED, CURL_TIMEOUT} else "error", why, detail)


def other_program() -> Outcome:
    """Reach an allowed host with a program that its rule does not name."""
    return connect_refusal("git.example.com")


def chat(model: str) -> Callable[[], Outcome]:
    """Ask the routed model endpoint for a completion."""
    message = json.dumps({"model": model, "messages": [{"role": "user", "content": "say hello"}]})
    return lambda: curl(MODELS, "-H", "Content-Type: application/json", "--data", message, method="POST")


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


def mcp_call(tool: str, arguments: dict[str, object]) -> Callable[[], Outcome]:
    """Call one tool of the file server."""

    def call() -> Outcome:
        (HOME / "project").mkdir(exist_ok=True)
        (HOME / "project/notes.txt").write_text("written by the engagement\n", encoding="ascii")
        session = Mcp()
        try:
            answer = session.ask("tools/call", {"name": tool, "arguments": arguments})
        finally:
            session.close()
        return mcp_outcome(answer)

    return call


def mcp_outcome(answer: dict[str, object]) -> Outcome:
    """Judge the answer to a tool call: a result without ``isError``, the policy's own error, or anything else."""
    detail = json.dumps(answer)[:300]
    error, result = answer.get("error"), answer.get("result")
    if isinstance(error, dict) and error.get("code") == POLICY_DENIED:
        data = error.get("data")
        reason = str(data.get("reason") or "") if isinstance(data, dict) else ""
        digest = str(data.get("policy_digest") or "") if isinstance(data, dict) else ""
        return Outcome("deny" if reason else "error", reason, detail, digest)
    good = isinstance(result, dict) and not result.get("isError")
    return Outcome("allow" if good else "error", "", detail)


CALLS: list[tuple[str, str, str, str, Callable[[], Outcome]]] = [
    ("git clone over HTTPS", "CRED-01", "allow", "", git_clone),
    ("git push to agent/ branch", "RUN-01", "allow", "", git_push(f"refs/heads/agent/demo-{time.time_ns()}")),
    ("git push to main", "REV-01", "deny", "review_required", git_push("refs/heads/main")),
    ("read the ticket API", "CRED-01", "allow", "", lambda: curl(f"{API}/items")),
    ("write a note", "RUN-01", "allow", "", lambda: curl(f"{API}/notes", "--data", "text=hello", method="POST")),
    ("admin path of the API", "RUN-01", "deny", "deny_rule", lambda: curl(f"{API}/admin/users")),
    ("traversal into the admin path", "RUN-01", "deny", "not_canonical",
     lambda: curl(f"{API}/items/..%2fadmin/users", "--path-as-is")),
    ("method that no rule allows", "RUN-01", "deny", "method_or_path_not_allowed",
     lambda: curl(f"{API}/items", method="DELETE")),
    ("host that is not in the policy", "RUN-01", "deny", "host_not_allowed", lambda: connect_refusal("paste.example.net")),
    ("call that nobody handed out", "DEL-01", "deny", "outside_delegation", lambda: curl(f"{API}/reports")),
    ("metadata address", "NET-03", "deny", "destination_blocked", lambda: curl("http://169.254.169.254/latest/")),
    ("the same through the proxy", "NET-01", "allow", "", pinned),
    ("connection past the proxy", "NET-01", "deny", "not_permitted", direct),
    ("program that the rule does not name", "RUN-01", "deny", "binary_not_allowed", other_program),
    ("chat completion", "INF-01", "allow", "", chat("demo-small")),
    ("model that is not allowed", "INF-01", "deny", "model_not_allowed", chat("gigantic-1")),
    ("MCP: read a project file", "RUN-05", "allow", "", mcp_call("read_text_file", {"path": "/home/agent/project/notes.txt"})),
    ("MCP: read outside the project", "RUN-05", "deny", "argument_not_allowed",
     mcp_call("read_text_file", {"path": "/etc/passwd"})),
    ("MCP: tool that is not allowed", "RUN-05", "deny", "tool_not_allowed",
     mcp_call("move_file", {"source": "/home/agent/project/notes.txt", "destination": "/home/agent/project/x"})),
]  # fmt: skip


def run_call(
    name: str, control: str, expected: str, expected_reason: str, action: Callable[[], Outcome]
) -> dict[str, object]:
    """Run one call and return its record."""
    begin = time.monotonic()
    try:
        outcome = action()
    except (OSError, ValueError, RuntimeError) as error:
        outcome = Outcome("error", "", f"{type(error).__name__}: {error}")
    return {
        "name": name, "control": control, "expected": expected, "verdict": outcome.verdict, "reason": outcome.reason,
        "ok": outcome.verdict == expected and outcome.reason == expected_reason,
        "policy_digest": outcome.policy_digest, "requests": outcome.requests,
        "ms": round((time.monotonic() - begin) * 1000), "detail": outcome.detail,
    }  # fmt: skip


def main() -> int:
    """Run every call in order and print the record; the exit code is 0 when each ended as expected."""
    wanted = set(sys.argv[1:])
    os.environ.setdefault("GIT_TERMINAL_PROMPT", "0")
    calls = [run_call(*entry) for entry in CALLS if not wanted or entry[0] in wanted]
    print(json.dumps({"calls": calls}))
    return 0 if all(call["ok"] for call in calls) else 1


if __name__ == "__main__":
    sys.exit(main())
