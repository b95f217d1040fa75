"""Reading the trail over a Unix socket: by chain, in the order of arrival, and whether it is whole."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.audit.choose import Choice
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.http import LONGEST_WAIT_S, whole_number, without_body
from saw.broker.wake import TRAIL

_PAGING = {"after", "limit", "wait"}


def audit_routes(broker: Broker, route: Any) -> list[Route]:
    """Return the three calls; ``route`` makes a guarded route of path, method and handler."""

    def page(_caller: Caller, request: Request) -> dict[str, Any]:
        after, limit = whole_number(request, "after", 0, 2**53), whole_number(request, "limit", 100, 1000)
        return broker.trail.page(request.query_params.get("source", "broker"), after, limit)

    async def log(request: Request, _caller: Caller) -> Any:
        after, limit = whole_number(request, "after", 0, 2**53), whole_number(request, "limit", 100, 1000)
        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        choice = chosen(request)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(broker.trail.log, after, limit, choice)

        return await broker.waker.poll(TRAIL, read, lambda found: bool(found["next"] != after), wait)

    return [
        route("/v1/audit/events", "GET", without_body(page)),
        route("/v1/audit/log", "GET", log),
        route("/v1/audit/verify", "GET", without_body(lambda _c, _r: broker.trail.verify())),
    ]


def chosen(request: Request) -> Choice:
    """Return the filters of a query; raise :class:`MalformedError` for an unknown one, or one that is given twice."""
    pairs = [pair for pair in request.query_params.multi_items() if pair[0] not in _PAGING]
    if len({name for name, _ in pairs}) < len(pairs):
        raise MalformedError("a filter is given twice", cure="give each once")
    try:
        return msgspec.convert(dict(pairs), Choice, strict=False)
    except msgspec.ValidationError as error:
        raise MalformedError(f"a filter is not valid: {error}", cure="see docs/architecture.md") from error
