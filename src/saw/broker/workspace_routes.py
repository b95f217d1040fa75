"""The calls that list workspaces and tell which changed. The feed has a path of its own: any word may be a workspace's id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.http import LONGEST_WAIT_S, whole_number, without_body
from saw.broker.wake import WORKSPACES
from saw.broker.workspace_list import changes, page, wanted

MakeRoute = Callable[[str, str, Any], Route]
_LONGEST_ID = 64


def workspace_list_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the two calls; ``route`` makes one that is open to whoever may call it."""
    store = broker.services.store

    def listed(_caller: Caller, request: Request) -> Any:
        asked = wanted(request.query_params)
        with store.read() as connection:
            return page(connection, asked)

    async def feed(request: Request, _caller: Caller) -> Any:
        after = whole_number(request, "after", 0, 2**53)
        behind = request.query_params.get("behind", "")
        if len(behind) > _LONGEST_ID:
            raise MalformedError("behind is no id of a workspace", cure="give the one of the answer before, or none")

        def look() -> dict[str, Any]:
            with store.read() as connection:
                return changes(connection, after, behind)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(look)

        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        return await broker.waker.poll(WORKSPACES, read, lambda found: bool(found["workspaces"]), wait)

    return [
        route("/v1/workspaces", "GET", without_body(listed)),
        route("/v1/workspace-changes", "GET", feed),
    ]
