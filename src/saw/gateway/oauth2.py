"""Access tokens (RFC 6749): fetched with a secret of the perimeter, kept in memory, renewed before they end.

One request is on its way for a token however many calls wait for it. A token belongs to the very secret that it was fetched
with: once that is exchanged or removed where it lies, the next call no longer uses what came of it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import re
import ssl
from collections.abc import Awaitable, Callable
from typing import Annotated, Protocol
from urllib.parse import quote_plus, urlsplit
from weakref import WeakValueDictionary

import httpx
import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.gateway.credential_sources import MAX_SECRET
from saw.gateway.errors import CredentialUnavailable
from saw.https import https_async_client, https_context
from saw.policy.providers import OAuth2
from saw.policy.references import Place

LOG = logging.getLogger("saw.gateway")

DEADLINE_S = 5.0
"""Longest time for a token (seconds); with the secrets that it is fetched with, a call has ``judge.DIAL_DEADLINE_S``."""
LONGEST_S = 3600.0
"""How long a token is used at most, whatever the server says (seconds)."""
WITHOUT_END_S = 60.0
"""How long a token is used whose end the server does not say (seconds)."""
EARLY_SHARE, EARLY_MOST_S = 0.1, 30.0
"""How long before its end a token is replaced: a share of its life, and seconds at most."""
REFUSED_S = 3.0
"""How long a token endpoint that refused is not asked for the same again (seconds)."""
MAX_ANSWER = 64 * 1024
_REMEMBERED = 1024
_CODE = re.compile(r"[a-z_]{1,64}\Z")


class Answer(msgspec.Struct, frozen=True):
    """An answer of a token endpoint."""

    status: int
    body: bytes


class Handed(msgspec.Struct, frozen=True):
    """The secret that a credential names: where it lies, and what it is now. Never logged."""

    place: Place
    secret: str


class TokenEndpoint(Protocol):
    """Sends one request to a token endpoint."""

    def __call__(self, url: str, form: dict[str, str], headers: dict[str, str]) -> Awaitable[Answer]:
        """Return the answer to ``form``; raise ``httpx.HTTPError`` or :class:`saw.errors.SawError` when there is none."""


_Digits = Annotated[str, msgspec.Meta(pattern=r"\A[0-9]{1,10}\Z")]
"""A number as text, which some servers write."""


class _Granted(msgspec.Struct, frozen=True):
    access_token: str
    token_type: str
    expires_in: float | _Digits | None = None
    refresh_token: str | None = None


class _Denied(msgspec.Struct, frozen=True):
    error: str = ""


class _Token(msgspec.Struct, frozen=True):
    value: str
    until: float


class _NotGranted(Exception):
    """A token endpoint answered, and gave no token that can be used."""


Key = tuple[OAuth2, Place, str]
"""What a token belongs to: all that is asked for, and a digest of the secrets that lie there now."""
Line = tuple[str, str, Place]
"""What a refresh token belongs to: its token endpoint, its client, and where the first one lies. Scopes have no part in it."""


class TokenKeeper:
    """The tokens of one gatekeeper, which is one of ``several`` or alone. ``monotonic`` returns seconds."""

    def __init__(self, ask: TokenEndpoint, monotonic: Callable[[], float], *, several: bool = False) -> None:
        self._ask = ask
        self._several = several
        self._monotonic = monotonic
        self._tokens: dict[Key, _Token] = {}
        self._asking: dict[Key, asyncio.Task[_Token]] = {}
        self._newer: dict[Line, tuple[str, str]] = {}
        self._turns: WeakValueDictionary[Line, asyncio.Lock] = WeakValueDictionary()
        self._refused: dict[Key, tuple[float, str]] = {}

    async def token(self, identifier: str, wanted: OAuth2, handed: Handed, client_secret: str) -> str:
        """Return an access token for the credential ``identifier``, one that still counts.

        Raises :class:`CredentialUnavailable` when none is to be had; an older token is never used beyond its time.
        """
        key = (wanted, handed.place, hashlib.sha256(f"{handed.secret}\n{client_secret}".encode()).hexdigest())
        known = self._tokens.get(key)
        if known is not None and self._monotonic() < known.until:
            return known.value
        until, why = self._refused.get(key, (0.0, ""))
        if why and self._monotonic() < until:
            raise _refusal(identifier, why)
        task = self._asking.get(key)
        if task is None:
            task = asyncio.create_task(self._fetch(identifier, key, handed.secret, client_secret), name="token")
            self._asking[key] = task
            task.add_done_callback(lambda done: self._ended(key, done))
        # One caller that gives up must not take the request away from those that wait with it.
        return (await asyncio.shield(task)).value

    def _ended(self, key: Key, task: asyncio.Task[_Token]) -> None:
        self._asking.pop(key, None)
        if task.cancelled() or task.exception() is not None:
            return
        if len(self._tokens) >= _REMEMBERED:
            self._tokens = {known: token for known, token in self._tokens.items() if token.until > self._monotonic()}
        if len(self._tokens) < _REMEMBERED:
            self._tokens[key] = task.result()

    async def _fetch(self, identifier: str, key: Key, secret: str, client_secret: str) -> _Token:
        wanted, place, digest = key
        if wanted.grant != "refresh_token":
            return self._token(await self._request(identifier, key, {}, client_secret))
        line = (wanted.token_url, wanted.client_id, place)
        # One after the other: of two requests with one refresh token a server takes the second for a theft.
        turn = self._turns.setdefault(line, asyncio.Lock())
        async with turn:
            known = self._newer.get(line)
            if known is None and len(self._newer) >= _REMEMBERED:
                # Handed in, it could be spent, and there is no room for the one that comes back.
                LOG.warning("credential %s: %d exchanged refresh tokens are held, and no more", identifier, _REMEMBERED)
                raise _refusal(identifier, "this perimeter host holds as many refresh tokens as it can")
            current = known[1] if known is not None and known[0] == digest else secret
            found = await self._request(identifier, key, {"refresh_token": current}, client_secret)
            newer = found[0].refresh_token
            if newer and newer != current:
                if self._several and known is None:
                    LOG.critical(
                        "credential %s: %s exchanges refresh tokens at each use, and refuses those of other gatekeepers here; "
                        "run one (perimeter_replicas: 1)",
                        identifier,
                        wanted.token_url,
                    )
                self._newer[line] = (digest, newer)
        return self._token(found)

    @staticmethod
    def _token(found: tuple[_Granted, float]) -> _Token:
        granted, asked_at = found
        life = WITHOUT_END_S if granted.expires_in is None else min(float(granted.expires_in), LONGEST_S)
        return _Token(granted.access_token, asked_at + life - min(EARLY_MOST_S, life * EARLY_SHARE))

    async def _request(
        self, identifier: str, key: Key, more: dict[str, str], client_secret: str
    ) -> tuple[_Granted, float]:
        """Return what was granted, and when it was asked for."""
        wanted = key[0]
        form: dict[str, str] = {"grant_type": wanted.grant, **more}
        if wanted.scopes:
            form["scope"] = " ".join(wanted.scopes)
        if wanted.resource is not None:
            form["resource"] = wanted.resource
        headers = {"accept": "application/json"}
        if client_secret:
            # RFC 6749, section 2.3.1: both are form-encoded before they become the user and password of Basic.
            pair = f"{quote_plus(wanted.client_id)}:{quote_plus(client_secret)}"
            headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        else:
            form["client_id"] = wanted.client_id
        asked_at = self._monotonic()
        try:
            async with asyncio.timeout(DEADLINE_S):
                answer = await self._ask(wanted.token_url, form, headers)
        except (TimeoutError, httpx.HTTPError, OSError, SawError) as error:
            said = error.message if isinstance(error, SawError) else type(error).__name__
            LOG.warning("credential %s: %s does not answer: %s", identifier, wanted.token_url, said)
            raise _refusal(identifier, "the token endpoint does not answer") from None
        try:
            granted = _granted(identifier, answer)
        except _NotGranted as error:
            if len(self._refused) >= _REMEMBERED:
                self._refused.clear()
            self._refused[key] = (self._monotonic() + REFUSED_S, str(error))
            raise _refusal(identifier, str(error)) from None
        return granted, asked_at


def _granted(identifier: str, answer: Answer) -> _Granted:
    """Return what was granted (RFC 6749, section 5.1); raise :class:`_NotGranted`, which says why, for everything else."""
    if answer.status != 200:
        try:
            code = jsontext.decode(answer.body, kind=_Denied).error
        except msgspec.DecodeError:
            code = ""
        # Only the code: a description is free text, in which what was handed in could stand.
        said = f" {code}" if _CODE.match(code) else ""
        LOG.warning("credential %s: the token endpoint answered %d%s", identifier, answer.status, said)
        raise _NotGranted(f"the token endpoint answered {answer.status}{said}")
    try:
        granted = jsontext.decode(answer.body, kind=_Granted)
    except msgspec.DecodeError:
        raise _NotGranted("the token endpoint answered something else") from None
    token = granted.access_token
    if granted.token_type.lower() != "bearer":
        raise _NotGranted("the token endpoint gave a token of another type than Bearer")
    if not token or len(token) > MAX_SECRET or any(not "!" <= sign <= "~" for sign in token):
        raise _NotGranted("the token endpoint gave a token that cannot be sent")
    return granted


def _refusal(identifier: str, why: str) -> CredentialUnavailable:
    return CredentialUnavailable(
        f"credential {identifier} is not at hand: {why}",
        cure="see the journal of saw-gatekeeper@*, and the client's secret",
    )


class HttpsTokenEndpoint:
    """Token endpoints over TLS. Each is dialled at an address that was checked as destinations of calls are.

    ``ca_file``: authorities (PEM) that vouch for them; ``address_of`` returns the address to dial for a host name.
    """

    def __init__(self, ca_file: str, timeout_s: float, address_of: Callable[[str], Awaitable[str]]) -> None:
        self._ca_file = ca_file
        self._timeout_s = timeout_s
        self._address_of = address_of
        self._context: ssl.SSLContext | None = None

    async def __call__(self, url: str, form: dict[str, str], headers: dict[str, str]) -> Answer:
        """Return the answer; see :class:`TokenEndpoint`. A redirect is an answer, and is not followed."""
        parts = urlsplit(url)
        host = parts.hostname or ""
        dialled = httpx.URL(url).copy_with(host=await self._address_of(host))
        sent = {**headers, "host": parts.netloc}
        raw = b""
        if self._context is None:
            self._context = await asyncio.to_thread(https_context, self._ca_file, "ring2.upstream_ca_file")
        # A client of its own: a connection that was made under another name at this address is never used, nor is a cookie.
        async with (
            https_async_client(self._context, self._timeout_s) as client,
            client.stream("POST", dialled, data=form, headers=sent, extensions={"sni_hostname": host}) as answer,
        ):
            async for part in answer.aiter_bytes():
                raw += part
                if len(raw) > MAX_ANSWER:
                    raise httpx.DecodingError("the answer is too long")
        return Answer(answer.status_code, raw)
