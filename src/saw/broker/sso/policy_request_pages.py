"""The pages about what agents ask for beyond their policy. An answer is a person's word; it allows nothing."""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.responses import Response

from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError
from saw.broker.policy_request_views import AnswerRequest, JudgedRequest
from saw.broker.policy_requests import STATES, unknown_request
from saw.broker.sso.access import has_workspaces, may_intervene, sees_everything, sees_workspace
from saw.broker.sso.refused import record_refused
from saw.broker.sso.sessions import Session
from saw.broker.sso.web import Visit, Web, redirect
from saw.policy.policy_request import State

PAGE = 25
"""Requests in one page of the list."""

Short = Annotated[str, msgspec.Meta(max_length=64)]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which requests: those of a workspace, in a state, and the id to go on behind."""

    workspace: Short = ""
    state: State | None = None
    after: Short = ""


class PolicyRequestPages:
    """What these pages show and do."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker

    def requests(self, visit: Visit) -> Response:
        """The requests of the agents that the person sponsors, or all."""
        session = visit.session()
        if not has_workspaces(session.person):
            return redirect("/reviews")
        wanted = visit.asked(Wanted)
        everything = sees_everything(session.person)
        found = self._broker.policy_requests.listed(
            state=wanted.state or "",
            workspace=wanted.workspace,
            sponsor="" if everything else session.person.name,
            after=wanted.after,
            limit=PAGE,
        )
        return self._web.render(
            "policy_requests.html",
            session,
            everything=everything,
            wanted=wanted,
            states=STATES,
            requests=found.requests,
            next=found.next,
        )

    def request(self, visit: Visit) -> Response:
        """One request, and what of a bundle would allow it."""
        session = visit.session()
        found = self._found(visit, session)
        may_answer = may_intervene(session.person) and found.state == "open"
        return self._web.render("policy_request.html", session, one=found, may_answer=may_answer)

    def answer(self, visit: Visit) -> Response:
        """Somebody who intervenes accepts or declines one."""
        session = visit.session()
        caller = visit.change(session)
        found = self._found(visit, session)
        if not may_intervene(session.person):
            record_refused(self._broker.services, caller, "policy.request.answer", found.workspace)
            raise ForbiddenError(
                "your roles do not allow policy.request.answer",
                cure="ask somebody who may: see docs/portal.md",
                code="not_allowed",
            )
        self._broker.policy_requests.answer(caller, found.id, visit.filled_in(AnswerRequest))
        return redirect(f"/policy-requests/{found.id}")

    def _found(self, visit: Visit, session: Session) -> JudgedRequest:
        """Return the request; what the person may not see is answered as what does not exist."""
        identifier = str(visit.parameters["id"])
        found = self._broker.policy_requests.show(identifier)
        if not sees_workspace(session.person, found.sponsor):
            raise unknown_request(identifier)
        return found
