"""The calls that list workspaces and tell which changed. The feed has a path of its own: any word may be a workspace's id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.feed_routes import behind, feed
from saw.broker.http import without_body
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

    def followed(connection: Connection, after: int, request: Request) -> dict[str, Any]:
        return changes(connection, after, behind(request, _LONGEST_ID, "id of a workspace"))

    return [
        route("/v1/workspaces", "GET", without_body(listed)),
        route("/v1/workspace-changes", "GET", feed(broker, "workspaces", WORKSPACES, followed)),
    ]
