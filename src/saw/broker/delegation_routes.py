"""The operator's calls about delegations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.routing import Route

from saw.broker.core import Broker
from saw.broker.delegations import Issue, Revoke
from saw.broker.http import with_body, without_body

MakeRoute = Callable[[str, str, Any], Route]


def operator_delegation_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to operators alone."""
    delegations = broker.delegations
    one = "/v1/delegations/{id}"
    return [
        route(
            "/v1/delegations",
            "GET",
            without_body(lambda _c, r: delegations.listed(r.query_params.get("workspace_id"))),
        ),
        route("/v1/delegations", "POST", with_body(Issue, lambda c, b, _r: delegations.issue(c, b))),
        route(one, "GET", without_body(lambda _c, r: delegations.show(r.path_params["id"]))),
        route(
            f"{one}/revoke",
            "POST",
            with_body(Revoke, lambda c, b, r: delegations.revoke(c, r.path_params["id"], b)),
        ),
    ]
