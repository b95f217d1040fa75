"""One detection, before it is an event: what was seen, where, and by what it is told apart from the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any

import msgspec

from saw.audit.events import EventFactory, Severity, Subject
from saw.errors import SawError

#: One look reports so many findings of a kind one by one, the worst first; the rest is counted in one more.
AT_ONCE = 50
#: So many of a kind are reported one by one where they are high or critical.
WORST_AT_ONCE = 500
#: Severities, the least first.
ORDER: tuple[Severity, ...] = ("informational", "low", "medium", "high", "critical")
_TEXT = 500


class EdrError(SawError):
    """A part of endpoint detection cannot do its work."""

    code = "edr_failed"


class Detection(msgspec.Struct, frozen=True):
    """Something that ought not to be. ``subject`` is a path or a process; ``key`` is equal for two sights of one thing.

    ``kind`` is one of ``saw.edr.config.Kind``, or of another part that has a spool (``saw.patching.findings``).
    ``evidence`` holds JSON values and never a command line, an environment or a file's content: those may hold secrets.
    """

    kind: str
    subject: str
    title: str
    key: str
    severity: Severity = "high"
    evidence: Mapping[str, Any] = {}


def event_of(
    detection: Detection, factory: EventFactory, time: datetime, workspace: str = "", *, principal: str = "saw-edr"
) -> dict[str, Any]:
    """Return ``detection`` as an OCSF 1.8 Detection Finding (class 2004) that was validated; ``principal`` found it."""
    return factory.detection_finding(
        time,
        Subject(principal=principal, workspace=workspace),
        kind=detection.kind,
        title=f"{detection.title}: {printable(detection.subject)}",
        severity=detection.severity,
        detail={"kind": detection.kind, "subject": printable(detection.subject), **detection.evidence},
    )


def printable(text: str, limit: int = _TEXT) -> str:
    """Return ``text`` in one line that is valid UTF-8, with what is not printable escaped, at most ``limit`` characters."""
    safe = "".join(
        one if one.isprintable() else repr(one)[1:-1] for one in text.encode("utf-8", "backslashreplace").decode()
    )
    return safe if len(safe) <= limit else safe[: limit - 1] + "…"


def bounded(detections: Iterable[Detection], limit: int = AT_ONCE, worst: int = WORST_AT_ONCE) -> list[Detection]:
    """Keep ``limit`` of each kind, the worst first, and of what is high or critical up to ``worst``.

    What is beyond them is one detection of its highest severity that counts it and names some. The order stays.
    """
    kinds: dict[str, list[tuple[int, Detection]]] = {}
    for place, one in enumerate(detections):
        kinds.setdefault(one.kind, []).append((place, one))
    kept: list[tuple[int, Detection]] = []
    beyond: list[list[Detection]] = []
    for found in kinds.values():
        found.sort(key=lambda pair: -ORDER.index(pair[1].severity))
        grave = sum(one.severity in ("high", "critical") for _, one in found)
        end = max(limit, min(grave, worst))
        kept += found[:end]
        beyond += [[one for _, one in found[end:]]] if found[end:] else []
    return [one for _, one in sorted(kept, key=lambda pair: pair[0])] + [_counted(rest) for rest in beyond]


def _counted(rest: list[Detection]) -> Detection:
    """Return one detection in place of ``rest``, the worst of which comes first."""
    first = rest[0]
    return Detection(
        first.kind,
        f"{len(rest)} more",
        first.title,
        f"more|{first.key}|{len(rest)}",
        first.severity,
        {"count": len(rest), "some": [printable(one.subject, 200) for one in rest[:10]]},
    )


Now = Callable[[], datetime]
#: Makes an event of a detection: with a factory, a time and the id of the workspace.
Render = Callable[[Detection, EventFactory, datetime, str], dict[str, Any]]

__all__ = [
    "AT_ONCE",
    "ORDER",
    "WORST_AT_ONCE",
    "Detection",
    "EdrError",
    "Now",
    "Render",
    "bounded",
    "event_of",
    "printable",
]
