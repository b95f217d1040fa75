"""The calls about lifecycle jobs: for who asks (operators, people, machines), and for workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import MalformedError
from saw.broker.http import DEFAULT_LIMIT, LONGEST_WAIT_S, decode, read_body, whole_number, with_body, without_body
from saw.broker.job_states import QUEUED, job_key
from saw.broker.jobs import MAX_PAGE
from saw.jobs.messages import LIVE, AskClaim, AskJob, Beat, Cancel, ClaimAnswer, End

MakeRoute = Callable[[str, str, Any], Route]
MAX_BEAT = 1024 * 1024


def job_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes of who asks; ``route`` makes one that is open to whoever may."""
    kept, waker, one = broker.jobs, broker.waker, "/v1/jobs/{id}"

    def listed(caller: Caller, request: Request) -> Any:
        asked = request.query_params
        if unknown := set(asked) - {"state", "workspace", "after", "limit"}:
            raise MalformedError(f"there is no filter {min(unknown)!r}", cure="use state, workspace, after and limit")
        names = {name: asked.get(name, "") for name in ("state", "workspace", "after")}
        return kept.listed(caller, limit=whole_number(request, "limit", 100, MAX_PAGE), **names)

    async def events(request: Request, caller: Caller) -> Any:
        identifier = request.path_params["id"]
        after = whole_number(request, "after", 0, 2**53)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(kept.events, caller, identifier, after)

        def news(found: dict[str, Any]) -> bool:
            return bool(found["events"]) or found["job"]["state"] not in LIVE

        return await waker.poll(
            job_key(identifier), read, news, float(whole_number(request, "wait", 0, LONGEST_WAIT_S))
        )

    return [
        route("/v1/jobs", "POST", with_body(AskJob, lambda c, b, _r: kept.ask(c, b))),
        route("/v1/jobs", "GET", without_body(listed)),
        route(one, "GET", without_body(lambda c, r: kept.show(c, r.path_params["id"]))),
        route(f"{one}/events", "GET", events),
        route(f"{one}/cancel", "POST", with_body(Cancel, lambda c, b, r: kept.cancel(c, r.path_params["id"], b))),
        route(f"{one}/resume", "POST", without_body(lambda c, r: kept.resume(c, r.path_params["id"]))),
    ]


def worker_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes of workers; each checks that the caller is one."""
    kept, waker, one = broker.job_work, broker.waker, "/v1/worker/jobs/{id}"

    async def claim(request: Request, caller: Caller) -> ClaimAnswer:
        await run_in_threadpool(kept.require_worker, caller)
        wanted = decode(await read_body(request, DEFAULT_LIMIT), AskClaim)

        async def read() -> ClaimAnswer | None:
            # A claim that nobody is there to take would be lost.
            if await request.is_disconnected():
                return None
            return await run_in_threadpool(kept.claim, caller, wanted)

        def over(found: ClaimAnswer | None) -> bool:
            return found is None or found.claimed is not None

        return await waker.poll(QUEUED, read, over, float(wanted.wait)) or ClaimAnswer()

    def admitted(call: Callable[[Caller, str, Any], Any]) -> Callable[[Caller, Any, Request], Any]:
        def handle(caller: Caller, body: Any, request: Request) -> Any:
            kept.require_worker(caller)
            return call(caller, request.path_params["id"], body)

        return handle

    return [
        route("/v1/worker/claim", "POST", claim),
        route(f"{one}/beat", "POST", with_body(Beat, admitted(kept.beat), limit=MAX_BEAT)),
        route(f"{one}/end", "POST", with_body(End, admitted(kept.end))),
    ]
