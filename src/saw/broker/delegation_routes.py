"""The operator's calls about delegations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker import delegation_list
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.delegation_ends import DELEGATIONS
from saw.broker.delegations import Issue, Revoke
from saw.broker.http import LONGEST_WAIT_S, whole_number, with_body, without_body

MakeRoute = Callable[[str, str, Any], Route]


def operator_delegation_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to operators alone."""
    delegations = broker.delegations
    store, clock = broker.services.store, broker.services.clock
    one = "/v1/delegations/{id}"

    def listed(_caller: Caller, request: Request) -> Any:
        return delegations.listed(delegation_list.wanted(request.query_params))

    async def changes(request: Request, _caller: Caller) -> Any:
        after = whole_number(request, "after", 0, 2**53)

        def look() -> dict[str, Any]:
            with store.read() as connection:
                return delegation_list.changes(connection, after, clock())

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(look)

        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        return await broker.waker.poll(DELEGATIONS, read, lambda found: bool(found["delegations"]), wait)

    return [
        route("/v1/delegations", "GET", without_body(listed)),
        # In front of the route of one delegation, whose id is never this word.
        route("/v1/delegations/changes", "GET", changes),
        route("/v1/delegations", "POST", with_body(Issue, lambda c, b, _r: delegations.issue(c, b))),
        route(one, "GET", without_body(lambda _c, r: delegations.show(r.path_params["id"]))),
        route(
            f"{one}/revoke",
            "POST",
            with_body(Revoke, lambda c, b, r: delegations.revoke(c, r.path_params["id"], b)),
        ),
    ]
