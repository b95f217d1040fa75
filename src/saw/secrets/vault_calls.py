"""Calls of the HTTP API of a HashiCorp Vault or OpenBao: who we are there, what may be tried again, what an answer means."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from saw import jsontext
from saw.errors import ConfigError, UnavailableError
from saw.https import https_client
from saw.secrets.store import SecretError
from saw.secrets.vault_settings import VaultSettings

T = TypeVar("T")
TRIES = 3
MAX_ANSWER = 4 * 1024 * 1024
LOGIN_AGAIN_S = 30.0
"""How often a refused call makes a role log in anew, at most (seconds): its token may have ended, or the path is not its own."""
_PASSING = frozenset({412, 429, 500, 502, 503, 504})


class _Token(msgspec.Struct, frozen=True):
    client_token: str


class _LoggedIn(msgspec.Struct, frozen=True):
    auth: _Token


class _Said(msgspec.Struct, frozen=True):
    errors: tuple[str, ...] = ()


class Metadata(msgspec.Struct, frozen=True):
    """Which version of a secret it is."""

    version: int


class Held(msgspec.Struct, frozen=True):
    """A version of a secret; without ``data`` when it was deleted. Entries may be anything that JSON has."""

    metadata: Metadata
    data: dict[str, Any] | None = None


class _Read(msgspec.Struct, frozen=True):
    data: Held


class VaultDenied(SecretError):
    """The server refuses who we are, or what we ask."""

    code = "secret_denied"


class VaultCalls:
    """Calls of one server. ``setting`` is where ``settings`` stands in the configuration, ``place`` what is used there, both for
    messages. ``pause`` waits between two tries, seconds; ``tries`` is how often reading is tried; ``monotonic`` returns seconds.
    """

    def __init__(
        self,
        settings: VaultSettings,
        setting: str,
        place: str,
        *,
        pause: Callable[[float], None] = time.sleep,
        tries: int = TRIES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._setting = setting
        self._place = place
        self._pause = pause
        self._tries = tries
        self._monotonic = monotonic
        self._token: str | None = None
        self._lock = threading.Lock()
        self._login_again_at = float("-inf")
        self._http = https_client(settings.url, settings.ca_file, settings.timeout_s, f"{setting}.ca_file")

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def held(self, path: str) -> Held | None:
        """Return what the server has at ``path``: no data when its newest version was deleted, None when it never was."""
        answer = self.read(path, {})
        if answer.status_code == 404:
            try:
                return jsontext.decode(answer.content, kind=_Read).data
            except msgspec.DecodeError:
                return None
        return self.decoded(answer, _Read).data

    def read(self, path: str, query: Mapping[str, str]) -> httpx.Response:
        """Read something, trying again while the server is away; raise for every answer but success and 404."""
        said = ""
        for number in range(self._tries):
            if number:
                self._pause(float(number))
            try:
                answer = self.send("GET", path, params=query)
            except httpx.HTTPError as error:
                said = str(error) or type(error).__name__
                continue
            # A path that no engine serves is answered with 404 too, but with a reason.
            if answer.is_success or (answer.status_code == 404 and not errors_of(answer)):
                return answer
            if answer.status_code not in _PASSING:
                raise self.refusal(answer)
            said = f"it answered {answer.status_code}"
        raise self.away(said)

    def send(self, method: str, path: str, **how: Any) -> httpx.Response:
        """Send a call; a token of a role that has ended is renewed once, at most every ``LOGIN_AGAIN_S``."""
        token = self._authorisation()
        answer = self._call(method, path, token, **how)
        if answer.status_code == 403 and self._settings.approle is not None and self._give_up(token):
            answer = self._call(method, path, self._authorisation(), **how)
        return answer

    def _give_up(self, token: str) -> bool:
        """Return whether another token than ``token`` is worth a try: one that is there since, or a new one."""
        with self._lock:
            if self._token != token:
                return True
            if self._monotonic() < self._login_again_at:
                return False
            self._login_again_at = self._monotonic() + LOGIN_AGAIN_S
            self._token = None
            return True

    def _call(self, method: str, path: str, token: str | None, **how: Any) -> httpx.Response:
        headers = {"x-vault-request": "true"}
        if token is not None:
            headers["x-vault-token"] = token
        if self._settings.namespace is not None:
            headers["x-vault-namespace"] = self._settings.namespace
        with self._http.stream(method, path, headers=headers, **how) as answer:
            raw = b""
            for part in answer.iter_bytes():
                raw += part
                if len(raw) > MAX_ANSWER:
                    raise SecretError("the answer of the vault is too long", cure=f"check {self._setting}.url")
        return httpx.Response(answer.status_code, content=raw)

    def _authorisation(self) -> str:
        role = self._settings.approle
        if role is None:
            return _one_line(self._settings.token_file or "", f"{self._setting}.token_file")
        token = self._token
        if token is None:
            body = {
                "role_id": role.role_id,
                "secret_id": _one_line(role.secret_id_file, f"{self._setting}.approle.secret_id_file"),
            }
            answer = self._call("POST", f"/v1/auth/{role.mount}/login", None, json=body)
            if answer.status_code in _PASSING:
                raise self.away(f"it answered {answer.status_code} to the login")
            if not answer.is_success:
                raise VaultDenied(
                    f"the vault refused to log us in ({answer.status_code})",
                    cure="check role_id; write a fresh secret id to its file",
                )
            token = self._token = self.decoded(answer, _LoggedIn).auth.client_token
        return token

    def decoded(self, answer: httpx.Response, kind: type[T]) -> T:
        """Return what an answer says; raise :class:`SecretError` when it is something else."""
        try:
            return jsontext.decode(answer.content, kind=kind)
        except msgspec.DecodeError:
            # Without the cause: its words could repeat a part of the answer, which may be a secret.
            raise SecretError(
                "the vault answered something else", cure=f"check {self._setting}.url and that KV version 2 is there"
            ) from None

    def away(self, said: str) -> UnavailableError:
        """Return the error that says that the server is not there."""
        return UnavailableError(
            f"the vault at {self._settings.url} does not answer: {said}",
            cure=f"check {self._setting}.url and ca_file, and whether it is unsealed",
        )

    def refusal(self, answer: httpx.Response) -> SecretError:
        """Return the error for an answer that is none of success and 404."""
        if answer.status_code in {401, 403}:
            return VaultDenied(
                f"the vault refused a call below {self._place} ({answer.status_code})",
                cure="renew the token; let its policy read, create, update, list and delete there (docs/broker.md)",
            )
        return SecretError(f"the vault answered {answer.status_code}: {errors_of(answer)}", cure="see its log")


def errors_of(answer: httpx.Response) -> str:
    """Return what an answer says is wrong; never its data."""
    try:
        return "; ".join(jsontext.decode(answer.content, kind=_Said).errors)[:300]
    except msgspec.DecodeError:
        return "it gave no reason"


def _one_line(path: str, field: str) -> str:
    """Return the token in a file as it is now."""
    try:
        found = Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{field} cannot be read", cure="check the file and its owner") from None
    if not found or not found.isprintable() or " " in found:
        raise ConfigError(f"{field} holds no token", cure="write it alone into the file")
    return found
