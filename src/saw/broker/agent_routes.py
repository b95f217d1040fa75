"""The calls about agents. A sponsor who signed in sees and retires the own ones; ``only_sponsor`` of the request says whose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from saw.broker import agent_list
from saw.broker.agent_states import AGENTS
from saw.broker.agents import ChangeAgent, RegisterAgent, RetireAgent, SucceedAgent
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.feed_routes import feed
from saw.broker.http import with_body, without_body

MakeRoute = Callable[[str, str, Any], Route]

OWN = frozenset({("GET", "/v1/agents"), ("GET", "/v1/agents/{id}"), ("POST", "/v1/agents/{id}/retire")})
"""Method and route of the calls that sponsors may make about their own agents: to look, and to end."""


def agent_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to whoever may call it."""
    kept, store, one = broker.agents, broker.services.store, "/v1/agents/{id}"

    def listed(_caller: Caller, request: Request) -> Any:
        asked = agent_list.wanted(request.query_params)
        with store.read() as connection:
            return agent_list.page(connection, asked, only_sponsor(request))

    return [
        route("/v1/agents", "GET", without_body(listed)),
        route("/v1/agents", "POST", with_body(RegisterAgent, lambda c, b, _r: kept.register(c, b))),
        # In front of the route of one agent, whose id is never this word.
        route(
            "/v1/agents/changes",
            "GET",
            feed(broker, "agents", AGENTS, lambda c, after, _r: agent_list.changes(c, after)),
        ),
        route(one, "GET", without_body(lambda _c, r: kept.show(r.path_params["id"], only_sponsor(r)))),
        route(one, "PUT", with_body(ChangeAgent, lambda c, b, r: kept.change(c, r.path_params["id"], b))),
        route(
            f"{one}/retire",
            "POST",
            with_body(RetireAgent, lambda c, b, r: kept.retire(c, r.path_params["id"], b, only_sponsor(r))),
        ),
        route(
            f"{one}/succeed", "POST", with_body(SucceedAgent, lambda c, b, r: kept.succeed(c, r.path_params["id"], b))
        ),
    ]


def only_sponsor(request: Request) -> str | None:
    """Return whose agents alone the call is about; None: everybody's."""
    found: str | None = getattr(request.state, "only_sponsor", None)
    return found
