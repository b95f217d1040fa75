"""What another engine found, as findings of ours: the alerts that Falco and Wazuh write, one JSON object a line.

    falco   ``file_output`` with ``json_output: true`` (falco.org, "Falco alerts": formatting and output)
    wazuh   ``alerts.json`` of the manager (documentation.wazuh.com, "Alert management")

Both copy command lines and whole log lines into an alert. These may hold secrets, so that only what is named here is taken
over. Where reading stands is written with the findings, in one transaction.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from saw import jsontext
from saw.audit.events import Severity
from saw.edr.config import Alerts
from saw.edr.detection import ORDER, Detection, printable

KIND = "engine_alert"
AT_ONCE = 1024 * 1024
"""Bytes that one look reads; also the longest line, seen whole or not at all."""
NOTE = "alerts_place"
STILL_LOOKS = 5
"""A file that was replaced is let go of when so many looks in a row it has not grown: an engine writes into it until it opens
the new one."""
_PRIORITY: dict[str, Severity] = {
    "emergency": "critical", "alert": "critical", "critical": "critical", "error": "high", "warning": "medium",
    "notice": "low", "informational": "informational", "info": "informational", "debug": "informational",
}  # fmt: skip
_TECHNIQUE = re.compile(r"T\d{4}(\.\d{3})?")
_NAME = 200
_PROCESS = {"proc.name": "program", "proc.exepath": "path", "evt.type": "call", "container.id": "container"}


class _Falco(msgspec.Struct, frozen=True):
    rule: str
    priority: str
    time: str = ""
    source: str = ""
    tags: tuple[str, ...] = ()
    output_fields: dict[str, Any] = {}


class _Mitre(msgspec.Struct, frozen=True):
    id: tuple[str, ...] = ()


class _Rule(msgspec.Struct, frozen=True):
    level: int
    id: str
    description: str = ""
    groups: tuple[str, ...] = ()
    mitre: _Mitre = _Mitre()


class _Agent(msgspec.Struct, frozen=True):
    id: str = ""
    name: str = ""


class _Syscheck(msgspec.Struct, frozen=True):
    path: str = ""
    event: str = ""


class _Wazuh(msgspec.Struct, frozen=True):
    rule: _Rule
    id: str = ""
    timestamp: str = ""
    agent: _Agent = _Agent()
    location: str = ""
    syscheck: _Syscheck = _Syscheck()


def falco(line: bytes) -> Detection:
    """Return an alert of Falco as a detection; raises :class:`msgspec.DecodeError`. Its ``output`` is not taken over."""
    found = jsontext.decode(line, kind=_Falco)
    fields = found.output_fields
    subject = next(
        (str(fields[name]) for name in ("fd.name", "proc.exepath", "proc.name") if fields.get(name)), found.rule
    )
    evidence: dict[str, Any] = {
        "engine": "falco",
        "rule": printable(found.rule, _NAME),
        "priority": printable(found.priority, 32),
        "seen_at": printable(found.time, 64),
    }
    evidence |= {ours: printable(str(fields[name]), _NAME) for name, ours in _PROCESS.items() if fields.get(name)}
    evidence |= {
        ours: fields[name] for name, ours in (("proc.pid", "pid"), ("user.uid", "uid")) if type(fields.get(name)) is int
    }
    evidence |= _techniques(found.tags)
    severity = _PRIORITY.get(found.priority.lower(), "high")
    return _detection(f"Falco: {found.rule}", subject, severity, evidence, line)


def wazuh(line: bytes) -> Detection:
    """Return an alert of Wazuh as a detection; raises :class:`msgspec.DecodeError`. ``full_log`` and ``data`` are not taken over.

    Levels are read as Wazuh's own pages group them: 15 and more critical, 12 high, 7 medium, less is low.
    """
    found = jsontext.decode(line, kind=_Wazuh)
    level = found.rule.level
    severity: Severity = "critical" if level >= 15 else "high" if level >= 12 else "medium" if level >= 7 else "low"
    evidence: dict[str, Any] = {
        "engine": "wazuh",
        "rule": printable(found.rule.id, 32),
        "level": level,
        "seen_at": printable(found.timestamp, 64),
        "groups": [printable(one, 64) for one in found.rule.groups[:10]],
    }
    named = {
        "agent": found.agent.name, "agent_id": found.agent.id, "alert": found.id, "log": found.location,
        "change": found.syscheck.event,
    }  # fmt: skip
    evidence |= {name: printable(text, _NAME) for name, text in named.items() if text}
    subject = found.syscheck.path or found.agent.name or found.rule.id
    evidence |= _techniques(found.rule.mitre.id)
    title = found.rule.description or f"rule {found.rule.id}"
    return _detection(f"Wazuh: {title}", subject, severity, evidence, line)


def _techniques(named: tuple[str, ...]) -> dict[str, Any]:
    """Return the techniques of MITRE ATT&CK among ``named``, where there are any."""
    found = [one for one in named if _TECHNIQUE.fullmatch(one)][:10]
    return {"techniques": found} if found else {}


def _detection(title: str, subject: str, severity: Severity, evidence: dict[str, Any], line: bytes) -> Detection:
    """Return the detection; a line says when it was written, so that its digest tells one alert from the next."""
    key = f"{KIND}|{hashlib.sha256(line).hexdigest()}"
    return Detection(KIND, subject, printable(title, _NAME), key, severity, evidence)


READERS: dict[str, Callable[[bytes], Detection]] = {"falco": falco, "wazuh": wazuh}


@dataclass(frozen=True)
class Read:
    """What one look found, up to where it read (the value of :data:`NOTE`), and what could not be read: how many lines, and the
    SHA-256 over them."""

    detections: tuple[Detection, ...]
    place: str
    unreadable: int = 0
    unreadable_sha256: str = ""


class Tail:
    """The end of a file that an engine writes. One that was put in its place is begun after the old one was read to its end, and
    has not grown for :data:`STILL_LOOKS` looks.

    A file that was renamed while nobody read is not found again; what was at its end is lost then.
    """

    def __init__(self, settings: Alerts) -> None:
        self._path = Path(settings.file)
        self._reader = READERS[settings.format]
        self._least = ORDER.index(settings.minimum)
        self._stream: BinaryIO | None = None
        self._size = -1
        self._still = 0

    def look(self, place: str | None) -> Read | None:
        """Read on from ``place``, what the last look's :class:`Read` said; None where there is nothing to read.

        Raises :class:`OSError` where the file is there and cannot be read.
        """
        stream = self._open()
        if stream is None:
            return None
        status = os.fstat(stream.fileno())
        self._still = self._still + 1 if status.st_size == self._size and self._replaced(status) else 0
        self._size = status.st_size
        over = self._still >= STILL_LOOKS
        mark, _, offset = (place or "").partition(":")
        start = int(offset) if mark == _mark(status) and offset.isdigit() and int(offset) <= status.st_size else 0
        stream.seek(start)
        raw = stream.read(AT_ONCE)
        whole = raw.rfind(b"\n") + 1
        bad: list[bytes] = []
        detections = []
        if not whole and raw and (over or len(raw) == AT_ONCE):
            # no line of an engine is that long, or nobody ends that line any more
            whole, bad = len(raw), [raw]
        else:
            for line in filter(bytes.strip, raw[:whole].split(b"\n")):
                try:
                    found = self._reader(line)
                except (msgspec.DecodeError, RecursionError):
                    bad.append(line)
                    continue
                if ORDER.index(found.severity) >= self._least:
                    detections.append(found)
        if over and not raw:
            self.close()  # the next look begins the new file; that all of this one was read is written by now
        digest = hashlib.sha256(b"\n".join(bad)).hexdigest() if bad else ""
        return Read(tuple(detections), f"{_mark(status)}:{start + whole}", len(bad), digest)

    def close(self) -> None:
        """Let go of the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._size, self._still = -1, 0

    def _open(self) -> BinaryIO | None:
        if self._stream is None:
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            except FileNotFoundError:
                return None
            self._stream = os.fdopen(descriptor, "rb", buffering=0)
        return self._stream

    def _replaced(self, status: os.stat_result) -> bool:
        try:
            now = self._path.stat()
        except OSError:
            return False
        return (now.st_dev, now.st_ino) != (status.st_dev, status.st_ino)


def _mark(status: os.stat_result) -> str:
    return f"{status.st_dev}-{status.st_ino}"


__all__ = ["KIND", "NOTE", "Read", "Tail", "falco", "wazuh"]
