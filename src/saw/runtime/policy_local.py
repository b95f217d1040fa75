"""``http://policy.local`` for the sandbox: the policy in force, and a way to ask people for more. Nothing here allows anything.

Ring 1's Envoy answers the name itself and hands these few calls to the decision service, under ``/policy.local``. Reading
needs no lease; asking goes over the policy agent to the broker under the workspace's identity.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from saw import jsontext
from saw.policy.policy_request import MAX_BODY, Wish, canonical
from saw.policy.policy_view import as_text, view_policy
from saw.runtime.attribution import Caller
from saw.runtime.generation import Loaded
from saw.runtime.request_desk import MAX_ANSWER, MAX_ASKING, AskRefused, Mine, More, Question, Reply, unavailable
from saw.runtime.ring1_settings import FACT_SOURCE, POLICY_PREFIX

ANSWER_S = 20.0
"""How long the policy agent may take (seconds)."""
NOTE = "a request, never a grant: what is allowed changes only when people sign and release another policy"
_JSON = (("content-type", "application/json"),)
_TEXT = (("content-type", "text/plain; charset=utf-8"),)
_STATUS = {
    "malformed": 400,
    "never_allowed": 403,
    "not_found": 404,
    "already_allowed": 409,
    "policy_changed": 409,
    "too_large": 413,
    "rate_limited": 429,
    "too_many_requests": 429,
    "all_requests_held": 429,
}
_BURST, _EACH_S = 20, 2.0
"""So many calls about requests at once, and one more every so many seconds."""
_PROGRAM = 256
_SOURCE = FACT_SOURCE.encode()
Headers = tuple[tuple[str, str], ...]
Local = tuple[int, Headers, bytes]
"""Status, headers and body of an answer."""


class Decides(Protocol):
    """What is read of the decider."""

    def current(self) -> Loaded | None:
        """Return the generation in force."""
        ...

    def caller(self, source: str) -> Caller | None:
        """Return which program opened the connection from ``source``."""
        ...


class PolicyLocal:
    """Answers the calls; ``monotonic`` gives seconds."""

    def __init__(self, decider: Decides, socket: Path, monotonic: Callable[[], float]) -> None:
        self._decider = decider
        self._socket = socket
        self._now = monotonic
        self._tokens, self._since = float(_BURST), monotonic()
        self._asking = 0
        self._shown: tuple[str, bytes, bytes] = ("", b"", b"")

    async def told(
        self, scope: MutableMapping[str, Any], receive: Callable[[], Awaitable[MutableMapping[str, Any]]]
    ) -> Local | None:
        """Answer one HTTP request (ASGI), None when its client went away; of a body that is too long nothing is kept."""
        body: bytes | None = b""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            body = None if body is None or len(body) + len(part) > MAX_BODY else body + part
            more = message.get("more_body", False)
        source = next((value.decode("latin-1") for name, value in scope["headers"] if name == _SOURCE), "")
        path = scope["path"].removeprefix(POLICY_PREFIX)
        if scope.get("query_string"):
            path = ""
        return await self.answer(scope["method"], path, source, body)

    async def answer(self, method: str, path: str, source: str, body: bytes | None) -> Local:
        """Answer one call of the host; ``body`` is None when it is longer than :data:`MAX_BODY` bytes."""
        try:
            if (method, path) == ("GET", "/") or (method, path) == ("GET", "/v1/policy"):
                return 200, _JSON, self._view()[1]
            if (method, path) == ("GET", "/text"):
                return 200, _TEXT, self._view()[2]
            if path == "/v1/requests" and method in {"GET", "POST"}:
                self._take()
                question: Question = Mine() if method == "GET" else self._more(source, body)
                return 200, _JSON, await self._ask(question)
            raise AskRefused("not_found", "there is no such call", "GET / or /text, GET or POST /v1/requests")
        except AskRefused as error:
            said = {"error": error.code, "message": error.message, "cure": error.cure, "note": NOTE}
            return _STATUS.get(error.code, 503), _JSON, msgspec.json.encode(said) + b"\n"

    def _view(self) -> tuple[str, bytes, bytes]:
        loaded = self._loaded()
        if self._shown[0] != loaded.digest:
            view = view_policy(loaded.digest, loaded.revision, loaded.policy, loaded.governance)
            shown = msgspec.json.format(msgspec.json.encode(view), indent=1) + b"\n"
            self._shown = (loaded.digest, shown, as_text(view).encode())
        return self._shown

    def _loaded(self) -> Loaded:
        loaded = self._decider.current()
        if loaded is None:
            raise AskRefused("not_released", "no verified policy is loaded in this workspace yet", "wait for it")
        return loaded

    def _take(self) -> None:
        now = self._now()
        self._tokens = min(float(_BURST), self._tokens + (now - self._since) / _EACH_S)
        self._since = now
        if self._tokens < 1:
            raise AskRefused("rate_limited", "too many calls", f"wait {_EACH_S:.0f} seconds")
        self._tokens -= 1

    def _more(self, source: str, body: bytes | None) -> More:
        if body is None:
            raise AskRefused("too_large", f"the body exceeds {MAX_BODY} bytes", "send less")
        try:
            wish = jsontext.decode(body, kind=Wish)
            path = canonical(wish.path)
        except ValueError as error:
            raise AskRefused(
                "malformed",
                f"the body is not valid: {error}"[:300],
                'send for example {"host": "api.example.com", "method": "GET", "path": "/v1/x", "reason": "why"}',
            ) from error
        if not wish.reason.strip():
            raise AskRefused("malformed", "the reason is empty", "say why it is needed")
        caller = self._decider.caller(source) if source else None
        program = wish.program or (caller.binary if caller else "") or ""
        if not program.startswith("/") or len(program) > _PROGRAM or not (program.isascii() and program.isprintable()):
            program = ""
        return More(
            policy_digest=self._loaded().digest,
            host=wish.host,
            port=wish.port or (443 if wish.scheme == "https" else 80),
            scheme=wish.scheme,
            method=wish.method,
            path=path,
            program=program,
            reason=wish.reason,
        )

    async def _ask(self, question: Question) -> bytes:
        if self._asking >= MAX_ASKING:
            raise AskRefused("rate_limited", f"{MAX_ASKING} calls wait for an answer", "ask again in a moment")
        self._asking += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                reply = await self._exchange(msgspec.json.encode(question) + b"\n")
        except (OSError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
            raise unavailable("the policy agent of this workspace cannot be asked") from error
        finally:
            self._asking -= 1
        if reply.refused is not None:
            raise AskRefused(reply.refused.code, reply.refused.message, reply.refused.cure)
        if reply.asked is not None:
            return msgspec.json.encode({"request": reply.asked, "note": NOTE}) + b"\n"
        if reply.mine is not None:
            return msgspec.json.encode({"requests": reply.mine.requests, "note": NOTE}) + b"\n"
        raise unavailable("the policy agent of this workspace answered nothing")

    async def _exchange(self, line: bytes) -> Reply:
        reader, writer = await asyncio.open_unix_connection(str(self._socket), limit=MAX_ANSWER)
        try:
            writer.write(line)
            await writer.drain()
            return jsontext.decode(await reader.readline(), kind=Reply)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
