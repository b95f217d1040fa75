"""Grants of ports: who may reach which port of a workspace, until when. Without one nothing is forwarded (control ID-02).

A grant counts for one workspace, one port and one person. It is looked at when a certificate is asked for, when the recorder
opens the session, and while the session lives; the configuration counts each time.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, NotFoundError
from saw.broker.forward_ends import revoke_grant
from saw.broker.lifecycle import State
from saw.broker.registry import get_row
from saw.broker.schema import forward_grants, sessions
from saw.broker.session_ends import SessionEnds
from saw.broker.store import Transaction

MOST = 1000
"""Most grants that count at a time, and most in one list."""
_PERSON = "user:"
Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class GrantForward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whom a port is granted to (``user:ada@example.com``, ``operator:root``), and for how many seconds."""

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)]
    port: Port
    to: Annotated[str, msgspec.Meta(pattern=r"^(user|operator):[^\s].{0,240}\Z")]
    for_s: Annotated[int, msgspec.Meta(ge=60, le=86_400)]
    reason: Reason


class RevokeForward(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a grant ends before its time."""

    reason: Reason


class Forwards:
    """Given, listed and revoked grants, and the look whether one counts."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._rules = services.config.forwarding
        self._ends = SessionEnds(services)

    def grant(self, caller: Caller, body: GrantForward) -> dict[str, Any]:
        """Grant a port from now on; the same again is the grant that is there. What is refused is audited too.

        Raises :class:`ForbiddenError` for what may not be granted, :class:`ConflictError` when another grant is in the way.
        """
        now = self._s.clock()
        with self._s.store.write() as tx:
            workspace = get_row(tx.connection, body.workspace_id)
            known = self._counting(tx.connection, workspace.id, body.port, body.to, now)
            if known is not None and _same(known, body):
                return {**_view(known, now), "changed": False}
            refused: BrokerError | None = self._ungrantable(caller, workspace, body)
            if refused is None and known is not None:
                refused = ConflictError(
                    f"{known.id} grants that port until {known.expires_at}",
                    cure="revoke it first",
                    code="granted_already",
                )
            if refused is None:
                refused = _too_many(tx.connection, now)
            identifier = "" if refused is not None else self._add(tx, caller, body, now)
            tx.record(
                self._s.events.api_activity(
                    now,
                    caller.subject(workspace.id, agent=workspace.agent_id, policy_digest=workspace.policy_digest or ""),
                    "forward.grant",
                    activity="create",
                    outcome="success" if refused is None else "failure",
                    message=body.reason,
                    resource=("forward", identifier) if identifier else None,
                    status_detail="" if refused is None else refused.code,
                    detail={"forward": identifier, "port": body.port, "to": body.to, "for_s": body.for_s},
                )
            )
            if refused is None:
                return {**_view(_get(tx.connection, identifier), now), "changed": True}
        raise refused

    def revoke(self, caller: Caller, identifier: str, body: RevokeForward) -> dict[str, Any]:
        """End a grant, and with it every session that was opened by it. One that is over stays as it is."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = _get(tx.connection, identifier)
            if row.revoked_at is not None or row.expires_at <= iso(now):
                return {**_view(row, now), "changed": False}
            revoke_grant(self._s, tx, caller, row, body.reason)
            self._ends.end(tx, caller, sessions.c.forward_grant == row.id, "forward_revoked", body.reason)
            row = _get(tx.connection, identifier)
        return {**_view(row, now), "changed": True}

    def show(self, identifier: str) -> dict[str, Any]:
        """Return one grant; raise :class:`NotFoundError`."""
        now = self._s.clock()
        with self._s.store.read() as connection:
            return _view(_get(connection, identifier), now)

    def listed(self, workspace: str | None, *, everything: bool) -> dict[str, Any]:
        """Return ``{forwards}``, the newest first: those that count; with ``everything`` also those that are over."""
        now = self._s.clock()
        query = select(forward_grants).order_by(forward_grants.c.granted_at.desc(), forward_grants.c.id).limit(MOST)
        if workspace is not None:
            query = query.where(forward_grants.c.workspace_id == workspace)
        if not everything:
            query = query.where(forward_grants.c.revoked_at.is_(None), forward_grants.c.expires_at > iso(now))
        with self._s.store.read() as connection:
            return {"forwards": [_view(row, now) for row in connection.execute(query)]}

    def require(
        self, connection: Connection, workspace: Row[Any], port: int, holder: str, now: datetime
    ) -> Row[Any] | ForbiddenError:
        """Return the grant by which ``holder`` (a principal) reaches ``port`` now, or why there is none."""
        refused = self._forbidden(workspace, port)
        if refused is not None:
            return refused
        row = self._counting(connection, workspace.id, port, holder, now)
        if row is None:
            return ForbiddenError(
                f"port {port} of {workspace.id} is not granted to {holder}",
                cure="ask an operator: saw session grant",
                code="not_granted",
            )
        return row

    def tick(self) -> None:
        """End sessions whose grant counts no more: it is over, or the configuration forbids it now."""
        now = self._s.clock()
        live = sessions.c.forward_grant.is_not(None) & sessions.c.ended_at.is_(None) & sessions.c.closed_at.is_(None)
        with self._s.store.write() as tx:
            for row in tx.connection.execute(select(sessions).where(live)).all():
                grant, workspace = _get(tx.connection, row.forward_grant), get_row(tx.connection, row.workspace_id)
                refused = self._forbidden(workspace, row.forward_port)
                if refused is not None or grant.revoked_at is not None or grant.expires_at <= iso(now):
                    why = "" if refused is None else refused.code
                    self._ends.end(tx, BROKER, sessions.c.id == row.id, "forward_ended", why)

    def _forbidden(self, workspace: Row[Any], port: int) -> ForbiddenError | None:
        """Return what the configuration has against it."""
        if self._rules is None:
            return ForbiddenError(
                "no port is forwarded here", cure="role variable broker_forwarding", code="forwarding_off"
            )
        if not self._rules.allows(port):
            return ForbiddenError(
                f"port {port} may not be forwarded",
                cure=f"the configuration allows {', '.join(self._rules.ports)} (broker_forwarding)",
                code="port_not_allowed",
            )
        if not self._rules.allows_blueprint(workspace.blueprint):
            return ForbiddenError(
                f"no port of workspaces of {workspace.blueprint} is forwarded",
                cure="blueprints of broker_forwarding",
                code="blueprint_not_allowed",
            )
        return None

    def _ungrantable(self, caller: Caller, workspace: Row[Any], body: GrantForward) -> ForbiddenError | None:
        refused = self._forbidden(workspace, body.port)
        if refused is not None or self._rules is None:
            return refused
        if body.for_s > self._rules.max_hours * 3600:
            return ForbiddenError(
                f"a grant lasts {self._rules.max_hours} hours at most", cure="ask for less", code="grant_too_long"
            )
        if workspace.state in {State.QUARANTINED, State.DECOMMISSIONED}:
            return ForbiddenError(
                f"{workspace.id} is {workspace.state}", cure="nobody may enter it", code="workspace_not_admitted"
            )
        if body.to == caller.principal and body.to.startswith(_PERSON):
            return ForbiddenError("nobody grants a port to themselves", cure="ask another operator", code="own_grant")
        if body.to.startswith(_PERSON) and body.to.removeprefix(_PERSON) != workspace.sponsor:
            return ForbiddenError(
                f"{workspace.id} is not the workspace of {body.to.removeprefix(_PERSON)}",
                cure="grant it to its sponsor",
                code="not_your_workspace",
            )
        return None

    def _counting(
        self, connection: Connection, workspace: str, port: int, holder: str, now: datetime
    ) -> Row[Any] | None:
        wanted = (
            (forward_grants.c.workspace_id == workspace)
            & (forward_grants.c.port == port)
            & (forward_grants.c.grantee == holder)
            & forward_grants.c.revoked_at.is_(None)
            & (forward_grants.c.expires_at > iso(now))
        )
        return connection.execute(select(forward_grants).where(wanted)).first()

    def _add(self, tx: Transaction, caller: Caller, body: GrantForward, now: datetime) -> str:
        identifier = self._s.new_id("fwd")
        tx.connection.execute(
            forward_grants.insert().values(
                id=identifier,
                workspace_id=body.workspace_id,
                port=body.port,
                grantee=body.to,
                reason=body.reason,
                granted_by=caller.principal,
                granted_at=iso(now),
                expires_at=iso(now + timedelta(seconds=body.for_s)),
            )
        )
        return identifier


def _same(row: Row[Any], body: GrantForward) -> bool:
    lasts = parse_iso(row.expires_at) - parse_iso(row.granted_at)
    return bool(row.reason == body.reason and lasts == timedelta(seconds=body.for_s))


def _too_many(connection: Connection, now: datetime) -> ConflictError | None:
    alive = forward_grants.c.revoked_at.is_(None) & (forward_grants.c.expires_at > iso(now))
    if connection.execute(select(func.count()).select_from(forward_grants).where(alive)).scalar_one() < MOST:
        return None
    return ConflictError(f"there are {MOST} grants", cure="revoke some", code="too_many_grants")


def unknown_grant(identifier: str) -> NotFoundError:
    """Return what is said of a grant that there is not, or that somebody may not see."""
    return NotFoundError(
        f"there is no grant {identifier[:64]!r}", cure="saw session grants lists them", code="unknown_grant"
    )


def _get(connection: Connection, identifier: str) -> Row[Any]:
    row = connection.execute(select(forward_grants).where(forward_grants.c.id == identifier)).one_or_none()
    if row is None:
        raise unknown_grant(identifier)
    return row


def _view(row: Row[Any], now: datetime) -> dict[str, Any]:
    over = "revoked" if row.revoked_at is not None else "expired" if row.expires_at <= iso(now) else ""
    return {
        "id": row.id,
        "state": over or "granted",
        "workspace": row.workspace_id,
        "port": row.port,
        "to": row.grantee,
        "reason": row.reason,
        "granted_by": row.granted_by,
        "granted_at": row.granted_at,
        "expires_at": row.expires_at,
        "revoked_by": row.revoked_by,
        "revoked_at": row.revoked_at,
        "revoked_reason": row.revoked_reason,
    }
