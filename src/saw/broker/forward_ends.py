"""How grants of ports end before their time, inside the transaction of whatever takes them away."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Row, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.schema import forward_grants
from saw.broker.store import Transaction


def revoke_of_workspace(services: Services, tx: Transaction, caller: Caller, workspace: str, why: str) -> None:
    """Revoke every grant of a workspace that was killed or retired; its sessions end by that already."""
    wanted = (
        (forward_grants.c.workspace_id == workspace)
        & forward_grants.c.revoked_at.is_(None)
        & (forward_grants.c.expires_at > iso(services.clock()))
    )
    for row in tx.connection.execute(select(forward_grants).where(wanted)).all():
        revoke_grant(services, tx, caller, row, why)


def revoke_grant(services: Services, tx: Transaction, caller: Caller, row: Row[Any], why: str) -> None:
    """Mark one grant revoked; its sessions are left to whoever calls this."""
    now = services.clock()
    values = {"revoked_by": caller.principal, "revoked_at": iso(now), "revoked_reason": why[:256]}
    tx.connection.execute(forward_grants.update().where(forward_grants.c.id == row.id).values(**values))
    tx.record(
        services.events.api_activity(
            now,
            caller.subject(row.workspace_id),
            "forward.revoke",
            activity="delete",
            message=why,
            resource=("forward", row.id),
            detail={"forward": row.id, "port": row.port, "to": row.grantee},
        )
    )
