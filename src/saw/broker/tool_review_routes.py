"""The calls of a workspace about tools over stdio, under its own certificate: what was handed out, and asking people.

None of them decides.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.handed_tools import ToolDelegations, require_self
from saw.broker.http import LONGEST_WAIT_S, whole_number, with_body, without_body
from saw.broker.limits import RateLimit
from saw.broker.review_states import review_key
from saw.policy.handed_tools import HandedTools
from saw.review.tool import MAX_PARAMS, AskTool, ClaimTool, EndTool, ToolView

MakeRoute = Callable[[str, str, Any], Route]
#: Parameters travel in base64, which takes a third more.
MAX_BODY = MAX_PARAMS // 3 * 4 + 16 * 1024


def tool_review_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that takes whoever presents a certificate, or none."""
    kept, waker = broker.tools, broker.waker
    # A share of its own: an agent that asks too often must not keep its workspace from attesting.
    asked = RateLimit(40, 4.0, time.monotonic)
    # Nor from learning what was revoked. It is the workspace alone that takes of it.
    told = RateLimit(40, 4.0, time.monotonic)
    one = "/v1/workspace/reviews/{id}"
    handed = ToolDelegations(broker.services)

    def tools(caller: Caller, request: Request) -> HandedTools:
        workspace = request.query_params.get("workspace_id", "")
        require_self(caller, workspace)
        told.take(caller.principal)
        return handed.told(caller, workspace)

    async def view(request: Request, caller: Caller) -> ToolView:
        identifier = request.path_params["id"]
        workspace = request.query_params.get("workspace_id", "")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + whole_number(request, "wait", 0, LONGEST_WAIT_S)

        async def read() -> ToolView:
            return await run_in_threadpool(kept.view, caller, identifier, workspace)

        found = await read()
        if found.state == "pending" and (left := deadline - loop.time()) > 0:
            found = await waker.poll(review_key(identifier), read, lambda now: now.state != "pending", left)
        return found

    def ask(caller: Caller, body: AskTool, _request: Request) -> ToolView:
        asked.take(caller.principal)
        return kept.ask(caller, body)

    def claim(caller: Caller, body: ClaimTool, request: Request) -> ToolView:
        asked.take(caller.principal)  # a refused one is an event
        return kept.claim(caller, request.path_params["id"], body)

    return [
        route("/v1/workspace/tools", "GET", without_body(tools)),
        route("/v1/workspace/reviews", "POST", with_body(AskTool, ask, limit=MAX_BODY)),
        route(one, "GET", view),
        route(
            f"{one}/claim",
            "POST",
            with_body(ClaimTool, claim, limit=MAX_BODY),
        ),
        route(f"{one}/result", "POST", with_body(EndTool, lambda c, b, r: kept.result(c, r.path_params["id"], b))),
    ]
