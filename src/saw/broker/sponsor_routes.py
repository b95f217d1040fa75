"""The calls about sponsors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.routing import Route

from saw.broker.core import Broker
from saw.broker.http import with_body, without_body
from saw.broker.sponsors import SwitchSponsor, wanted

MakeRoute = Callable[[str, str, Any], Route]


def sponsor_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to whoever may call it."""
    kept, one = broker.sponsors, "/v1/sponsors/{name}"
    return [
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
