"""The pages about agents: those that somebody may see, and the end of one."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from starlette.responses import Response

from saw.broker import agent_list
from saw.broker.agent_states import STATES, AgentState, unknown_agent
from saw.broker.agents import RetireAgent
from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError
from saw.broker.sso.access import has_workspaces, may_revoke, sees_everything, sees_workspace
from saw.broker.sso.refused import record_refused
from saw.broker.sso.web import Visit, Web, redirect

PAGE = 25
"""Agents in one page of the list."""

Short = Annotated[str, msgspec.Meta(max_length=64)]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which agents: a part of their id, name, sponsor, owner or purpose, a state, and the id to go on behind."""

    q: Short = ""
    state: AgentState | None = None
    after: Short = ""


class Why(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why an agent ends."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class AgentPages:
    """What these pages show and do."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker

    def agents(self, visit: Visit) -> Response:
        """The agents that the person sponsors, or all."""
        session = visit.session()
        if not has_workspaces(session.person):
            return redirect("/reviews")
        wanted = visit.asked(Wanted)
        everything = sees_everything(session.person)
        asked = agent_list.Wanted(
            state=(wanted.state,) if wanted.state else (), text=wanted.q, after=wanted.after, limit=PAGE
        )
        with self._broker.services.store.read() as connection:
            found = agent_list.page(connection, asked, None if everything else session.person.name)
        return self._web.render(
            "agents.html", session, everything=everything, wanted=wanted, states=STATES, **dict(found)
        )

    def of_workspace(self, workspace: str) -> list[dict[str, Any]]:
        """Return the agent of a workspace and those before it, the newest first."""
        with self._broker.services.store.read() as connection:
            found = agent_list.page(connection, agent_list.Wanted(workspace=(workspace,)))["agents"]
        return sorted(found, key=lambda one: (one["state"] != "retired", len(one["id"]), one["id"]), reverse=True)

    def retire(self, visit: Visit) -> Response:
        """An agent ends for good, by its sponsor or by those who intervene."""
        session = visit.session()
        caller = visit.change(session)
        identifier = str(visit.parameters["id"])
        found = self._broker.agents.show(identifier)
        if not sees_workspace(session.person, found["sponsor"]):
            raise unknown_agent(identifier)
        if not may_revoke(session.person, found["sponsor"]):
            record_refused(self._broker.services, caller, "agent.retire", found["workspace"] or "")
            raise ForbiddenError(
                "your roles do not allow agent.retire",
                cure="ask somebody who may: see docs/portal.md",
                code="not_allowed",
            )
        self._broker.agents.retire(caller, identifier, RetireAgent(reason=visit.filled_in(Why).reason))
        return redirect(f"/workspaces/{found['workspace']}" if found["workspace"] else "/agents")
