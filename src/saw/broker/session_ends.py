"""How sessions through a bastion are told to end, inside the transaction of whatever takes their reason to exist away."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Row, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.schema import sessions
from saw.broker.store import Transaction

PROTOCOL = "ssh-bastion"


def session_key(identifier: str) -> str:
    """Return under which key the bastion waits for news of a session."""
    return f"*session*{identifier}"


class SessionEnds:
    """Ends sessions (control ID-03)."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def end(
        self, tx: Transaction, caller: Caller, wanted: ColumnElement[bool], reason: str, detail: str = ""
    ) -> list[str]:
        """Tell every session that ``wanted`` selects to end and return their ids; those who wait for news hear it at once.

        One that nobody has redeemed yet is over with this; one that has ended already is left alone.
        """
        now = self._s.clock()
        alive = (sessions.c.kind == "bastion") & sessions.c.ended_at.is_(None) & sessions.c.closed_at.is_(None)
        rows = tx.connection.execute(select(sessions).where(alive & wanted)).all()
        for row in rows:
            values = {"end_reason": reason, "ended_at": iso(now)}
            if row.redeemed_at is None:
                values["closed_at"] = iso(now)
            tx.connection.execute(sessions.update().where(sessions.c.id == row.id).values(**values))
            tx.record(
                self._s.events.api_activity(
                    now,
                    caller.subject(row.workspace_id),
                    "session.end",
                    activity="update",
                    message=reason,
                    resource=("session", row.id),
                    detail={"session": row.id, "reason": reason, "why": detail, "of": holder(row)},
                )
            )
        tx.wake(*(session_key(row.id) for row in rows))
        return [row.id for row in rows]

    def end_workspace(self, tx: Transaction, caller: Caller, workspace: str, state: str, why: str) -> None:
        """The workspace is in ``state`` now, in which nobody has a session."""
        self.end(tx, caller, sessions.c.workspace_id == workspace, f"workspace_{state}", why)

    def end_sign_ins(self, tx: Transaction, caller: Caller, signed_in: list[str], why: str) -> None:
        """These sign-ins are over: so are the sessions that were opened with them."""
        self.end(tx, caller, sessions.c.sso_session.in_(signed_in), "sign_in_ended", why)

    def end_person(self, tx: Transaction, caller: Caller, name: str, why: str) -> None:
        """The person has lost the role that sessions need."""
        self.end(tx, caller, sessions.c.person == name, "not_entitled", why)


def holder(row: Row[Any]) -> str:
    """Return whose session it is, as a principal."""
    return f"user:{row.person}" if row.person else str(row.principal)
