"""The demonstration on a running workspace: attach, engagement, and what arrived at the far end."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saw.errors import UnavailableError
from saw.lab import sweep
from saw.lab.attach import attach_thrice
from saw.lab.evidence import Event, allowed_calls, digest_of, explain, head, trail, unexplained, upstream_of
from saw.lab.process import wait_for

if TYPE_CHECKING:
    from saw.lab.up import Bringup


def in_workspace(
    job: Bringup, workspace: str, *command: str, stdin: bytes = b"", timeout: float = 300
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in the workspace's sandbox through ``saw ssh``."""
    argv = [*ssh_line(workspace), "--", *command]
    try:
        return subprocess.run(
            argv, input=stdin, capture_output=True, check=False, env=ssh_environment(job), timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"`{' '.join(command[:3])}` in {workspace} did not end within {timeout:.0f} s"
        ) from error


def ssh_line(workspace: str) -> list[str]:
    """Return the command line that attaches to ``workspace``."""
    return [str(Path(sys.executable).with_name("saw")), "ssh", workspace]


def ssh_environment(job: Bringup) -> dict[str, str]:
    """Return the environment in which ``saw`` finds the lab's broker."""
    return {**os.environ, "SAW_CONTEXT": str(job.lab.context_file)}


def wait_shell(job: Bringup, workspace: str) -> None:
    """Wait until a command runs in the sandbox: SSH server, certificate and sandbox are up some seconds after the lease."""
    job.progress.say("waiting for the workspace's SSH server and sandbox")
    wait_for(
        f"a shell in {workspace}",
        lambda: in_workspace(job, workspace, "true").returncode == 0,
        patience=600,
        interval=1.0,
        cure="look at the VM's console and at the audit trail",
    )


def check_attach(job: Bringup, workspace: str) -> dict[str, Any]:
    """Attach: one command, and three times the persistent terminal, in which the first attachment's work must still be.

    Returns ``{ok, user, seconds, attachments, detached, kept, kept_after_hangup}``: ``seconds`` is what the first command
    took, ``kept`` whether a shell variable was there again after detaching, and after hanging up.
    """
    wait_shell(job, workspace)
    begin = time.monotonic()
    first = in_workspace(job, workspace, "id", "-un")
    seconds = round(time.monotonic() - begin, 2)
    user = first.stdout.decode(errors="replace").strip()
    if first.returncode:
        raise UnavailableError(
            f"saw ssh {workspace} failed ({first.returncode}): {first.stderr.decode(errors='replace')[-600:]}",
            cure="look at the VM's console and at the audit trail",
        )
    terminal = attach_thrice(ssh_line(workspace), ssh_environment(job), f"m{secrets.token_hex(6)}")
    kept = "kept" if terminal["kept"] and terminal["kept_after_hangup"] else "LOST"
    job.progress.say(f"shell as {user} in {seconds} s; attached three times, the first one's work is {kept}")
    ok = user == "agent" and all(terminal.values())
    return {"ok": ok, "user": user, "seconds": seconds, "attachments": 3, **terminal}


def run_engagement(job: Bringup, workspace: str, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Run the engagement's program in the sandbox and hold it against the audit trail and what the far end recorded.

    Returns the report's ``calls``. An allowed call without its audit events under one policy is not as expected.
    """
    wait_first_call(job, workspace)
    mark = len(arrivals(job))
    with job.client().session() as client:
        before = head(client, "edge")
    done = in_workspace(job, workspace, "/opt/saw/bin/python", "-I", "-m", "saw.lab.engagement", *names, timeout=900)
    try:
        calls = list(json.loads(done.stdout.decode().strip().splitlines()[-1])["calls"])
    except (ValueError, IndexError, KeyError) as error:
        text = (done.stderr + done.stdout).decode(errors="replace")[-1200:]
        raise UnavailableError(f"the engagement gave no result ({done.returncode}): {text}") from error
    events = hold_against_trail(job, workspace, calls, before)
    if not names:
        calls += far_end_findings(job, arrivals(job)[mark:], events)
        calls.append(credential_search(job, workspace))
    return calls


def hold_against_trail(job: Bringup, workspace: str, calls: list[dict[str, Any]], before: int) -> list[Event]:
    """Explain the allowed calls by the gatekeeper's events behind ``before``, which arrive within seconds; return them."""
    events: list[Event] = []
    missing: list[str] = []

    def arrived() -> bool:
        nonlocal events, missing
        with job.client().session() as client:
            events = allowed_calls(trail(client, "edge", before), workspace)
        missing = explain(calls, events)
        return not missing

    with contextlib.suppress(UnavailableError):
        wait_for("the gatekeeper's events of the allowed calls", arrived, patience=30, interval=1.0)
    for call in calls:
        if call["name"] in missing:
            call["ok"] = False
            call["detail"] = f"no audit event under one policy digest for this call; {call['detail']}"
    return events


def wait_first_call(job: Bringup, workspace: str) -> None:
    """Wait until a call to the ticket API is allowed and answered; the error says how the last try ended."""
    probe = ("curl", "-sS", "-w", "%{http_code}", "-m", "20", "https://api.example.com/v1/items")
    last = b""

    def answered() -> bool:
        nonlocal last
        done = in_workspace(job, workspace, *probe)
        last = done.stdout + done.stderr
        return done.stdout.endswith(b"200")

    try:
        wait_for("the first governed call", answered, patience=600, interval=1.0)
    except UnavailableError as error:
        text = last.decode(errors="replace").strip()[-800:]
        raise UnavailableError(f"{error.message}; the last try: {text}", cure="saw audit events tells more") from error


def arrivals(job: Bringup) -> list[dict[str, Any]]:
    """Return what the far end recorded, request by request."""
    text = job.on_host("enterprise", "cat", "/var/log/nginx/arrivals.jsonl")
    return [json.loads(line) for line in text.splitlines() if line]


def git_credential(job: Bringup) -> str:
    """Return the Authorization header that the perimeter adds to calls of the Git server."""
    pair = f"x-access-token:{job.lab.credentials()['git-token']}"
    return "Basic " + base64.b64encode(pair.encode()).decode()


def far_end_findings(job: Bringup, arrived: list[dict[str, Any]], events: list[Event]) -> list[dict[str, Any]]:
    """Judge the far end's record: real credentials arrived there, and nothing that the gatekeeper did not allow."""
    secret = job.lab.credentials()
    wanted = {
        "git.example.com": git_credential(job),
        "api.example.com": f"Bearer {secret['api-token']}",
        "models.example.com": f"Bearer {secret['model-key']}",
    }
    findings = []
    for host, value in wanted.items():
        seen = [item for item in arrived if item["host"] == host]
        digests = {digest_of(event) for event in events if upstream_of(event)[0] == host}
        findings.append(
            finding(
                f"credential arrived at {host.partition('.')[0]}",
                "CRED-01",
                "allow" if seen and all(item["authorization"] == value for item in seen) else "deny",
                expected="allow",
                digest=digests.pop() if len(digests) == 1 else "",
                detail=f"{len(seen)} requests recorded at the far end",
            )
        )
    strangers = unexplained(arrived, events)
    detail = f"{len(arrived)} requests recorded at the far end, without an allowed call: {strangers or 'none'}"
    verdict = "deny" if arrived and not strangers else "allow" if strangers else "error"
    return [*findings, finding("nothing refused arrived", "NET-01", verdict, expected="deny", detail=detail)]


def credential_search(job: Bringup, workspace: str) -> dict[str, Any]:
    """Search all that the agent can read for the real credentials; two planted words show that the search finds things."""
    words = {"planted in the environment": secrets.token_hex(16), "planted in a file": secrets.token_hex(16)}
    variable, written = words.values()
    encoded = base64.b64encode(f"x:{written}".encode()).decode()
    in_workspace(job, workspace, "sh", "-c", f"'umask 077; echo {encoded} > ~/.saw-search'")
    done = in_workspace(
        job, workspace, "env", f"SAW_SEARCH={variable}", "/opt/saw/bin/python", "-I", "-",
        stdin=Path(sweep.__file__).read_bytes(),
    )  # fmt: skip
    in_workspace(job, workspace, "rm", "-f", "/home/agent/.saw-search")
    try:
        swept = sweep.parse(done.stdout)
    except (ValueError, KeyError) as error:
        text = done.stderr.decode(errors="replace")[-300:]
        return search_finding("error", f"the search gave no result ({done.returncode}, {error}): {text}")
    seen = sweep.search(swept, words)
    planted = dict(zip(words, ("environment:SAW_SEARCH", "/home/agent/.saw-search"), strict=True))
    unseen = [name for name, place in planted.items() if f"{name} in {place}" not in seen]
    hits = sweep.search(swept, job.lab.credentials())
    size = sum(len(content) for _, content in swept.places)
    detail = f"{len(swept.places)} places, {size} bytes searched; found: {', '.join(hits[:5]) or 'none'}"
    if hits:
        return search_finding("allow", detail)
    if unseen or swept.left_out:
        return search_finding("error", f"{detail}; not seen: {unseen or 'none'}; left out: {list(swept.left_out)[:5]}")
    return search_finding("deny", detail)


def search_finding(verdict: str, detail: str) -> dict[str, Any]:
    """Return the record of the credential search."""
    return finding("no credential in the sandbox", "CRED-01", verdict, expected="deny", detail=detail)


def finding(name: str, control: str, verdict: str, *, expected: str, detail: str, digest: str = "") -> dict[str, Any]:
    """Return a call record for something that was judged outside the sandbox."""
    return {
        "name": name, "control": control, "expected": expected, "verdict": verdict, "reason": "",
        "ok": verdict == expected, "policy_digest": digest, "digest_source": "audit" if digest else "none",
        "requests": [], "ms": 0, "detail": detail,
    }  # fmt: skip
