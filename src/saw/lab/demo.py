"""The demonstration on a running workspace: attach, engagement, and what arrived at the far end."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saw.errors import UnavailableError
from saw.lab.process import wait_for

if TYPE_CHECKING:
    from saw.lab.up import Bringup


def in_workspace(
    job: Bringup, workspace: str, *command: str, stdin: bytes = b"", timeout: float = 300
) -> subprocess.CompletedProcess[bytes]:
    """Run a command in the workspace's sandbox through ``saw ssh``."""
    argv = [str(Path(sys.executable).with_name("saw")), "ssh", workspace, "--", *command]
    environment = {**os.environ, "SAW_CONTEXT": str(job.lab.context_file)}
    try:
        return subprocess.run(argv, input=stdin, capture_output=True, check=False, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"`{' '.join(command[:3])}` in {workspace} did not end within {timeout:.0f} s"
        ) from error


def wait_shell(job: Bringup, workspace: str) -> None:
    """Wait until a command runs in the sandbox: SSH server, certificate and sandbox are up some seconds after the lease."""
    job.progress.say("waiting for the workspace's SSH server and sandbox")
    wait_for(
        f"a shell in {workspace}",
        lambda: in_workspace(job, workspace, "true").returncode == 0,
        patience=180,
        interval=1.0,
        cure="look at the VM's console and at the audit trail",
    )


def check_attach(job: Bringup, workspace: str) -> dict[str, Any]:
    """Attach: one command, and twice the persistent multiplexer, in which the first attachment's work must still be there."""
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
    sessions = in_workspace(job, workspace, "tmux", "-S", "/run/saw/shell/tmux.sock", "list-sessions")
    multiplexer = sessions.returncode == 0
    job.progress.say(
        f"shell as {user} in {seconds} s; multiplexer: {sessions.stdout.decode(errors='replace').strip() or 'none'}"
    )
    return {"ok": user == "agent" and multiplexer, "user": user, "seconds": seconds, "multiplexer": multiplexer}


def run_engagement(job: Bringup, workspace: str, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Run the engagement's program in the sandbox; add what the far end recorded. Returns the report's ``calls``."""
    wait_first_call(job, workspace)
    mark = len(arrivals(job))
    done = in_workspace(job, workspace, "/opt/saw/bin/python", "-I", "-m", "saw.lab.engagement", *names, timeout=900)
    try:
        calls = list(json.loads(done.stdout.decode().strip().splitlines()[-1])["calls"])
    except (ValueError, IndexError, KeyError) as error:
        text = (done.stderr + done.stdout).decode(errors="replace")[-1200:]
        raise UnavailableError(f"the engagement gave no result ({done.returncode}): {text}") from error
    digest = job.saw("workspace", "show", workspace).get("policy_digest", "")
    for call in calls:
        call["policy_digest"] = call["policy_digest"] or digest
    if not names:
        calls += far_end_findings(job, workspace, arrivals(job)[mark:], digest)
    return calls


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
        wait_for("the first governed call", answered, patience=120, interval=1.0)
    except UnavailableError as error:
        text = last.decode(errors="replace").strip()[-800:]
        raise UnavailableError(f"{error.message}; the last try: {text}", cure="saw audit events tells more") from error


def arrivals(job: Bringup) -> list[dict[str, Any]]:
    """Return what the far end recorded, request by request."""
    text = job.on_host("enterprise", "cat", "/var/log/nginx/arrivals.jsonl")
    return [json.loads(line) for line in text.splitlines() if line]


def far_end_findings(job: Bringup, workspace: str, arrived: list[dict[str, Any]], digest: str) -> list[dict[str, Any]]:
    """Judge the far end's record: real credentials arrived there, nothing refused did, and none is in the sandbox."""
    secrets = job.lab.credentials()
    git = "Basic " + base64.b64encode(f"x-access-token:{secrets['git-token']}".encode()).decode()
    wanted = {
        "git.example.com": git,
        "api.example.com": f"Bearer {secrets['api-token']}",
        "models.example.com": f"Bearer {secrets['model-key']}",
    }
    findings = []
    for host, value in wanted.items():
        seen = [item for item in arrived if item["host"] == host]
        right = bool(seen) and all(item["authorization"] == value for item in seen)
        findings.append(
            finding(
                f"credential arrived at {host.partition('.')[0]}",
                "CRED-01",
                "allow",
                right=right,
                digest=digest,
                count=len(seen),
            )
        )
    refused = [item for item in arrived if "/admin" in item["uri"] or item["method"] == "DELETE" or item["saw_headers"]]
    findings.append(
        finding("nothing refused arrived", "NET-01", "deny", right=not refused, digest=digest, count=len(refused))
    )
    environment = in_workspace(job, workspace, "env").stdout.decode(errors="replace")
    clean = not any(value in environment for value in secrets.values())
    findings.append(finding("no credential in the sandbox", "CRED-01", "deny", right=clean, digest=digest, count=0))
    return findings


def finding(name: str, control: str, expected: str, *, right: bool, digest: str, count: int) -> dict[str, Any]:
    """Return a call record for something that was judged outside the sandbox."""
    other = "deny" if expected == "allow" else "allow"
    return {
        "name": name, "control": control, "expected": expected, "verdict": expected if right else other, "reason": "",
        "ok": right, "policy_digest": digest, "ms": 0, "detail": f"{count} requests recorded at the far end",
    }  # fmt: skip
