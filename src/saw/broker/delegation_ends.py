"""How delegations are ended, inside the transaction of whatever takes their reason to exist away."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, Row, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.schema import delegations
from saw.broker.store import Transaction
from saw.policy.delegation import Delegation, parse_delegation

DELEGATIONS = "*delegations*"
"""The key of those who wait for a change of any delegation."""


def record_of(row: Row[Any]) -> Delegation:
    """Return the record in a row of ``delegations``."""
    return parse_delegation(row.record.encode())


def held_by(connection: Connection, agent: Row[Any], now: str) -> list[Row[Any]]:
    """Return the delegations of ``agent`` that are neither revoked nor past at ``now`` (as the register writes times)."""
    counting = delegations.c.revoked_at.is_(None) & (delegations.c.expires_at > now)
    mine = delegations.c.workspace_id == agent.workspace_id
    query = select(delegations).where(counting, mine).order_by(delegations.c.issued_at, delegations.c.id)
    return [row for row in connection.execute(query).all() if record_of(row).agent == agent.id]


class DelegationEnds:
    """Ends delegations (control DEL-01)."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def end(self, tx: Transaction, caller: Caller, rows: Iterable[Row[Any]], reason: str) -> list[str]:
        """Revoke ``rows`` and all that was made from them; return the ids of what ended, perimeters are woken."""
        now = self._s.clock()
        ended = [row for row in _below(tx.connection, list(rows)) if not row.revoked_at]
        if not ended:
            return []
        seq = tx.touch(*{row.workspace_id for row in ended})
        tx.wake(DELEGATIONS)
        for row in ended:
            values: dict[str, object] = {
                "revoked_by": caller.principal,
                "revoked_at": iso(now),
                "revoked_reason": reason,
            }
            values |= {"version": row.version + 1, "seq": seq}
            tx.connection.execute(delegations.update().where(delegations.c.id == row.id).values(**values))
            record = record_of(row)
            tx.record(
                self._s.events.entity_management(
                    now,
                    caller.subject(row.workspace_id, agent=record.agent),
                    ("delegation", row.id),
                    activity="deactivate",
                    comment=reason,
                    detail={"delegation": row.id, "parent": record.parent},
                )
            )
        return [row.id for row in ended]


def _below(connection: Connection, rows: list[Row[Any]]) -> list[Row[Any]]:
    """Return ``rows`` and everything that was made from them, each once."""
    found = {row.id: row for row in rows}
    pending = list(found)
    while pending:
        children = connection.execute(select(delegations).where(delegations.c.parent.in_(pending))).all()
        pending = [child.id for child in children if child.id not in found]
        found |= {child.id: child for child in children if child.id not in found}
    return list(found.values())
