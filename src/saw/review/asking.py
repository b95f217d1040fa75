"""How a run asks for a change to the fleet: it asks, waits, states everything once more, and claims; then it tells its end."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from saw.errors import SawError, UnavailableError
from saw.review.decide import Client
from saw.review.gate import GatePreview, GateRefused, GateStatement, GateView

ENDED = frozenset({"denied", "expired", "cancelled"})
"""States in which nothing will be claimed any more, and nothing was."""
RETRY_S = 2.0
"""Pause after the broker did not answer (seconds)."""
CLAIM_TRIES = 5

T = TypeVar("T")
Told = Callable[[GateView | None, float], None]


class NotApproved(SawError):
    """People did not agree, or not in time."""

    def __init__(self, code: str, message: str, cure: str, details: dict[str, object]) -> None:
        super().__init__(message, cure=cure, details=details)
        self.code = code


def new_claim(random: Callable[[int], bytes]) -> str:
    """Return the secret of one run (base64url of 32 bytes)."""
    return base64.urlsafe_b64encode(random(32)).rstrip(b"=").decode()


class Question:
    """The calls about one change, through any client that may ask.

    ``clock`` and ``pause`` are in seconds; ``told(view, waited)`` hears how it stands each time the broker has answered, with
    None when it did not.
    """

    def __init__(self, client: Client, clock: Callable[[], float], pause: Callable[[float], None], told: Told) -> None:
        self._client = client
        self._clock = clock
        self._pause = pause
        self._told = told

    def preview(self, statement: GateStatement) -> GatePreview:
        """Return what would be asked; nothing is."""
        return _read(self._client.request("POST", "/v1/gates/preview", _body(statement=statement)), GatePreview)

    def ask(self, statement: GateStatement) -> GateView:
        """Ask; the same question that waits already is answered with its review."""
        return _view(self._client.request("POST", "/v1/gates", _body(statement=statement)))

    def view(self, identifier: str, wait_s: int = 0) -> GateView:
        """Return how a question stands, after at most ``wait_s`` seconds as long as it is pending."""
        return _view(self._client.request("GET", f"{_path(identifier)}?wait={wait_s}"))

    def agreed(
        self, identifier: str, claim: str, state: Callable[[], GateStatement], timeout_s: float, poll_s: int
    ) -> GateView:
        """Wait until people agreed and claim the wave with what ``state`` makes of everything then.

        Raises :class:`NotApproved` when they do not, or not within ``timeout_s`` seconds; the question then waits on. A broker
        that does not answer is asked again.
        """
        began = self._clock()
        while True:
            view = self._waited(identifier, began, timeout_s, poll_s)
            if view.state in ENDED:
                raise _ended(view)
            try:
                return self._claim(identifier, state(), claim)
            except SawError as error:
                # An approval may cease to count at the last moment; then it waits again.
                if error.code != "not_approved":
                    raise

    def end(self, identifier: str, claim: str, outcome: str, detail: str) -> GateView:
        """Tell how the wave ended."""
        body = _body(claim=claim, outcome=outcome, detail=detail)
        return _view(self._client.request("POST", f"{_path(identifier)}/result", body))

    def _waited(self, identifier: str, began: float, timeout_s: float, poll_s: int) -> GateView:
        while True:
            left = timeout_s - (self._clock() - began)
            view = None
            try:
                view = self.view(identifier, max(0, min(poll_s, math.ceil(left))))
            except UnavailableError:
                if left <= 0:
                    raise
                self._pause(RETRY_S)
            if view is not None and view.state != "pending":
                return view
            waited = self._clock() - began
            self._told(view, waited)
            if waited >= timeout_s and view is not None:
                raise NotApproved(
                    "not_in_time",
                    f"{identifier} still waits for {view.group} ({len(view.approved_by)} of {view.quorum} approved)",
                    f"it is open until {view.expires_at}: run the same again to wait on",
                    {"id": identifier, "state": view.state},
                )

    def _claim(self, identifier: str, statement: GateStatement, claim: str) -> GateView:
        for left in reversed(range(CLAIM_TRIES)):
            try:
                return _view(
                    self._client.request("POST", f"{_path(identifier)}/claim", _body(statement=statement, claim=claim))
                )
            except UnavailableError:
                # The answer may have been lost after the claim was given: the same claim is answered again.
                if not left:
                    raise
                self._pause(RETRY_S)
        raise AssertionError


def _ended(view: GateView) -> NotApproved:
    details: dict[str, object] = {"id": view.id, "state": view.state, "decisions": msgspec.to_builtins(view.decisions)}
    if view.state == "denied":
        said = [one for one in view.decisions if one.decision == "deny"]
        why = "".join(f": {one.comment}" for one in said[-1:] if one.comment)
        who = said[-1].approver if said else "somebody"
        return NotApproved(
            "review_denied", f"{view.id} was denied by {who}{why}", "talk to them, then ask again", details
        )
    if view.state == "expired":
        why = f"{view.id} expired at {view.expires_at}: {view.detail}"
        return NotApproved("review_expired", why, "ask again when the people who decide are there", details)
    return NotApproved("review_cancelled", f"{view.id} was cancelled: {view.detail}", "ask again", details)


def _path(identifier: str) -> str:
    return f"/v1/gates/{quote(identifier, safe='')}"


def _body(**values: Any) -> Any:
    return msgspec.to_builtins(values)


def _view(raw: dict[str, Any]) -> GateView:
    return _read(raw, GateView)


def _read(raw: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise GateRefused(
            f"the broker's answer is not valid: {error}", cure="use the version of saw that it has"
        ) from error
