"""Reading the audit trail: pages of events, and the proof that what is stored is whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from sqlalchemy import Connection, func, select

from saw.audit import ChainedEvent, verify_chain
from saw.broker.context import Services
from saw.broker.schema import audit_events, audit_heads
from saw.broker.store import SOURCE, chained_rows, read_head

MAX_PAGE = 1000


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

    def verify(self) -> dict[str, Any]:
        """Verify every chain against its stored head."""
        chains: list[dict[str, Any]] = []
        findings: list[Any] = []
        with self._s.store.read() as connection:
            total = int(connection.execute(select(func.count()).select_from(audit_events)).scalar_one())
            for source in _sources(connection):
                report = verify_chain(_events(connection, source), read_head(connection, source))
                findings.extend(report.findings)
                chains.append(
                    {
                        "source": source,
                        "complete": report.complete,
                        "events": report.count,
                        "head": msgspec.to_builtins(report.head),
                    }
                )
        return {"complete": not findings, "events": total, "chains": chains, "findings": findings}


def _sources(connection: Connection) -> list[str]:
    """Return the names of all chains, by one look into the index for each."""
    found = {SOURCE, *connection.execute(select(audit_heads.c.source)).scalars()}
    last: str | None = ""
    while last is not None:
        found.add(last)
        query = select(func.min(audit_events.c.source)).where(audit_events.c.source > last)
        last = connection.execute(query).scalar_one()
    return sorted(found - {""})


def _events(connection: Connection, source: str) -> Iterator[ChainedEvent]:
    query = select(audit_events).where(audit_events.c.source == source).order_by(audit_events.c.seq)
    yield from chained_rows(connection.execution_options(yield_per=500).execute(query))
