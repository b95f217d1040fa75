"""What the calls that follow a list have in common: they read behind a number, and wait until there is something."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.http import LONGEST_WAIT_S, whole_number

Changes = Callable[[Connection, int, Request], dict[str, Any]]


def feed(broker: Broker, field: str, key: str, changes: Changes) -> Callable[[Request, Caller], Awaitable[Any]]:
    """Return the handler of a feed: ``after`` is the number to read behind, ``wait`` how long to wait for news (seconds).

    ``changes`` reads what the call answers; as long as the list in ``field`` is empty the call waits for ``key``.
    """
    store = broker.services.store

    async def follow(request: Request, _caller: Caller) -> Any:
        after = whole_number(request, "after", 0, 2**53)

        def look() -> dict[str, Any]:
            with store.read() as connection:
                return changes(connection, after, request)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(look)

        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        return await broker.waker.poll(key, read, lambda found: bool(found[field]), wait)

    return follow


def behind(request: Request, longest: int, what: str) -> str:
    """Return the entry, of those with the number ``after``, behind which to read; raise :class:`MalformedError` for none."""
    named = request.query_params.get("behind", "")
    if len(named) > longest:
        raise MalformedError(f"behind is no {what}", cure="give the one of the answer before, or none")
    return named
