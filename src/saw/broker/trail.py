"""Reading the audit trail: pages of events, and the proof that what is stored is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection, func, select

from saw import jsontext
from saw.audit import ChainedEvent, verify_chain
from saw.audit.choose import Choice
from saw.audit.removal import OPERATION, TELLER, Removals, moment
from saw.broker.context import Caller, Services
from saw.broker.schema import audit_events, audit_heads
from saw.broker.store import SOURCE, chained_rows, content_of, read_head

MAX_PAGE = 1000
#: How many events one call looks at, and how many bytes of them it returns at most (one event more may be in).
MAX_SCAN = 5000
MAX_BYTES = 4 * 1024 * 1024
#: Over how many positions one look back goes.
MAX_BACK = 20_000


class Trail:
    """The stored chains of the broker and of every gatekeeper."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def page(self, source: str, after: int, limit: int) -> dict[str, Any]:
        """Return up to ``limit`` chained events of ``source`` behind ``after``, ascending, with the chain's head.

        ``sources`` are all chains that are held, also one whose head somebody removed.
        """
        with self._s.store.read() as connection:
            query = (
                select(audit_events)
                .where(audit_events.c.source == source, audit_events.c.seq > after)
                .order_by(audit_events.c.seq)
                .limit(max(1, min(limit, MAX_PAGE)))
            )
            events = list(chained_rows(connection.execute(query)))
            head = read_head(connection, source)
            sources = _sources(connection)
        return {"source": source, "events": events, "head": head, "sources": sources}

    def log(self, after: int, limit: int, choice: Choice) -> dict[str, Any]:
        """Return up to ``limit`` chosen events behind position ``after``, over all chains in the order of arrival.

        ``next`` is the position up to which was looked (ask again behind it), ``end`` that of the last event there is.
        ``before`` names the event at ``after`` (None: nothing is there), so that a reader sees when what it has read is
        no longer what is stored. An event whose content retention removed is there as an empty object, unless something
        was asked of its content. One call looks at 5,000 events at most and returns about 4 MiB.
        """
        columns = audit_events.c
        found: list[dict[str, Any]] = []
        size, seen = 0, after
        with self._s.store.read() as connection:
            end = int(connection.execute(select(func.coalesce(func.max(columns.position), 0))).scalar_one())
            place = select(columns.source, columns.seq, columns.hash).where(columns.position == after)
            before = connection.execute(place).one_or_none()
            query = select(audit_events).where(columns.position > after).order_by(columns.position).limit(MAX_SCAN)
            with connection.execution_options(yield_per=200).execute(query) as rows:
                for row in rows:
                    seen = row.position
                    event = content_of(row)
                    if _chosen(choice, row.source, event, row.event):
                        item = ChainedEvent(row.source, row.seq, row.prev, event, row.hash)
                        found.append({"position": row.position, **msgspec.structs.asdict(item)})
                        size += len(row.event)
                    if len(found) >= max(1, min(limit, MAX_PAGE)) or size >= MAX_BYTES:
                        break
        return {"events": found, "next": seen, "end": end, "before": None if before is None else before._asdict()}

    def back(self, before: int | None, limit: int, choice: Choice, span: int = MAX_BACK) -> dict[str, Any]:
        """Return up to ``limit`` chosen events in front of position ``before`` (None: the end), the newest first.

        ``next`` is the position to look back from next, 0 when the beginning was reached. One call looks at ``span`` events
        at most, so that it can find fewer than there are. What retention removed is not among them.
        """
        columns = audit_events.c
        found: list[dict[str, Any]] = []
        with self._s.store.read() as connection:
            end = int(connection.execute(select(func.coalesce(func.max(columns.position), 0))).scalar_one())
            top = end + 1 if before is None else min(before, end + 1)
            reached = max(1, top - span)
            query = select(audit_events).where(columns.position < top, columns.position >= reached, columns.event != "")
            for part in _parts(choice):
                query = query.where(columns.event.contains(part, autoescape=True))
            query = query.order_by(columns.position.desc())
            with connection.execution_options(yield_per=200).execute(query) as rows:
                for row in rows:
                    event = jsontext.decode(row.event)
                    if choice.takes(row.source, event, row.event):
                        item = ChainedEvent(row.source, row.seq, row.prev, event, row.hash)
                        found.append({"position": row.position, **msgspec.structs.asdict(item)})
                    if len(found) >= max(1, min(limit, MAX_PAGE)):
                        reached = row.position
                        break
        return {"events": found, "next": reached if reached > 1 else 0, "end": end}

    def taken(self, caller: Caller, choice: Choice) -> None:
        """Record that somebody takes a copy of the chosen events away."""
        filters = {name: value for name, value in msgspec.to_builtins(choice).items() if value not in {None, ""}}
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.api_activity(
                    self._s.clock(),
                    caller.subject(choice.workspace),
                    "audit.download",
                    activity="read",
                    message="events of the trail were downloaded",
                    detail={"filters": filters},
                )
            )

    def verify(self) -> dict[str, Any]:
        """Verify every chain against its stored head. ``removed``: how many events retention has removed, rightly, and the times
        of the oldest and the youngest (null when there are none)."""
        chains: list[dict[str, Any]] = []
        findings: list[Any] = []
        with self._s.store.read() as connection:
            told = removals_of(connection)
            total = int(connection.execute(select(func.count()).select_from(audit_events)).scalar_one())
            for source in _sources(connection):
                report = verify_chain(_events(connection, source), read_head(connection, source), told=told.tell)
                findings.extend(report.findings)
                chains.append(
                    {
                        "source": source,
                        "complete": report.complete,
                        "events": report.count,
                        "removed": report.removed,
                        "head": msgspec.to_builtins(report.head),
                    }
                )
        span = told.span()
        removed = {
            "events": sum(chain["removed"] for chain in chains),
            "first": None if span is None else moment(span[0]),
            "last": None if span is None else moment(span[1]),
        }
        return {"complete": not findings, "events": total, "removed": removed, "chains": chains, "findings": findings}


def removals_of(connection: Connection) -> Removals:
    """Return what the stored trail tells of removals by retention."""
    columns = audit_events.c
    query = select(audit_events).where(columns.source == TELLER, columns.event.contains(f'"{OPERATION}"'))
    return Removals(chained_rows(connection.execute(query.order_by(columns.seq))))


def _chosen(choice: Choice, source: str, event: dict[str, Any], raw: str) -> bool:
    if event:
        return choice.takes(source, event, raw)
    return choice == Choice(source=choice.source) and choice.source in {"", source}


def _sources(connection: Connection) -> list[str]:
    """Return the names of all chains, by one look into the index for each."""
    found = {SOURCE, *connection.execute(select(audit_heads.c.source)).scalars()}
    last: str | None = ""
    while last is not None:
        found.add(last)
        query = select(func.min(audit_events.c.source)).where(audit_events.c.source > last)
        last = connection.execute(query).scalar_one()
    return sorted(found - {""})


def _parts(choice: Choice) -> Iterator[str]:
    """Yield what the stored text of every chosen event has in it, for the database to look for first."""
    for name in ("workspace", "agent", "principal"):
        if wanted := getattr(choice, name):
            yield f'"{name}":{msgspec.json.encode(wanted).decode()}'


def _events(connection: Connection, source: str) -> Iterator[ChainedEvent]:
    query = select(audit_events).where(audit_events.c.source == source).order_by(audit_events.c.seq)
    yield from chained_rows(connection.execution_options(yield_per=500).execute(query))
