"""The calls about legal holds: on the operators' socket, and for the security team and auditors who signed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.holds import AddHold, ReleaseHold
from saw.broker.http import whole_number, with_body, without_body


def hold_routes(broker: Broker, route: Callable[[str, str, Any], Route]) -> list[Route]:
    """Return the three calls; ``route`` makes one that is open to whoever may call it."""
    holds = broker.holds

    def listed(_caller: Caller, request: Request) -> dict[str, Any]:
        return holds.listed(everything=bool(whole_number(request, "all", 0, 1)))

    return [
        route("/v1/holds", "GET", without_body(listed)),
        route("/v1/holds", "POST", with_body(AddHold, lambda c, b, _r: holds.add(c, b))),
        route(
            "/v1/holds/{id}/release",
            "POST",
            with_body(ReleaseHold, lambda c, b, r: holds.release(c, r.path_params["id"], b)),
        ),
    ]
