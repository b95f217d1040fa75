"""The calls by which a workspace asks for more than its policy allows, and by which people answer. None allows anything."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.http import whole_number, with_body, without_body
from saw.broker.limits import RateLimit
from saw.broker.policy_request_views import AnswerRequest, PolicyRequestPage
from saw.broker.policy_requests import MAX_PAGE
from saw.policy.policy_request import MAX_BODY, Asked, AskedList, AskMore

MakeRoute = Callable[[str, str, Any], Route]


def workspace_request_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the two calls of a workspace; ``route`` makes one that takes whoever presents a certificate, or none."""
    kept = broker.policy_requests
    # A share of its own: an agent that asks too often must not keep its workspace from attesting. Each ask is judged.
    asked = RateLimit(10, 0.1, time.monotonic)
    looked = RateLimit(20, 2.0, time.monotonic)

    def ask(caller: Caller, body: AskMore, _request: Request) -> Asked:
        asked.take(caller.principal)
        return kept.ask(caller, body)

    def mine(caller: Caller, request: Request) -> AskedList:
        looked.take(caller.principal)
        return kept.mine(caller, request.query_params.get("workspace_id", ""))

    path = "/v1/workspace/policy-requests"
    return [
        route(path, "POST", with_body(AskMore, ask, limit=2 * MAX_BODY)),
        route(path, "GET", without_body(mine)),
    ]


def operator_request_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the calls of people; ``route`` makes one that is open to whoever may call it."""
    kept = broker.policy_requests

    def listed(_caller: Caller, request: Request) -> PolicyRequestPage:
        query = request.query_params
        return kept.listed(
            state=query.get("state", ""),
            workspace=query.get("workspace_id", ""),
            sponsor=query.get("sponsor", ""),
            after=query.get("after", ""),
            limit=whole_number(request, "limit", 50, MAX_PAGE),
        )

    return [
        route("/v1/policy/requests", "GET", without_body(listed)),
        route("/v1/policy/requests/{id}", "GET", without_body(lambda _c, r: kept.show(r.path_params["id"]))),
        route(
            "/v1/policy/requests/{id}/answer",
            "POST",
            with_body(AnswerRequest, lambda c, b, r: kept.answer(c, r.path_params["id"], b)),
        ),
    ]
