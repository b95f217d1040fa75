"""The operator's calls about rollouts: look, halt, resume, and the rollback in escrow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.http import with_body, without_body
from saw.broker.rollout_control import Deposit, Order

MAX_DEPOSIT = 32 * 1024 * 1024
MakeRoute = Callable[[str, str, Any], Route]


def operator_rollout_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to operators alone."""
    rollouts, views = broker.rollouts, broker.rollout_views

    def halt(caller: Caller, order: Order, request: Request) -> Any:
        revision = rollouts.halt(caller, request.path_params["ring"], order)
        return {"revision": revision, **views.ring(request.path_params["ring"])}

    def resume(caller: Caller, order: Order, request: Request) -> Any:
        revision = rollouts.resume(caller, request.path_params["ring"], order)
        return {"revision": revision, **views.ring(request.path_params["ring"])}

    def deposit(caller: Caller, body: Deposit, request: Request) -> Any:
        changed = rollouts.deposit(caller, request.path_params["ring"], body)
        return {"changed": changed, **views.ring(request.path_params["ring"])}

    return [
        route("/v1/policy/rollouts", "GET", without_body(lambda _c, _r: views.ring(None))),
        route("/v1/policy/rollouts/{ring}", "GET", without_body(lambda _c, r: views.ring(r.path_params["ring"]))),
        route("/v1/policy/rollouts/{ring}/halt", "POST", with_body(Order, halt)),
        route("/v1/policy/rollouts/{ring}/resume", "POST", with_body(Order, resume)),
        route("/v1/policy/rollouts/{ring}/rollback", "PUT", with_body(Deposit, deposit, limit=MAX_DEPOSIT)),
        route("/v1/workspaces/{id}/policy", "GET", without_body(lambda _c, r: views.workspace(r.path_params["id"]))),
    ]
