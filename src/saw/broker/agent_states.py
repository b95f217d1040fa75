"""How agents go through their life, inside the transaction of whoever makes the step (control ID-04).

``registered → active ⇄ suspended → retired``: active and suspended follow the workspace, retired is the end. What a retired
agent held is over in the same transaction.
"""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Connection, Row, func, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegation_ends import DelegationEnds, held_by
from saw.broker.errors import ConflictError, NotFoundError
from saw.broker.review_states import Moves
from saw.broker.schema import agents, workspaces
from saw.broker.sponsor_states import require_enabled
from saw.broker.store import Transaction
from saw.broker.wake import SPONSORS

AgentState = Literal["registered", "active", "suspended", "retired"]
STATES: tuple[AgentState, ...] = ("registered", "active", "suspended", "retired")
Activity = Literal["create", "update", "enroll", "activate", "suspend", "deactivate"]
AGENTS = "*agents*"
"""The key of those who wait for a change of any agent."""


def get_agent(connection: Connection, identifier: str) -> Row[Any]:
    """Return the row of an agent or raise :class:`NotFoundError`."""
    row = connection.execute(select(agents).where(agents.c.id == identifier)).one_or_none()
    if row is None:
        raise unknown_agent(identifier)
    return row


def unknown_agent(identifier: str) -> NotFoundError:
    """Return the refusal of an agent that does not exist, or not for the caller."""
    return NotFoundError(
        f"there is no agent {identifier[:64]!r}", cure="saw agent list shows them", code="unknown_agent"
    )


def living_agent(connection: Connection, workspace: str) -> Row[Any] | None:
    """Return the agent that is bound to a workspace now, or None."""
    here = (agents.c.workspace_id == workspace) & (agents.c.state != "retired")
    return connection.execute(select(agents).where(here)).one_or_none()


def retired_agents(connection: Connection) -> frozenset[str]:
    """Return the workspaces whose agent is retired and has no successor there."""
    last = (workspaces.c.agent_id == agents.c.id) & (agents.c.state == "retired")
    return frozenset(connection.execute(select(workspaces.c.id).join(agents, last)).scalars())


def require_living(connection: Connection, workspace: Row[Any]) -> None:
    """Raise :class:`ConflictError` when the agent of a workspace is retired: nothing more is done in its name."""
    state = connection.execute(select(agents.c.state).where(agents.c.id == workspace.agent_id)).scalar_one_or_none()
    if state == "retired":
        raise ConflictError(
            f"{workspace.agent_id}, the agent of {workspace.id}, is retired",
            cure="saw agent succeed gives the workspace another one",
            code="agent_retired",
        )


def agent_view(row: Row[Any]) -> dict[str, Any]:
    """Return what operators see of an agent. ``claims`` is what was said of it; nothing proves that."""
    same = ("id", "name", "sponsor", "owner", "purpose", "state", "created_at")
    ends = ("retired_at", "retired_by", "retired_reason", "predecessor", "successor", "version", "seq")
    return {
        **{name: getattr(row, name) for name in same},
        "claims": {"harness": row.harness, "model": row.model},
        "workspace": row.workspace_id or None,
        "blueprint": row.blueprint or None,
        **{name: getattr(row, name) for name in ends},
    }


class AgentMoves:
    """The steps of agents."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._ends = DelegationEnds(services)
        self._reviews = Moves(services)

    def add(self, tx: Transaction, caller: Caller, sponsor: str, **profile: Any) -> Row[Any]:
        """Register an agent under a new id, bound to nothing; without a name it is named as its id.

        Raises :class:`ConflictError` for a name that a living agent has, ``sponsor_disabled`` for a sponsor who is.
        """
        require_enabled(tx.connection, sponsor)
        # Rows never go, so a number is never used again.
        identifier = f"agent-{tx.connection.execute(select(func.count()).select_from(agents)).scalar_one() + 1}"
        now = self._s.clock()
        profile["name"] = profile.get("name") or identifier
        self.require_free_name(tx.connection, profile["name"])
        values = {"workspace_id": "", "blueprint": "", "state": "registered", "created_at": iso(now)}
        seq = self._news(tx)
        tx.connection.execute(agents.insert().values(id=identifier, sponsor=sponsor, seq=seq, **values, **profile))
        row = get_agent(tx.connection, identifier)
        said = {"sponsor": sponsor, "name": row.name, "harness_claim": row.harness, "model_claim": row.model}
        self._record(
            tx, caller, row, "create", comment="", said={**said, "owner": row.owner, "purpose": row.purpose[:512]}
        )
        return row

    def bind(self, tx: Transaction, caller: Caller, row: Row[Any], workspace: Row[Any]) -> Row[Any]:
        """Make ``row`` the agent of ``workspace``, for as long as it lives.

        Raises :class:`ConflictError` when it is retired, bound already, somebody else's, or the workspace has one.
        """
        if row.state == "retired":
            raise _conflict(f"{row.id} is retired", "register another agent", "agent_retired")
        if row.workspace_id:
            raise _conflict(
                f"{row.id} is the agent of {row.workspace_id}", "an agent has one workspace for life", "agent_bound"
            )
        if row.sponsor != workspace.sponsor:
            raise _conflict(
                f"{row.id} has another sponsor than {workspace.id}", "register one for that sponsor", "other_sponsor"
            )
        there = living_agent(tx.connection, workspace.id)
        if there is not None:
            raise _conflict(
                f"{workspace.id} has an agent, {there.id}",
                "a workspace has one agent at a time: saw agent succeed replaces it",
                "workspace_has_agent",
            )
        if workspace.state == "decommissioned":
            raise _conflict(f"{workspace.id} is decommissioned", "create a new workspace", "decommissioned")
        state = "active" if workspace.state == "active" else "registered"
        if workspace.agent_id != row.id:
            values = {"agent_id": row.id, "version": workspaces.c.version + 1}
            tx.connection.execute(workspaces.update().where(workspaces.c.id == workspace.id).values(**values))
        return self.change(
            tx,
            caller,
            row,
            "enroll",
            comment="bound to a workspace",
            workspace_id=workspace.id,
            blueprint=workspace.blueprint,
            state=state,
        )

    def change(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        activity: Activity,
        *,
        comment: str,
        said: dict[str, object] | None = None,
        **values: Any,
    ) -> Row[Any]:
        """Write ``values`` as the next version of ``row``, audit them and return the new row."""
        seq = self._news(tx, values.get("workspace_id", row.workspace_id))
        tx.connection.execute(
            agents.update().where(agents.c.id == row.id).values(version=agents.c.version + 1, seq=seq, **values)
        )
        new = get_agent(tx.connection, row.id)
        moved = {"from": row.state, "to": new.state} if new.state != row.state else {}
        self._record(tx, caller, new, activity, comment=comment, said={"version": new.version, **moved, **(said or {})})
        return new

    def retire(self, tx: Transaction, caller: Caller, row: Row[Any], reason: str) -> tuple[Row[Any], list[str]]:
        """End an agent for good; return its row and the ids of the delegations that ended with it.

        Its delegations and all that was made from them are revoked and its reviews cancelled; perimeters refuse its calls
        when this transaction has succeeded.
        """
        now = iso(self._s.clock())
        revoked = self._ends.end(tx, caller, held_by(tx.connection, row, now), f"{row.id} is retired: {reason}"[:256])
        if row.workspace_id:
            self._reviews.cancel_of_agent(tx, caller, row.id, reason)
        new = self.change(
            tx,
            caller,
            row,
            "deactivate",
            comment=reason,
            said={"revoked": revoked[:64]},
            state="retired",
            retired_at=now,
            retired_by=caller.principal,
            retired_reason=reason,
        )
        return new, revoked

    def follow(self, tx: Transaction, caller: Caller, workspace: str, to: str, reason: str) -> None:
        """The workspace is in state ``to`` now: active with it, suspended while it is not, retired when it has ended."""
        row = living_agent(tx.connection, workspace)
        if row is None:
            return
        if to == "decommissioned":
            self.retire(tx, caller, row, reason)
        elif to == "active":
            if row.state != "active":
                self.change(tx, caller, row, "activate", comment=reason, state="active")
        elif row.state == "active":
            self.change(tx, caller, row, "suspend", comment=reason, state="suspended")

    def require_free_name(self, connection: Connection, name: str) -> None:
        """Raise :class:`ConflictError` when a living agent has ``name``, or its id is another one's."""
        used = connection.execute(
            select(agents.c.id).where(agents.c.name == name, agents.c.state != "retired")
        ).scalar_one_or_none()
        if used is not None:
            raise _conflict(f"{used} has the name {name}", "choose another name", "name_taken")

    def _news(self, tx: Transaction, *workspace: str) -> int:
        tx.wake(AGENTS, SPONSORS)
        return tx.touch(*(name for name in workspace if name))

    def _record(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        activity: Activity,
        *,
        comment: str,
        said: dict[str, object],
    ) -> None:
        tx.record(
            self._s.events.entity_management(
                self._s.clock(),
                caller.subject(row.workspace_id, agent=row.id),
                ("agent", row.id),
                activity=activity,
                comment=comment,
                detail=said,
            )
        )


def _conflict(message: str, cure: str, code: str) -> ConflictError:
    return ConflictError(message, cure=cure, code=code)
