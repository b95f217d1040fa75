"""How a review goes from state to state: each step is one compare-and-set with its audit row, and wakes who waits.

``pending → approved → executing → done | failed | unknown``; before the claim also ``denied``, ``expired``, ``cancelled``,
and back from ``approved`` to ``pending`` when an approval no longer counts.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, Row, select

from saw.audit import Subject
from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import ConflictError, NotFoundError
from saw.broker.lifecycle import State
from saw.broker.notification_settings import Kind
from saw.broker.notifications import Notifications
from saw.broker.schema import agents, delegations, reviews, workspaces
from saw.broker.store import Transaction
from saw.review.messages import FINAL, ReviewState

GATE = "gate"
"""The kind of a review that is a change to the fleet; a call that leaves the workspace has ``call``."""
TOOL = "tool"
"""The kind of a review that is a call of an MCP tool over stdio, which the workspace itself makes."""
OPEN = frozenset({"pending", "approved"})
"""States from which a review can still be decided, cancelled, or expire."""
UNENDED = OPEN | {"executing"}
COLUMNS = tuple(column for column in reviews.c if column.name not in {"call", "answer", "context"})
"""What a row of a review has; the bytes, which may be many, are read by :func:`stored` alone."""

_ACTIVITY: dict[str, Literal["activate", "enable", "deactivate", "suspend", "update"]] = {
    "approved": "activate",
    "executing": "enable",
    "pending": "suspend",
    "denied": "deactivate",
    "expired": "deactivate",
    "cancelled": "deactivate",
}


def review_key(identifier: str) -> str:
    """Return the key under which somebody waits for the review ``identifier``."""
    return f"review:{identifier}"


def claims_key(perimeter: str) -> str:
    """Return the key under which the perimeter ``perimeter`` (a principal) waits for something to claim."""
    return f"claims:{perimeter}"


def get_review(connection: Connection, identifier: str) -> Row[Any]:
    """Return the row of a review or raise :class:`NotFoundError`."""
    row = connection.execute(select(*COLUMNS).where(reviews.c.id == identifier)).one_or_none()
    if row is None:
        raise unknown_review(identifier)
    return row


def stored(connection: Connection, identifier: str, what: Literal["call", "answer", "context"]) -> bytes | None:
    """Return the encrypted call, answer or context of a review; None when there is none, or no longer."""
    found: bytes | None = connection.execute(select(reviews.c[what]).where(reviews.c.id == identifier)).scalar_one()
    return found


def other_policy(workspace: str) -> ConflictError:
    """Return the refusal of a call that was judged by another policy than the one in force."""
    return ConflictError(
        f"{workspace[:64]} is under another policy than the call was judged by",
        cure="judge the call again",
        code="policy_changed",
    )


def unknown_review(identifier: str) -> NotFoundError:
    """Return the refusal of a review that does not exist, or not for the caller."""
    return NotFoundError(
        f"there is no review {identifier[:64]!r}", cure="saw review list shows them", code="unknown_review"
    )


class Moves:
    """The steps of reviews, inside the transaction of whoever makes them."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._notifications = Notifications(services)

    def move(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        to: ReviewState,
        detail: str,
        *,
        said: dict[str, object] | None = None,
        **values: Any,
    ) -> Row[Any] | None:
        """Take ``row`` to ``to`` and return its new row; None when it has left the state of ``row`` meanwhile."""
        now = self._s.clock()
        values |= {"state": to, "detail": detail}
        if to in FINAL:
            values["ended_at"] = iso(now)
        there = (reviews.c.id == row.id) & (reviews.c.state == row.state)
        if tx.connection.execute(reviews.update().where(there).values(**values)).rowcount != 1:
            return None
        self.record(
            tx, caller, row, detail, _ACTIVITY.get(to, "update"), said={"from": row.state, "to": to, **(said or {})}
        )
        tx.wake(review_key(row.id), *([claims_key(row.perimeter)] if to == "approved" else []))
        found = get_review(tx.connection, row.id)
        if to in FINAL:
            self._notifications.tell(tx, kind=Kind.REVIEW_ENDED, review=found)
        return found

    def opened(self, tx: Transaction, row: Row[Any]) -> None:
        """Have the people told for whom ``row`` waits."""
        self._notifications.tell(tx, kind=Kind.REVIEW_OPENED, review=row)

    def record(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        comment: str,
        activity: Literal["create", "update", "activate", "enable", "deactivate", "suspend"] = "update",
        *,
        refused: bool = False,
        said: dict[str, object] | None = None,
    ) -> None:
        """Audit something about a review: who, agent, workspace, policy, the request that is reviewed."""
        tx.record(
            self._s.events.entity_management(
                self._s.clock(),
                subject_of(caller, row),
                ("review", row.id),
                activity=activity,
                outcome="failure" if refused else "success",
                comment=comment,
                detail={
                    "review": row.id,
                    "request_digest": row.request_digest,
                    "reviewed_request_id": row.request_id,
                    "method": row.method,
                    "host": row.host,
                    "rule": row.rule,
                    "delegation": row.delegation,
                    "group": row.group_name,
                    "quorum": row.quorum,
                    **({"gate": row.rule, "requested_by": row.sponsor} if row.kind == GATE else {}),
                    **({"tool": row.host} if row.kind == TOOL else {}),
                    **(said or {}),
                },
            )
        )

    def settle(self, tx: Transaction, row: Row[Any]) -> Row[Any]:
        """Return ``row`` as it is now: what has expired is so, and a claim that was lost leaves ``unknown``."""
        now = iso(self._s.clock())
        found = None
        if row.state in OPEN and row.expires_at <= now:
            found = self.move(
                tx, BROKER, row, "expired", "nobody decided in time" if row.state == "pending" else "unused"
            )
        elif row.state == "executing" and row.claim_ends_at <= now:
            who, what = {GATE: ("the run", "wave"), TOOL: ("the workspace", "call")}.get(
                row.kind, ("the perimeter", "call")
            )
            found = self.move(tx, BROKER, row, "unknown", f"{who} did not tell in time how the {what} ended")
        return found or row

    def cancel_all(self, tx: Transaction, caller: Caller, workspace_id: str, why: str) -> None:
        """Cancel what waits for a workspace that is no longer active."""
        query = select(*COLUMNS).where(reviews.c.workspace_id == workspace_id, reviews.c.state.in_(OPEN))
        for row in tx.connection.execute(query).all():
            self.move(tx, caller, row, "cancelled", f"workspace_not_active: {why}"[:512])

    def cancel_of_agent(self, tx: Transaction, caller: Caller, agent: str, why: str) -> None:
        """Cancel what waits for an agent that is retired."""
        query = select(*COLUMNS).where(reviews.c.agent_id == agent, reviews.c.state.in_(OPEN))
        for row in tx.connection.execute(query).all():
            self.move(tx, caller, row, "cancelled", f"agent_retired: {why}"[:512])


def due_at(row: Row[Any]) -> str:
    """Return when time alone will change the state of ``row``; empty when it will not."""
    if row.state in OPEN:
        return str(row.expires_at)
    return str(row.claim_ends_at) if row.state == "executing" else ""


def why_void(connection: Connection, row: Row[Any], now: datetime) -> str:
    """Return why ``row`` may not be executed any more whatever people say, else an empty text.

    ``workspace_not_active``, ``agent_retired``, ``policy_changed`` (another policy is in force than the one it was opened under)
    or ``delegation_ended``. A change to the fleet hangs on no workspace.
    """
    if row.kind == GATE:
        return ""
    workspace = connection.execute(select(workspaces).where(workspaces.c.id == row.workspace_id)).one_or_none()
    if workspace is None or workspace.state != State.ACTIVE:
        return "workspace_not_active"
    agent = connection.execute(select(agents.c.state).where(agents.c.id == row.agent_id)).scalar_one_or_none()
    if workspace.agent_id != row.agent_id or agent == "retired":
        return "agent_retired"
    if workspace.policy_digest != row.policy_digest:
        return "policy_changed"
    if row.delegation:
        given = connection.execute(select(delegations).where(delegations.c.id == row.delegation)).one_or_none()
        counts = given is not None and not given.revoked_at and given.expires_at > iso(now)
        if given is None or not counts or given.workspace_id != row.workspace_id:
            return "delegation_ended"
    return ""


def lease_counts(connection: Connection, workspace_id: str, now: datetime) -> bool:
    """Tell whether the workspace's lease counts; while it has lapsed nothing of it is sent, and nothing is lost."""
    query = select(workspaces.c.lease_expires_at).where(workspaces.c.id == workspace_id)
    ends = connection.execute(query).scalar_one_or_none()
    return ends is not None and parse_iso(ends) > now


def subject_of(caller: Caller, row: Row[Any]) -> Subject:
    """Return the subject of an event about a review."""
    return caller.subject(row.workspace_id, agent=row.agent_id, policy_digest=row.policy_digest)
