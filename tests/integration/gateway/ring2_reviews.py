"""The broker's side of reviews as ``saw.review.messages`` says it, in memory: open, look, claim once, take the result.

Decisions are made by the test. Whoever approves here is not checked: that is the real broker's part.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import msgspec

from saw.review.digest import request_digest
from saw.review.messages import (
    BEYOND_BUDGET,
    FINAL,
    ClaimAnswer,
    Claimed,
    ContextResult,
    OpenReview,
    ReadBack,
    ReadBackResult,
    ReadContext,
    ReadState,
    ReviewedAnswer,
    ReviewResult,
    ReviewView,
)

ROOT = "/v1/perimeter/reviews"
Reply = tuple[int, Any]
UNKNOWN: Reply = (404, {"error": "refused", "code": "unknown_review"})


class Review(msgspec.Struct):
    """One review and what was done to it."""

    opened: OpenReview
    view: ReviewView
    claim: str = ""
    claims: int = 0
    results: list[ReviewResult] = []


class Reviews:
    """Every review of a rig. ``spoil`` may change what a claim says, ``claim_s`` is how long one lasts (seconds), ``refusal`` why
    nothing is taken in."""

    def __init__(self) -> None:
        self.all: dict[str, Review] = {}
        self.spoil: Any = lambda claimed: claimed
        self.claim_s = 30.0
        self.answering = True
        self.refusal = ""
        self.to_read_back: list[ReadBack] = []
        self.read_back: list[tuple[str, ReadBackResult]] = []
        self.to_read: list[ReadContext | ReadState] = []
        self.contexts: list[tuple[str, ContextResult]] = []
        self._changed = threading.Condition()
        self._closed = False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> None:
        """Forget everything; a claim that is out stays out."""
        with self._changed:
            self.all.clear()
            self.spoil = lambda claimed: claimed
            self.claim_s, self.answering, self.refusal = 30.0, True, ""
            self.to_read_back.clear()
            self.read_back.clear()
            self.to_read.clear()
            self.contexts.clear()

    @property
    def one(self) -> Review:
        """Return the only review there is."""
        [review] = self.all.values()
        return review

    def move(self, review: str, state: str, answer: ReviewedAnswer | None = None, detail: str = "") -> None:
        """Bring a review to ``state``."""
        with self._changed:
            found = self.all[review]
            found.view = msgspec.structs.replace(found.view, state=state, answer=answer, detail=detail)
            self._changed.notify_all()

    def serve(self, method: str, path: str, query: str, body: bytes) -> Reply:
        """Answer one call of a perimeter."""
        if not self.answering:
            return 503, {}
        if (method, path) == ("POST", ROOT) and self.refusal:
            return 409, {"error": "refused", "code": self.refusal}
        if (method, path) == ("POST", ROOT):
            return self._open(msgspec.json.decode(body, type=OpenReview))
        if (method, path) == ("POST", f"{ROOT}/claim"):
            return self._claim()
        review, _, verb = path.removeprefix(f"{ROOT}/").partition("/")
        if (method, verb) == ("POST", "result"):
            return self._result(review, msgspec.json.decode(body, type=ReviewResult))
        if (method, verb) == ("POST", "read-back"):
            self.read_back.append((review, msgspec.json.decode(body, type=ReadBackResult)))
            return 200, {"recorded": True}
        if (method, verb) == ("POST", "context"):
            self.contexts.append((review, msgspec.json.decode(body, type=ContextResult)))
            return 200, {"recorded": True}
        asked: Mapping[str, list[str]] = parse_qs(query, strict_parsing=True)
        return self._look(review, asked["workspace_id"][0], int(asked["wait"][0]))

    def _open(self, asked: OpenReview) -> Reply:
        # Validated as the real side does: what is sent satisfies every bound of the contract.
        digest = request_digest(asked.workspace_id, asked.call)
        now = datetime.now(UTC)
        with self._changed:
            for review in self.all.values():
                same = (review.view.request_digest, review.opened.policy_digest) == (digest, asked.policy_digest)
                if same and review.view.state not in FINAL:
                    return 200, review.view
            view = ReviewView(
                id=f"rv-{secrets.token_hex(16)}", workspace_id=asked.workspace_id, state="pending", request_digest=digest,
                opened_at=now.isoformat(), expires_at=(now + timedelta(seconds=asked.expires_in_s)).isoformat(),
                quorum=asked.quorum,
            )  # fmt: skip
            self.all[view.id] = Review(asked, view)
            return 200, view

    def _look(self, review: str, workspace: str, wait: int) -> Reply:
        with self._changed:
            found = self.all.get(review)
            if found is None or found.view.workspace_id != workspace:
                return UNKNOWN
            self._changed.wait_for(lambda: found.view.state in FINAL or self._closed, timeout=wait)
            return 200, found.view

    def ask(self, review: str) -> None:
        """Have a perimeter read back what became of a review."""
        with self._changed:
            found = self.all[review]
            self.to_read_back.append(
                ReadBack(
                    id=review, workspace_id=found.view.workspace_id, policy_digest=found.opened.policy_digest,
                    call=found.opened.call, binary=found.opened.binary,
                )
            )  # fmt: skip
            self._changed.notify_all()

    def ask_context(self, asked: ReadContext | ReadState) -> None:
        """Have a perimeter read what a push or a write would change."""
        with self._changed:
            self.to_read.append(asked)
            self._changed.notify_all()

    def wait_for_approval(self, wait: float) -> bool:
        """Wait that many seconds at most until there is something to claim, or nobody answers any more."""
        with self._changed:
            return bool(
                self._changed.wait_for(
                    lambda: self._approved() or self.to_read_back or self.to_read or self._closed, timeout=wait
                )
            )

    def _claim(self) -> Reply:
        with self._changed:
            review = self._approved()
            if review is None:
                asked = self.to_read.pop(0) if self.to_read else None
                return 200, ClaimAnswer(
                    read_back=self.to_read_back.pop(0) if self.to_read_back else None,
                    read_context=asked if isinstance(asked, ReadContext) else None,
                    read_state=asked if isinstance(asked, ReadState) else None,
                )
            review.claim, review.claims = secrets.token_urlsafe(32), review.claims + 1
            review.view = msgspec.structs.replace(review.view, state="executing")
            claimed = Claimed(
                id=review.view.id, claim=review.claim, workspace_id=review.view.workspace_id,
                claim_ends_at=(datetime.now(UTC) + timedelta(seconds=self.claim_s)).isoformat(),
                policy_digest=review.opened.policy_digest, request_digest=review.view.request_digest,
                call=review.opened.call, binary=review.opened.binary,
                rule=review.opened.rule if review.opened.rule.startswith(BEYOND_BUDGET) else "",
            )  # fmt: skip
            return 200, ClaimAnswer(claimed=self.spoil(claimed))

    def _approved(self) -> Review | None:
        return next((review for review in self.all.values() if review.view.state == "approved"), None)

    def _result(self, review: str, result: ReviewResult) -> Reply:
        with self._changed:
            found = self.all.get(review)
            if found is None or not secrets.compare_digest(found.claim, result.claim):
                return UNKNOWN
            found.results.append(result)
            found.view = msgspec.structs.replace(
                found.view, state=result.outcome, answer=result.answer, detail=result.detail
            )
            self._changed.notify_all()
            return 200, {}
