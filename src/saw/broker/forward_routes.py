"""The calls about granted ports: on the operators' socket, and for operators and the security team who signed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.forwards import GrantForward, RevokeForward
from saw.broker.http import whole_number, with_body, without_body


def forward_routes(broker: Broker, route: Callable[[str, str, Any], Route]) -> list[Route]:
    """Return the three calls; ``route`` makes one that is open to whoever may call it."""
    forwards = broker.forwards

    def listed(_caller: Caller, request: Request) -> dict[str, Any]:
        asked = request.query_params
        if unknown := set(asked) - {"workspace_id", "all"}:
            raise MalformedError(f"there is no filter {min(unknown)!r}", cure="use workspace_id and all")
        return forwards.listed(asked.get("workspace_id"), everything=bool(whole_number(request, "all", 0, 1)))

    return [
        route("/v1/forwards", "GET", without_body(listed)),
        route("/v1/forwards", "POST", with_body(GrantForward, lambda c, b, _r: forwards.grant(c, b))),
        route(
            "/v1/forwards/{id}/revoke",
            "POST",
            with_body(RevokeForward, lambda c, b, r: forwards.revoke(c, r.path_params["id"], b)),
        ),
    ]
