"""The calls about sponsors. The feed has a path of its own: any word may be a sponsor's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.routing import Route

from saw.broker import sponsor_list
from saw.broker.core import Broker
from saw.broker.feed_routes import behind, feed
from saw.broker.http import with_body, without_body
from saw.broker.sponsors import SwitchSponsor, wanted
from saw.broker.wake import SPONSORS

MakeRoute = Callable[[str, str, Any], Route]
_LONGEST_NAME = 1024
"""Folding the case of a name of 256 letters makes it no longer than this."""


def sponsor_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to whoever may call it."""
    kept, one = broker.sponsors, "/v1/sponsors/{name}"

    def changes(connection: Connection, after: int, request: Request) -> dict[str, Any]:
        return sponsor_list.changes(connection, after, behind(request, _LONGEST_NAME, "name of a sponsor"))

    return [
        route("/v1/sponsor-changes", "GET", feed(broker, "sponsors", SPONSORS, changes)),
        route("/v1/sponsors", "GET", without_body(lambda _c, r: kept.listed(wanted(r.query_params)))),
        route(one, "GET", without_body(lambda _c, r: kept.show(r.path_params["name"]))),
        route(
            f"{one}/disable",
            "POST",
            with_body(SwitchSponsor, lambda c, b, r: kept.disable(c, r.path_params["name"], b)),
        ),
        route(
            f"{one}/enable",
            "POST",
            with_body(SwitchSponsor, lambda c, b, r: kept.enable(c, r.path_params["name"], b)),
        ),
    ]
