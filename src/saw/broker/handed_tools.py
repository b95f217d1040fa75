"""Which tools an agent was handed, as the broker judges it for reviews and tells it to the workspace (control DEL-01)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegation_ends import record_of
from saw.broker.errors import ForbiddenError
from saw.broker.registry import get_row
from saw.broker.schema import delegations
from saw.policy.delegation import Delegation, ToolScope
from saw.policy.handed_tools import MAX_GRANTS, MAX_HANDED, Grant, HandedTools

_AROUND = 64
"""More bytes than stand around the grants."""


class ToolDelegations:
    """What of tools the agents of workspaces were handed. Nothing here changes anything."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def told(self, caller: Caller, workspace_id: str) -> HandedTools:
        """Return what the workspace that calls is held to; a workspace learns of no other's.

        It is bound from the first delegation on that named tools, whether that one still counts or not.
        """
        require_self(caller, workspace_id)
        now = self._s.clock()
        with self._s.store.read() as connection:
            workspace = get_row(connection, workspace_id)
            named = delegations.c.names_tools.is_(True) & (delegations.c.workspace_id == workspace.id)
            if connection.execute(select(delegations.c.id).where(named).limit(1)).first() is None:
                return HandedTools(bound=False)
            grants = _fitting(self._counting(connection, workspace, now))
        return HandedTools(bound=True, grants=grants)

    def require(self, connection: Connection, workspace: Row[Any], server: str, tool: str) -> str:
        """Return the delegation under which the agent may have people asked about ``tool``; an empty text where none is needed.

        It counts, lets the agent write, and says nothing of tools or names this one. Raises :class:`ForbiddenError`.
        """
        ever = select(delegations.c.id).where(delegations.c.workspace_id == workspace.id).limit(1)
        if not self._s.config.delegation.required and connection.execute(ever).first() is None:
            return ""
        writing = [
            record
            for record in self._counting(connection, workspace, self._s.clock())
            if record.approval != "read-only"
        ]
        for record in writing:
            if ToolScope(record.tools).covers(server, tool):
                return record.id
        if writing:
            why = f"no delegation of the agent of {workspace.id} covers the tool {tool[:128]} of {server}"
        else:
            why = f"no delegation of the agent of {workspace.id} counts now and lets it write"
        raise ForbiddenError(why, cure="ask the sponsor for one", code="outside_delegation")

    @staticmethod
    def _counting(connection: Connection, workspace: Row[Any], now: datetime) -> Iterator[Delegation]:
        """Yield the records of the workspace's agent that count at ``now``, those that end last first.

        What one was made from ends no earlier, and takes it along when it is revoked.
        """
        counting = delegations.c.revoked_at.is_(None) & (delegations.c.expires_at > iso(now))
        mine = select(delegations).where(counting, delegations.c.workspace_id == workspace.id)
        for row in connection.execute(mine.order_by(delegations.c.expires_at.desc(), delegations.c.id)).all():
            record = record_of(row)
            if record.agent == workspace.agent_id and record.live(now):
                yield record


def _fitting(records: Iterator[Delegation]) -> tuple[Grant, ...]:
    """Return what of ``records`` is told: as many from the first on as a workspace reads. The agent has no more than these."""
    grants: list[Grant] = []
    room = MAX_HANDED - _AROUND
    for one in records:
        grant = Grant(delegation=one.id, not_before=one.not_before, expires=one.expires, tools=one.tools)
        room -= len(msgspec.json.encode(grant)) + 1
        if room < 0 or len(grants) == MAX_GRANTS:
            break
        grants.append(grant)
    return tuple(grants)


def names_tools(record: Delegation) -> bool:
    """Return whether ``record`` says anything of tools, be it that there are none."""
    return record.tools is not msgspec.UNSET


def require_self(caller: Caller, workspace_id: str) -> None:
    """Refuse whoever is not the workspace that it speaks of, by the certificate that its attestation gave it."""
    if caller.principal == f"workspace:{workspace_id}":
        return
    kind, _, name = caller.principal.partition(":")
    raise ForbiddenError(
        f"{kind} {name} cannot ask for {workspace_id[:64]}".replace("anonymous  ", "somebody without a certificate "),
        cure="call with the workspace's own certificate",
        code="not_this_workspace",
    )
