"""What the perimeter asks the broker about reviews, over mutual TLS of its own: ``/v1/perimeter/reviews``."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from saw import jsontext
from saw.gateway.config import GatekeeperConfig
from saw.gateway.errors import ReviewRefused, ReviewUnavailable, UnknownReview
from saw.gateway.link import tls_context
from saw.review.digest import request_digest
from saw.review.messages import (
    ClaimAnswer,
    Claimed,
    ClaimReview,
    ContextResult,
    OpenReview,
    ReadBack,
    ReadBackResult,
    ReadContext,
    ReadState,
    ReviewResult,
    ReviewView,
)

REVIEWS = "/v1/perimeter/reviews"
MOST_OF_AN_ANSWER = 16 * 1024 * 1024
"""Largest answer of the broker that is read (bytes): a claimed call with its body in base64, and room."""
_PATIENCE_S = 10.0

Answer = TypeVar("Answer")


class ReviewLink:
    """Calls of the broker's review service. A client is renewed when a certificate file changes; running calls go on."""

    def __init__(self, config: GatekeeperConfig) -> None:
        self._config = config
        self._clients: list[httpx.AsyncClient] = []
        self._stamps: tuple[int, ...] = ()

    def _client(self) -> httpx.AsyncClient:
        files: tuple[Path, ...] = (self._config.ca_file, self._config.cert_file, self._config.key_file)
        stamps = tuple(path.stat().st_mtime_ns for path in files)
        if not self._clients or stamps != self._stamps:
            client = httpx.AsyncClient(
                base_url=self._config.broker_url,
                verify=tls_context(self._config),
                timeout=httpx.Timeout(5.0, read=_PATIENCE_S),
                limits=httpx.Limits(max_connections=200, max_keepalive_connections=20),
                trust_env=False,
            )
            self._clients.append(client)
            self._stamps = stamps
        return self._clients[-1]

    async def close(self) -> None:
        """Close the connections."""
        clients, self._clients = self._clients, []
        for client in clients:
            await client.aclose()

    async def open(self, asked: OpenReview) -> ReviewView:
        """Open a review, or get the one that is open for the same call.

        Raises :class:`ReviewRefused` where the broker takes it in for none, and :class:`ReviewUnavailable`.
        """
        view = await self._ask("POST", REVIEWS, ReviewView, asked)
        if view.workspace_id != asked.workspace_id or view.request_digest != request_digest(
            asked.workspace_id, asked.call
        ):
            raise ReviewUnavailable(f"the broker answered with review {view.id} of another call")
        return view

    async def view(self, review: str, workspace_id: str, wait: int) -> ReviewView:
        """Return a review of that workspace; raise :class:`UnknownReview` or :class:`ReviewUnavailable`."""
        query = {"workspace_id": workspace_id, "wait": str(wait)}
        view = await self._ask("GET", f"{REVIEWS}/{review}", ReviewView, query=query, wait=wait)
        if view.id != review or view.workspace_id != workspace_id:
            raise ReviewUnavailable(f"the broker answered with another review than {review}")
        return view

    async def claim(self, wait: int, secret: str) -> Claimed | ReadBack | ReadContext | ReadState | None:
        """Return an approved call with the right to send it once, or one to be read back, or a state to be read, or None.

        Raises :class:`ReviewUnavailable`; ask again with the same ``secret`` then, so that a call that was claimed meanwhile
        comes all the same. Once there was a call, another secret is due.
        """
        asked = ClaimReview(wait=wait, claim=secret)
        answer = await self._ask("POST", f"{REVIEWS}/claim", ClaimAnswer, asked, wait=wait)
        return answer.claimed or answer.read_back or answer.read_context or answer.read_state

    async def tell_read_back(self, review: str, result: ReadBackResult) -> None:
        """Say what was read back; raises as :meth:`tell`."""
        await self._ask("POST", f"{REVIEWS}/{review}/read-back", None, result)

    async def tell_context(self, review: str, result: ContextResult) -> None:
        """Say what was read of the state before a push or a write; raises as :meth:`tell`."""
        await self._ask("POST", f"{REVIEWS}/{review}/context", None, result)

    async def tell(self, review: str, result: ReviewResult) -> None:
        """Say how the one attempt ended; raise :class:`ReviewRefused`, :class:`UnknownReview` or :class:`ReviewUnavailable`."""
        await self._ask("POST", f"{REVIEWS}/{review}/result", None, result)

    async def _ask(
        self,
        method: str,
        path: str,
        kind: type[Answer] | None,
        body: msgspec.Struct | None = None,
        *,
        query: dict[str, str] | None = None,
        wait: int = 0,
    ) -> Answer:
        try:
            response = await self._client().request(
                method,
                path,
                params=query,
                content=None if body is None else msgspec.json.encode(body),
                headers={"host": self._config.broker_name, "content-type": "application/json"},
                extensions={"sni_hostname": self._config.broker_name},
                timeout=httpx.Timeout(5.0, read=_PATIENCE_S + wait),
            )
        except (httpx.HTTPError, OSError) as error:
            raise ReviewUnavailable(f"the broker does not answer: {type(error).__name__}") from error
        code = _code(response)
        if response.status_code == httpx.codes.NOT_FOUND and code == "unknown_review":
            raise UnknownReview("the broker knows no such review of this workspace")
        if 400 <= response.status_code < 500 and code:
            raise ReviewRefused(f"the broker refuses this: {code}", details={"reason": code})
        if response.status_code != httpx.codes.OK or len(response.content) > MOST_OF_AN_ANSWER:
            raise ReviewUnavailable(f"the broker answered {response.status_code} {code}".rstrip())
        if kind is None:
            return None  # type: ignore[return-value]
        try:
            return jsontext.decode(response.content, kind=kind)
        except msgspec.DecodeError as error:
            raise ReviewUnavailable(f"the broker's answer is not valid: {error}") from error


class _Refusal(msgspec.Struct, frozen=True):
    code: str = ""


def _code(response: httpx.Response) -> str:
    if response.status_code == httpx.codes.OK:
        return ""
    try:
        return jsontext.decode(response.content, kind=_Refusal).code[:64]
    except msgspec.DecodeError:
        return ""
