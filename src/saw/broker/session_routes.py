"""The calls about sessions: the bastions' on TLS, with their long-poll, and the operators' on the socket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse
from starlette.routing import Route

from saw.broker.bastion_sessions import LARGEST_PAGE, EndRequest, SessionRequest
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.http import LONGEST_WAIT_S, filters_of, whole_number, with_body, without_body
from saw.broker.session_ends import session_key
from saw.sessions.messages import Closing, HostKey, Redeem, Watched

MakeRoute = Callable[[str, str, Any], Route]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the list, of which all must hold; ``after`` is the id that the page begins behind."""

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    person: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    live: bool = False
    after: Annotated[str, msgspec.Meta(max_length=64)] = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] | None = None


def bastion_session_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to bastions alone."""
    kept = broker.sessions

    async def watch(request: Request, caller: Caller) -> Watched:
        identifier = request.path_params["id"]
        wait = float(whole_number(request, "wait", 0, LONGEST_WAIT_S))

        async def read() -> Watched:
            return await run_in_threadpool(kept.watch, caller, identifier)

        return await broker.waker.poll(session_key(identifier), read, lambda found: found.state == "ended", wait)

    async def receive(request: Request, caller: Caller) -> dict[str, Any]:
        return await broker.recordings.receive(caller, request.path_params["id"], request.stream())

    one = "/v1/bastion/sessions/{id}"
    return [
        route("/v1/bastion/sessions/redeem", "POST", with_body(Redeem, lambda c, b, _r: kept.redeem(c, b))),
        route("/v1/bastion/host", "POST", with_body(HostKey, lambda c, b, _r: kept.host_certificate(c, b))),
        route(one, "GET", watch),
        route(f"{one}/close", "POST", with_body(Closing, lambda c, b, r: kept.close(c, r.path_params["id"], b))),
        route(f"{one}/recording", "PUT", receive),
    ]


def operator_session_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to operators alone."""
    kept, one = broker.sessions, "/v1/sessions/{id}"

    def send(_caller: Caller, request: Request) -> FileResponse:
        file = broker.recordings.file(request.path_params["id"])
        return FileResponse(file, media_type="application/octet-stream")

    def holding(move: Callable[[Caller, str, str], bool]) -> Any:
        def handle(caller: Caller, body: EndRequest, request: Request) -> dict[str, Any]:
            identifier = request.path_params["id"]
            changed = move(caller, identifier, body.reason)
            return {**kept.show(identifier), "changed": changed}

        return with_body(EndRequest, handle)

    def listed(_caller: Caller, request: Request) -> dict[str, Any]:
        asked = filters_of(request.query_params, Wanted, (), "see docs/sessions.md")
        return kept.list(asked.workspace_id, asked.person, live=asked.live, after=asked.after, limit=asked.limit)

    return [
        route("/v1/sessions", "GET", without_body(listed)),
        route("/v1/sessions", "POST", with_body(SessionRequest, lambda c, b, _r: kept.request(c, b))),
        route(one, "GET", without_body(lambda _c, r: kept.show(r.path_params["id"]))),
        route(f"{one}/end", "POST", with_body(EndRequest, lambda c, b, r: kept.end(c, r.path_params["id"], b))),
        route(f"{one}/recording", "GET", without_body(send)),
        route(f"{one}/recording/hold", "POST", holding(broker.recordings.hold)),
        route(f"{one}/recording/release", "POST", holding(broker.recordings.release)),
        route(f"{one}/key", "POST", without_body(lambda c, r: kept.recording_key(c, r.path_params["id"]))),
    ]
