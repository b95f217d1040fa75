"""What the audit trail says of a session through a bastion: asked for, opened, closed, and each refusal."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row

from saw.broker.context import Caller, Services
from saw.broker.errors import ConflictError, ForbiddenError
from saw.broker.session_ends import PROTOCOL, holder
from saw.broker.store import Transaction
from saw.sessions.messages import Closing, Redeem


class SessionRecords:
    """Writes the events, in the transaction of what they are about."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def request(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        refused: ForbiddenError | None,
        *,
        detail: dict[str, object],
        session: str = "",
        expires: datetime | None = None,
    ) -> None:
        tx.record(
            self._s.events.authentication(
                self._s.clock(),
                caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or ""),
                activity="ticket",
                outcome="success" if refused is None else "failure",
                protocol=PROTOCOL,
                session_uid=session,
                expires=expires,
                message="session requested",
                status_detail="" if refused is None else refused.code,
                detail=detail,
            )
        )

    def opening(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any] | None,
        body: Redeem,
        refused: ForbiddenError | ConflictError | None,
    ) -> None:
        tx.record(
            self._s.events.authentication(
                self._s.clock(),
                caller.subject("" if row is None else row.workspace_id),
                activity="logon",
                outcome="success" if refused is None else "failure",
                protocol=PROTOCOL,
                session_uid=body.session_id,
                message="session opened" if refused is None else "session refused",
                status_detail="" if refused is None else refused.code,
                detail={
                    "session": body.session_id,
                    "of": "" if row is None else holder(row),
                    "from": body.address,
                    "command": body.command[:256],
                    "terminal": body.terminal,
                    **_forwarded(row),
                },
            )
        )

    def closing(self, tx: Transaction, caller: Caller, row: Row[Any], reason: str, said: Closing | None) -> None:
        tx.record(
            self._s.events.authentication(
                self._s.clock(),
                caller.subject(row.workspace_id),
                activity="logoff",
                protocol=PROTOCOL,
                session_uid=row.id,
                message="session closed",
                status_detail=reason,
                detail={
                    "session": row.id,
                    "of": holder(row),
                    "reason": reason,
                    "recording_sha256": "" if said is None else said.digest or "",
                    "bytes_in": 0 if said is None else said.bytes_in,
                    "bytes_out": 0 if said is None else said.bytes_out,
                    **_forwarded(row),
                },
            )
        )


def _forwarded(row: Row[Any] | None) -> dict[str, object]:
    """Return by which grant, to which port; nothing for a session of another kind."""
    if row is None or row.forward_port is None:
        return {}
    return {"forward_port": row.forward_port, "forward": row.forward_grant or ""}
