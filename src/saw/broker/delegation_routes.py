"""The operator's calls about delegations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.routing import Route

from saw.broker import delegation_list
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.delegation_ends import DELEGATIONS
from saw.broker.delegations import Issue, Revoke
from saw.broker.feed_routes import feed
from saw.broker.http import with_body, without_body

MakeRoute = Callable[[str, str, Any], Route]


def operator_delegation_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to operators alone."""
    delegations = broker.delegations
    clock = broker.services.clock
    one = "/v1/delegations/{id}"

    def listed(_caller: Caller, request: Request) -> Any:
        return delegations.listed(delegation_list.wanted(request.query_params))

    def changes(connection: Connection, after: int, _request: Request) -> dict[str, Any]:
        return delegation_list.changes(connection, after, clock())

    return [
        route("/v1/delegations", "GET", without_body(listed)),
        # In front of the route of one delegation, whose id is never this word.
        route("/v1/delegations/changes", "GET", feed(broker, "delegations", DELEGATIONS, changes)),
        route("/v1/delegations", "POST", with_body(Issue, lambda c, b, _r: delegations.issue(c, b))),
        route(one, "GET", without_body(lambda _c, r: delegations.show(r.path_params["id"]))),
        route(
            f"{one}/revoke",
            "POST",
            with_body(Revoke, lambda c, b, r: delegations.revoke(c, r.path_params["id"], b)),
        ),
    ]
