"""The operators' calls for people who signed in with ``saw login``: each call that a role allows, and no other (control ID-01).

Off unless ``sso.operate`` is set. What is not in :data:`saw.broker.operator_roles.ALLOWED` is for the control host's socket
alone: what founds trust (root keys, certificates of machines, endorsement keys, reviewers), and what would go past the bastion
or decide a review.
"""

from __future__ import annotations

from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from saw.broker.agent_routes import OWN
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError, NotFoundError
from saw.broker.http import guarded, refusal
from saw.broker.operator_roles import ALLOWED
from saw.broker.operator_routes import operator_routes
from saw.broker.peer import SCOPE_KEY, Peer
from saw.broker.sso.rechecks import NotSignedIn
from saw.broker.sso.refused import record_refused
from saw.broker.sso.web import Web


def operate_app(web: Web, broker: Broker) -> Starlette:
    """Return the calls as an application to be mounted below the pages."""

    def identify(request: Request) -> Caller:
        web.require_ours(request)
        peer: Peer = request.scope.get(SCOPE_KEY, Peer())
        return Caller("anonymous:", peer.address, request.state.request_id)

    def admit(request: Request, call: tuple[str, str], caller: Caller) -> Caller:
        """Return the person behind ``call``, a route's own method and path (the request's may be HEAD, which comes with GET).

        The provider is asked of their roles now before anything is changed.
        """
        method, path = call
        kind, _, secret = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise NotSignedIn("nobody is signed in", cure="saw login")
        session = web.sso.sessions.current(caller, secret, fresh=method != "GET")
        if session.kind != "cli":
            raise NotSignedIn("this is no session of a command line", cure="saw login")
        web.sso.sessions.seen(session.secret)
        known = Caller(session.principal, caller.address, caller.request_id)
        wanted, roles = ALLOWED[call], set(session.person.roles)
        if call in OWN and "user" in roles and not wanted & roles:
            request.state.only_sponsor = session.person.name
        elif not wanted & roles:
            record_refused(broker.services, known, f"{method} {path}", _workspace_of(request, path))
            raise ForbiddenError(
                f"this takes the role {' or '.join(sorted(wanted))}", cure="ask somebody who has it", code="not_allowed"
            )
        return known

    def route(path: str, method: str, handler: Any) -> Route:
        async def admitted(request: Request, caller: Caller) -> Any:
            # The provider may be asked, so not in the event loop.
            return await handler(request, await run_in_threadpool(admit, request, (method, path), caller))

        return Route(path, guarded(identify, admitted), methods=[method])

    return Starlette(
        routes=[one for one in operator_routes(broker, route) if call_of(one) in ALLOWED],
        exception_handlers={404: _missing, 405: _missing},
    )


def call_of(route: Route) -> tuple[str, str]:
    """Return method and path of a route; HEAD comes with GET."""
    (method,) = (route.methods or set()) - {"HEAD"}
    return method, route.path


def _workspace_of(request: Request, path: str) -> str:
    return str(request.path_params["id"]) if path.startswith("/v1/workspaces/{id}") else ""


async def _missing(_request: Request, _error: Exception) -> Response:
    return refusal(
        NotFoundError(
            "there is no such call for people who signed in",
            cure="use the socket on the control host",
            code="not_for_people",
        )
    )
