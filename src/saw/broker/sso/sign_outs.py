"""How people's sign-ins end, inside the transaction of whatever ends them."""

from __future__ import annotations

from sqlalchemy import ColumnElement, select

from saw.audit import Subject
from saw.broker.context import Caller, Services
from saw.broker.schema import sso_sessions
from saw.broker.session_ends import SessionEnds
from saw.broker.store import Transaction

PROTOCOL = "OpenID Connect"


def end_sign_ins(services: Services, tx: Transaction, caller: Caller, wanted: ColumnElement[bool], why: str) -> int:
    """End the sign-ins that ``wanted`` selects, and the sessions with workspaces that were opened with them; return how many."""
    rows = tx.connection.execute(select(sso_sessions).where(wanted)).all()
    for row in rows:
        tx.connection.execute(sso_sessions.delete().where(sso_sessions.c.id == row.id))
        subject = Subject(principal=f"user:{row.person}", request_id=caller.request_id, address=caller.address)
        tx.record(
            services.events.authentication(
                services.clock(),
                subject,
                activity="logoff",
                message=why,
                protocol=PROTOCOL,
                session_uid=row.id,
                detail={"kind": row.kind, "by": caller.principal},
            )
        )
    SessionEnds(services).end_sign_ins(tx, caller, [row.id for row in rows], why)
    return len(rows)
