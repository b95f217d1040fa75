"""The hash chain over audit events: append, and the proof that a copy is complete.

A chained event is ``{"source", "seq", "prev", "event", "hash"}`` with ``seq`` dense from 1, ``prev`` the hash of the event
before it (64 zeros for the first) and ``hash = SHA-256(canonical({"source","seq","prev","event"}))``, canonical being
RFC 8785. A chain proves what lies between two of its events; that nothing was cut off its end is only visible against a
head that was kept elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
import rfc8785

from saw.audit.ocsf import validate
from saw.errors import SawError

ZERO = "0" * 64


class ChainError(SawError):
    """An event cannot be chained."""

    code = "chain_error"


class ChainedEvent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One event in its chain; hashes are lower-case hex."""

    source: str
    seq: int
    prev: str
    event: dict[str, Any]
    hash: str


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The end of a chain: ``seq`` 0 and 64 zeros when it is empty."""

    seq: int = 0
    hash: str = ZERO


class ChainFinding(msgspec.Struct, frozen=True):
    """One defect of a chain. ``code`` is ``changed``, ``removed``, ``reordered``, ``duplicate``, ``relinked``,
    ``truncated`` or ``foreign`` (of another source)."""

    code: str
    source: str
    seq: int
    detail: str


class ChainReport(msgspec.Struct, frozen=True):
    """The outcome of a verification; ``complete`` is true exactly when there is no finding.

    ``removed``: how many of the ``count`` events have no content any more, rightly.
    """

    source: str
    complete: bool
    findings: tuple[ChainFinding, ...]
    head: Head
    count: int
    removed: int = 0


def event_hash(source: str, seq: int, prev: str, event: Mapping[str, Any]) -> str:
    """Return the hash of one link, lower-case hex. Raises :class:`ChainError` for a value that RFC 8785 cannot hold."""
    try:
        raw = rfc8785.dumps({"source": source, "seq": seq, "prev": prev, "event": dict(event)})
    except rfc8785.CanonicalizationError as error:
        raise ChainError(f"event {seq} of {source} has no canonical form: {error}") from error
    return hashlib.sha256(raw).hexdigest()


def link(source: str, head: Head, event: Mapping[str, Any]) -> ChainedEvent:
    """Return ``event`` as the successor of ``head``."""
    seq = head.seq + 1
    return ChainedEvent(source, seq, head.hash, dict(event), event_hash(source, seq, head.hash, event))


class Chain:
    """A growing chain of one source. It keeps only its head; the caller stores what :meth:`append` returns."""

    def __init__(self, source: str, head: Head | None = None) -> None:
        self.source = source
        self.head = head or Head()

    def append(self, event: Mapping[str, Any]) -> ChainedEvent:
        """Validate ``event`` against OCSF 1.8, link it and move the head. Raises ``EventInvalid`` and moves nothing."""
        validate(event)
        chained = link(self.source, self.head, event)
        self.head = Head(chained.seq, chained.hash)
        return chained


def verify_chain(
    events: Iterable[ChainedEvent],
    expect_head: Head | None = None,
    *,
    start: Head | None = None,
    told: Callable[[str, int], bool] = lambda _source, _seq: False,
) -> ChainReport:
    """Check that ``events``, in the order given, are one whole chain.

    Finds a removed, changed, reordered, repeated or relinked event, one of another source, and, against ``expect_head``,
    a tail that was cut off; a chain that grew beyond the known head is fine if that head is still part of it. ``start``
    is the head before the first event when only a part of a chain is checked. ``told`` says of source and number whether
    retention removed the content of an event (:mod:`saw.audit.removal`); any other one without content counts as removed.
    """
    head = start or Head()
    source = ""
    findings: list[ChainFinding] = []
    count = removed = 0
    for item in events:
        count += 1
        source = source or item.source
        problem = _problem(item, source, head, told)
        removed += not item.event and problem is None
        if problem is not None:
            findings.append(ChainFinding(problem[0], source, item.seq, problem[1]))
        if item.source == source and item.seq > head.seq:
            head = Head(item.seq, item.hash)
        if expect_head is not None and item.seq == expect_head.seq and item.hash != expect_head.hash:
            findings.append(ChainFinding("relinked", source, item.seq, "this is not the event that was known as head"))
    if expect_head is not None and head.seq < expect_head.seq:
        detail = f"the chain ends at {head.seq}, its known head is {expect_head.seq}"
        findings.append(ChainFinding("truncated", source, head.seq + 1, detail))
    return ChainReport(source, not findings, tuple(findings), head, count, removed)


def _problem(item: ChainedEvent, source: str, head: Head, told: Callable[[str, int], bool]) -> tuple[str, str] | None:
    if item.source != source:
        return "foreign", f"the event belongs to {item.source}"
    if item.seq == head.seq:
        return "duplicate", f"sequence number {item.seq} appears twice"
    if item.seq < head.seq:
        return "reordered", f"{item.seq} comes after {head.seq}"
    if not item.event and not told(item.source, item.seq):
        return "removed", "its content is gone, and no removal by retention names it"
    if item.event and event_hash(item.source, item.seq, item.prev, item.event) != item.hash:
        return "changed", "the content does not match its hash"
    if item.seq > head.seq + 1:
        return "removed", f"{head.seq + 1} to {item.seq - 1} are missing"
    if item.prev != head.hash:
        return "relinked", f"prev is not the hash of {head.seq}"
    return None
