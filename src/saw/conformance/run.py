"""One run of the kit: send the attempts, read what came back and what arrived, and say what it means."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saw.conformance import transfer
from saw.conformance.case import SUITES, Case, MissingFactError, fill, new_nonce
from saw.conformance.catalogue import twins
from saw.conformance.targets import Session
from saw.conformance.verdict import CaseResult, TwinResult, judge, judge_twin, missing
from saw.errors import UnavailableError

START_S = 60.0
"""Seconds beyond the attempts' own that a target may take to start and end."""


@dataclass
class Asked:
    """One case as it is sent: its arguments are filled in."""

    case: Case
    nonce: str
    arguments: dict[str, Any]

    def sent(self) -> dict[str, Any]:
        """Return what the probe gets."""
        return {
            "id": self.case.id,
            "attempt": self.case.attempt,
            "arguments": self.arguments,
            "seconds": self.case.seconds,
        }

    def tried(self, *, whole: bool = False) -> str:
        """Return the attempt in words for the evidence, in at most 700 characters unless ``whole``."""
        text = json.dumps({"attempt": self.case.attempt, **self.arguments}, ensure_ascii=True)
        return text if whole or len(text) <= 700 else f"{text[:700]}…"


@dataclass
class Outcome:
    """Results of a run so far, and what was wrong with the run itself."""

    cases: list[CaseResult] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def run(
    session: Session,
    cases: tuple[Case, ...],
    *,
    arrivals: tuple[Path, ...] = (),
    say: Callable[[str, list[CaseResult]], None],
) -> Outcome:
    """Run ``cases`` suite by suite; ``say`` is told each suite's results. ``arrivals`` are logs of endpoints outside."""
    outcome = Outcome()
    begin = {path: _size(path) for path in arrivals}
    for suite in SUITES:
        mine = [case for case in cases if case.suite == suite]
        if not mine:
            continue
        found = _suite(session, mine, outcome, begin)
        outcome.cases += found
        say(suite, found)
    return outcome


def _suite(session: Session, cases: list[Case], outcome: Outcome, logs: dict[Path, int]) -> list[CaseResult]:
    asked, absent = _ask(session, [*(twins()[name] for name in sorted({c.twin for c in cases if c.twin})), *cases])
    signals = session.canary.signals if session.canary else 0
    answer = transfer.Answer()
    if any(not item.case.is_twin for item in asked.values()):
        answer = _probe(session, list(asked.values()))
    if session.recorder:
        session.recorder.sync()
    outcome.problems += [f"{cases[0].suite}: {text}" for text in answer.problems]
    seen = _outside(logs)

    def arrived(case: Case) -> list[str] | None:
        item = asked[case.id]
        found = [f"a log outside holds {item.nonce}"] if item.nonce in seen else []
        if "http_proxy" in case.facts():
            if session.recorder:
                found += session.recorder.arrived.get(item.nonce, [])
            return found if found or _heard(session, item, bool(logs)) else None
        if case.recorded and session.canary and case.attempt == "host-process":
            return ["the process of the host got the signal"] if session.canary.signals > signals else []
        if session.recorder:
            found += session.recorder.arrived.get(item.nonce, [])
        elif not logs:
            return None
        return found if case.recorded or found or logs else None

    twin_results = {
        name: judge_twin(asked[name].case, answer.told.get(name), arrived(asked[name].case)) if name in asked
        else TwinResult(name, "not_applicable", absent[name])
        for name in {case.twin for case in cases if case.twin}
    }  # fmt: skip
    results = []
    for case in cases:
        if case.id not in asked:
            results.append(missing(case, absent[case.id]))
            continue
        twin = twin_results[case.twin] if case.twin else TwinResult("", "none", case.no_twin)
        results.append(
            judge(case, answer.told.get(case.id), arrived(case), twin, ours=session.ours, tried=asked[case.id].tried())
        )
    return results


def destination(authority: str) -> tuple[str, int] | None:
    """Return address and port to which ``authority`` leads by itself, in whichever form it is written; None for a name."""
    host, _, port = authority.rpartition(":")
    host = "127.0.0.1" if host.rstrip(".") == "localhost" else host.strip("[]")
    if not port.isdigit():
        return None
    try:
        found = ipaddress.ip_address(host if ":" in host else socket.inet_aton(host))
    except (OSError, ValueError):
        return None
    mapped = found.ipv4_mapped if found.version == 6 else None
    address = str(mapped or found)
    return "127.0.0.1" if address == "0.0.0.0" else address, int(port)  # noqa: S104 - where Linux leads it


def _heard(session: Session, item: Asked, logs: bool) -> bool:
    """Return whether somebody outside would have noticed a call through the proxy that came through.

    A log at the far end tells of requests to it; a bare tunnel is heard by a recorder at the very address that it leads to.
    """
    if item.nonce not in item.tried(whole=True):
        return False
    if item.case.attempt != "connect":
        return logs
    place = destination(item.arguments["authority"])
    return place is not None and session.recorder is not None and f"tcp {place[0]} {place[1]}" in session.recorder.bound


def _ask(session: Session, cases: list[Case]) -> tuple[dict[str, Asked], dict[str, str]]:
    """Return what can be asked of the target, and why the rest cannot."""
    asked: dict[str, Asked] = {}
    absent: dict[str, str] = {}
    for case in cases:
        nonce = new_nonce()
        try:
            arguments = fill(case, session.facts, nonce)
        except MissingFactError as error:
            absent[case.id] = str(error)
            continue
        unheard = _unheard(session, case, arguments)
        if unheard:
            absent[case.id] = unheard
            continue
        asked[case.id] = Asked(case, nonce, arguments)
    return asked, absent


def _unheard(session: Session, case: Case, arguments: dict[str, Any]) -> str:
    """Return why nothing could prove that this case did not arrive, or nothing."""
    if not case.recorded or case.is_twin or case.attempt in {"host-process", "resolve"}:
        return ""
    if session.recorder is None:
        return "no recorder outside"
    bound = session.recorder.bound
    if case.attempt == "unix":
        name = f"unix {arguments['path']}"
    elif case.attempt == "icmp":
        name = "icmp6" if ":" in arguments["address"] else "icmp"
    else:
        kind = "udp" if case.attempt == "udp" or arguments.get("over") == "udp" else "tcp"
        address = arguments["address"].removeprefix("::ffff:")
        address = "127.0.0.1" if address == "0.0.0.0" else address  # noqa: S104 - where Linux leads it
        name = f"{kind} {address} {arguments.get('port', 53)}"
    return "" if name in bound else f"no recorder outside ({name})"


def _probe(session: Session, asked: list[Asked]) -> transfer.Answer:
    token = secrets.token_hex(12)
    job = {"token": token, "cases": [item.sent() for item in asked]}
    limit = START_S + sum(item.case.seconds for item in asked)
    with tempfile.TemporaryFile() as mark:
        mark.write(session.descriptor_mark.encode())
        mark.flush()
        keep = (mark.fileno(),) if session.descriptor_mark else ()
        output, code, words = _send(session, transfer.script(job), limit, keep)
    answer = transfer.read(output, token, {item.case.id for item in asked})
    if not answer.told and code != 0:
        raise UnavailableError(
            f"the probe did not run in {session.name} (exit {code}): {words.strip()[-500:]}",
            cure="check that the command runs Python 3.9 or later inside, with standard input passed through",
        )
    return answer


def _send(session: Session, program: bytes, limit: float, keep: tuple[int, ...]) -> tuple[bytes, int, str]:
    """Run the target's command with ``program`` as standard input; return output, exit code and the end of its messages.

    A target that writes without end is ended at :data:`saw.conformance.transfer.LONGEST_OUTPUT`.
    """
    output, messages, deadline = b"", b"", time.monotonic() + limit
    with tempfile.TemporaryFile() as given, selectors.DefaultSelector() as selector:
        given.write(program)
        given.seek(0)
        process = subprocess.Popen(
            session.command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=keep,
            start_new_session=True,
        )  # fmt: skip
        try:
            for stream in (process.stdout, process.stderr):
                assert stream is not None  # noqa: S101 - a pipe was asked for
                selector.register(stream, selectors.EVENT_READ, stream is process.stdout)
            while selector.get_map() and len(output) <= transfer.LONGEST_OUTPUT:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                for key, _ in selector.select(left):
                    piece = os.read(key.fd, 65536)
                    if not piece:
                        selector.unregister(key.fileobj)
                    elif key.data:
                        output += piece
                    else:
                        messages = (messages + piece)[-65536:]
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5 if not selector.get_map() else 0)
        finally:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
            for stream in (process.stdout, process.stderr):
                if stream:
                    stream.close()
    return output, code, messages.decode("utf-8", "replace")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UnavailableError(
            f"cannot read {path}: {error.strerror}", cure="name the log of an endpoint outside"
        ) from error


def _outside(logs: dict[Path, int]) -> str:
    text = ""
    for path, begin in logs.items():
        if _size(path) < begin:
            raise UnavailableError(
                f"{path} became shorter during the run", cure="keep the log in place until the run has ended"
            )
        with path.open("rb") as stream:
            stream.seek(begin)
            text += stream.read().decode("utf-8", "replace")
    return text
