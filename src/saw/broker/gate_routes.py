"""The calls about changes to the fleet, for operators on the socket and for machines on TLS. None of them decides."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.http import LONGEST_WAIT_S, whole_number, with_body
from saw.broker.review_states import review_key
from saw.review.gate import MAX_GATE, AskGate, ClaimGate, EndGate, GateView

MakeRoute = Callable[[str, str, Any], Route]
#: Escapes of JSON may take more than the canonical form, whose length is bounded by itself.
MAX_BODY = 2 * MAX_GATE


def gate_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to whoever may ask."""
    gates, waker = broker.gates, broker.waker
    one = "/v1/gates/{id}"

    async def view(request: Request, caller: Caller) -> GateView:
        identifier = request.path_params["id"]
        loop = asyncio.get_running_loop()
        deadline = loop.time() + whole_number(request, "wait", 0, LONGEST_WAIT_S)

        async def read() -> GateView:
            return await run_in_threadpool(gates.view, caller, identifier)

        found = await read()
        if found.state == "pending" and (left := deadline - loop.time()) > 0:
            found = await waker.poll(review_key(identifier), read, lambda now: now.state != "pending", left)
        return found

    return [
        route("/v1/gates", "POST", with_body(AskGate, lambda c, b, _r: gates.ask(c, b), limit=MAX_BODY)),
        route("/v1/gates/preview", "POST", with_body(AskGate, lambda c, b, _r: gates.preview(c, b), limit=MAX_BODY)),
        route(one, "GET", view),
        route(
            f"{one}/claim",
            "POST",
            with_body(ClaimGate, lambda c, b, r: gates.claim(c, r.path_params["id"], b), limit=MAX_BODY),
        ),
        route(f"{one}/result", "POST", with_body(EndGate, lambda c, b, r: gates.result(c, r.path_params["id"], b))),
    ]
