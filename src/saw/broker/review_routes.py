"""The calls about reviews: the perimeters' on TLS, with their long-polls, and the operators' on the socket."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.routing import Route

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.http import DEFAULT_LIMIT, decode, filters_of, read_body, whole_number, with_body, without_body
from saw.broker.review_decisions import LARGEST_PAGE, AskNonce, Cancel
from saw.broker.review_evidence import Decide
from saw.broker.review_read_back import ReadAgain
from saw.broker.review_states import claims_key, review_key
from saw.broker.reviewers import Retire, Reviewer
from saw.review.messages import (
    FINAL,
    MAX_REVIEWED_ANSWER,
    MAX_REVIEWED_BODY,
    ClaimAnswer,
    ClaimReview,
    ContextResult,
    OpenReview,
    ReadBackResult,
    ReviewResult,
    ReviewState,
    ReviewView,
)

MakeRoute = Callable[[str, str, Any], Route]

_HEADERS = 2 * 1024 * 1024
#: Bodies travel in base64, which takes a third more.
MAX_OPENING = MAX_REVIEWED_BODY // 3 * 4 + _HEADERS
MAX_RESULT = MAX_REVIEWED_ANSWER // 3 * 4 + _HEADERS
LONGEST_WAIT_S = 30
_SHORTEST_WAIT_S = 0.05
_STATES = ", ".join(get_args(ReviewState))


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the list, of which all must hold; ``after`` is the id that the page begins behind."""

    state: ReviewState | Literal[""] = ""
    workspace_id: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    owed: bool = False
    after: Annotated[str, msgspec.Meta(max_length=64)] = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = LARGEST_PAGE


def perimeter_review_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to perimeters alone."""
    kept, waker = broker.reviews, broker.waker

    async def view(request: Request, caller: Caller) -> ReviewView:
        identifier = request.path_params["id"]
        workspace = request.query_params.get("workspace_id", "")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + whole_number(request, "wait", 0, LONGEST_WAIT_S)

        async def read() -> tuple[ReviewView, float]:
            return await run_in_threadpool(kept.view, caller, identifier, workspace)

        found, due_in = await read()
        while found.state not in FINAL and not waker.closed and (left := deadline - loop.time()) > 0:
            # Wake by ourselves when time alone changes it: it expires, or its claim is lost.
            wait = min(left, max(due_in, _SHORTEST_WAIT_S)) if due_in else left
            found, due_in = await waker.poll(review_key(identifier), read, lambda now: now[0].state in FINAL, wait)
        return found

    async def claim(request: Request, caller: Caller) -> ClaimAnswer:
        wanted = decode(await read_body(request, DEFAULT_LIMIT), ClaimReview)

        async def read() -> ClaimAnswer | None:
            # A claim that nobody is there to take would be lost.
            if await request.is_disconnected():
                return None
            return await run_in_threadpool(kept.claim, caller, wanted.claim)

        def over(found: ClaimAnswer | None) -> bool:
            return found is None or found != ClaimAnswer()

        return await waker.poll(claims_key(caller.principal), read, over, wanted.wait) or ClaimAnswer()

    return [
        route(
            "/v1/perimeter/reviews",
            "POST",
            with_body(OpenReview, lambda c, b, _r: kept.open(c, b), limit=MAX_OPENING),
        ),
        route("/v1/perimeter/reviews/claim", "POST", claim),
        route("/v1/perimeter/reviews/{id}", "GET", view),
        route(
            "/v1/perimeter/reviews/{id}/result",
            "POST",
            with_body(ReviewResult, lambda c, b, r: kept.result(c, r.path_params["id"], b), limit=MAX_RESULT),
        ),
        route(
            "/v1/perimeter/reviews/{id}/read-back",
            "POST",
            with_body(ReadBackResult, lambda c, b, r: kept.read_backs.told(c, r.path_params["id"], b)),
        ),
        route(
            "/v1/perimeter/reviews/{id}/context",
            "POST",
            with_body(ContextResult, lambda c, b, r: kept.contexts.told(c, r.path_params["id"], b), limit=MAX_OPENING),
        ),
    ]


def operator_review_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to operators alone."""
    people, decisions = broker.reviewers, broker.decisions
    person, one = "/v1/reviewers/{name}", "/v1/reviews/{id}"

    def listed(_caller: Caller, request: Request) -> Any:
        asked = filters_of(request.query_params, Wanted, (), f"see docs/review.md; states are {_STATES}")
        return decisions.listed(
            asked.state or None, asked.workspace_id, owed=asked.owed, after=asked.after, limit=asked.limit
        )

    return [
        route("/v1/reviewers", "GET", without_body(lambda _c, _r: people.list())),
        route(person, "GET", without_body(lambda _c, r: people.show(r.path_params["name"]))),
        route(person, "PUT", with_body(Reviewer, lambda c, b, r: people.put(c, r.path_params["name"], b))),
        route(
            f"{person}/retire", "POST", with_body(Retire, lambda c, b, r: people.retire(c, r.path_params["name"], b))
        ),
        route("/v1/reviews", "GET", without_body(listed)),
        route(one, "GET", without_body(lambda _c, r: decisions.show(r.path_params["id"]))),
        route(f"{one}/call", "GET", without_body(lambda _c, r: decisions.call(r.path_params["id"]))),
        route(f"{one}/receipt", "GET", without_body(lambda _c, r: decisions.receipt(r.path_params["id"]))),
        route(f"{one}/nonce", "POST", with_body(AskNonce, lambda _c, b, r: decisions.nonce(r.path_params["id"], b))),
        route(f"{one}/decide", "POST", with_body(Decide, lambda c, b, r: decisions.decide(c, r.path_params["id"], b))),
        route(f"{one}/cancel", "POST", with_body(Cancel, lambda c, b, r: decisions.cancel(c, r.path_params["id"], b))),
        route(
            f"{one}/read-back",
            "POST",
            with_body(ReadAgain, lambda c, b, r: broker.reviews.read_backs.again(c, r.path_params["id"], b)),
        ),
    ]
