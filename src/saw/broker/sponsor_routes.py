"""The calls about sponsors. The feed has a path of its own: any word may be a sponsor's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker import sponsor_list
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.http import LONGEST_WAIT_S, whole_number, with_body, without_body
from saw.broker.sponsors import SwitchSponsor, wanted
from saw.broker.wake import SPONSORS

MakeRoute = Callable[[str, str, Any], Route]
_LONGEST_NAME = 1024
"""Folding the case of a name of 256 letters makes it no longer than this."""


def sponsor_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to whoever may call it."""
    kept, one, store = broker.sponsors, "/v1/sponsors/{name}", broker.services.store

    async def feed(request: Request, _caller: Caller) -> Any:
        after = whole_number(request, "after", 0, 2**53)
        behind = request.query_params.get("behind", "")
        if len(behind) > _LONGEST_NAME:
            raise MalformedError("behind is no name of a sponsor", cure="give the one of the answer before, or none")

        def look() -> dict[str, Any]:
            with store.read() as connection:
                return sponsor_list.changes(connection, after, behind)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(look)

        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        return await broker.waker.poll(SPONSORS, read, lambda found: bool(found["sponsors"]), wait)

    return [
        route("/v1/sponsor-changes", "GET", feed),
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
