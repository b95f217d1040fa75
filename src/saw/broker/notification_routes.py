"""The calls about what people are told: list, test, try again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.http import LONGEST_WAIT_S, whole_number, with_body, without_body
from saw.broker.notification_queue import notification_key
from saw.broker.notifications import MAX_PAGE, Trial

MakeRoute = Callable[[str, str, Any], Route]


def notification_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the four calls; ``route`` makes one that is open to whoever may call it."""
    kept, one = broker.notifications, "/v1/notifications/{id}"

    def listed(_caller: Caller, request: Request) -> Any:
        asked = request.query_params
        if unknown := set(asked) - {"state", "channel", "after", "limit"}:
            raise MalformedError(f"there is no filter {min(unknown)!r}", cure="use state, channel, after and limit")
        names = {name: asked.get(name, "") for name in ("state", "channel", "after")}
        return kept.listed(limit=whole_number(request, "limit", 100, MAX_PAGE), **names)

    async def show(request: Request, _caller: Caller) -> Any:
        identifier = request.path_params["id"]

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(kept.show, identifier)

        def tried(found: dict[str, Any]) -> bool:
            return found["state"] in {"delivered", "given_up"} or (
                found["state"] == "waiting" and found["attempts"] > 0
            )

        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        return await broker.waker.poll(notification_key(identifier), read, tried, wait)

    return [
        route("/v1/notifications", "GET", without_body(listed)),
        route("/v1/notifications/test", "POST", with_body(Trial, lambda c, b, _r: kept.test(c, b))),
        route(one, "GET", show),
        route(f"{one}/retry", "POST", without_body(lambda c, r: kept.retry(c, r.path_params["id"]))),
    ]
