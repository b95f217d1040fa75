"""The provider ``vault``: secrets in a KV engine, version 2, of HashiCorp Vault or OpenBao, over its HTTP API.

Calls: https://openbao.org/api-docs/secret/kv/kv-v2/ and https://openbao.org/api-docs/auth/approle/ (Vault has the same). Each
write says which version it replaces (check-and-set), so that of two writers one is refused and nothing is lost. Reading is tried
again while the server is away; a write is sent once, because a lost answer does not say that nothing was written.
"""

from __future__ import annotations

import base64
import binascii
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from saw.errors import ConfigError, UnavailableError
from saw.https import https_client
from saw.secrets.store import (
    MAX_VALUE,
    SecretBroken,
    SecretConflict,
    SecretError,
    SecretExists,
    check_name,
    check_value,
    is_name,
    missing,
)
from saw.secrets.vault_settings import VaultSettings

T = TypeVar("T")
TRIES = 3
MAX_ANSWER = 4 * 1024 * 1024
MAX_FOLDERS = 64
_PASSING = frozenset({412, 429, 500, 502, 503, 504})
_FIELD = "value"


class _Metadata(msgspec.Struct, frozen=True):
    version: int


class _Held(msgspec.Struct, frozen=True):
    metadata: _Metadata
    data: dict[str, str] | None = None


class _Read(msgspec.Struct, frozen=True):
    data: _Held


class _Written(msgspec.Struct, frozen=True):
    data: _Metadata


class _Keys(msgspec.Struct, frozen=True):
    keys: tuple[str, ...]


class _Listed(msgspec.Struct, frozen=True):
    data: _Keys


class _Token(msgspec.Struct, frozen=True):
    client_token: str


class _LoggedIn(msgspec.Struct, frozen=True):
    auth: _Token


class _Said(msgspec.Struct, frozen=True):
    errors: tuple[str, ...] = ()


class VaultDenied(SecretError):
    """The server refuses who we are, or what we ask."""

    code = "secret_denied"


class VaultStore:
    """Secrets below ``mount/prefix``. ``pause`` waits between two tries, seconds."""

    kind = "vault"

    def __init__(self, settings: VaultSettings, pause: Callable[[float], None] = time.sleep) -> None:
        self._settings = settings
        self._pause = pause
        self._token: str | None = None
        self.place = f"{settings.mount}/{settings.prefix} of {settings.url}"
        self._http = https_client(settings.url, settings.ca_file, settings.timeout_s, "secrets.vault.ca_file")

    def read(self, name: str) -> bytes:
        """Return a secret."""
        found = self._held(check_name(name))
        if found is None or found.data is None:
            raise missing(name, self.place)
        return _value(name, found)

    def write(self, name: str, value: bytes, *, new: bool = False) -> None:
        """Store a secret as the next version; raise :class:`SecretConflict` when somebody else was first."""
        check_value(name, value)
        held = self._held(check_name(name))
        if new and held is not None:
            raise SecretExists(
                f"there is {name} in {self.place} already", cure="nothing was written", details={"secret": name}
            )
        body = {
            "options": {"cas": 0 if held is None else held.metadata.version},
            "data": {_FIELD: base64.b64encode(value).decode()},
        }
        try:
            answer = self._send("POST", self._path("data", name), json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the answer to writing {name} was lost: {type(error).__name__}",
                cure="do it again; it replaces what it finds",
            ) from error
        if answer.status_code == 400 and "check-and-set" in _errors(answer):
            kind = SecretExists if new else SecretConflict
            raise kind(f"somebody else wrote {name} in {self.place} meanwhile", cure="nothing was written; do it again")
        if not answer.is_success:
            raise self._refusal(answer)
        self._decoded(answer, _Written)

    def remove(self, name: str) -> None:
        """Remove a secret with all its versions."""
        try:
            answer = self._send("DELETE", self._path("metadata", check_name(name)))
        except httpx.HTTPError as error:
            raise self._away(str(error) or type(error).__name__) from error
        if not answer.is_success and answer.status_code != 404:
            raise self._refusal(answer)

    def names(self) -> list[str]:
        """Return the names of all secrets below the prefix; the token has to be allowed to list."""
        found: list[str] = []
        folders = [""]
        for number, folder in enumerate(folders):
            if number >= MAX_FOLDERS:
                raise SecretError(
                    f"there are too many folders in {self.place}", cure="give each installation a prefix of its own"
                )
            listed = self._get(self._path("metadata", folder.rstrip("/")), _Listed, query={"list": "true"})
            for key in () if listed is None else listed.data.keys:
                if key.endswith("/") and is_name(folder + key[:-1]):
                    folders.append(folder + key)
                elif is_name(folder + key):
                    found.append(folder + key)
        return sorted(found)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _path(self, kind: str, name: str) -> str:
        tail = f"/{name}" if name else ""
        return f"/v1/{self._settings.mount}/{kind}/{self._settings.prefix}{tail}"

    def _held(self, name: str) -> _Held | None:
        """Return what the server has of a secret: no data when its newest version was deleted, None when it never was."""
        answer = self._read(self._path("data", name), {})
        if answer.status_code == 404:
            try:
                return msgspec.json.decode(answer.content, type=_Read).data
            except msgspec.DecodeError:
                return None
        return self._decoded(answer, _Read).data

    def _get(self, path: str, kind: type[T], *, query: Mapping[str, str]) -> T | None:
        answer = self._read(path, query)
        return None if answer.status_code == 404 else self._decoded(answer, kind)

    def _read(self, path: str, query: Mapping[str, str]) -> httpx.Response:
        """Read something, trying again while the server is away; raise for every answer but success and 404."""
        said = ""
        for number in range(TRIES):
            if number:
                self._pause(float(number))
            try:
                answer = self._send("GET", path, params=query)
            except httpx.HTTPError as error:
                said = str(error) or type(error).__name__
                continue
            # A path that no engine serves is answered with 404 too, but with a reason.
            if answer.is_success or (answer.status_code == 404 and not _errors(answer)):
                return answer
            if answer.status_code not in _PASSING:
                raise self._refusal(answer)
            said = f"it answered {answer.status_code}"
        raise self._away(said)

    def _send(self, method: str, path: str, **how: Any) -> httpx.Response:
        """Send a call; a token of a role that has ended is renewed once."""
        answer = self._call(method, path, self._authorisation(), **how)
        if answer.status_code == 403 and self._settings.approle is not None:
            self._token = None
            answer = self._call(method, path, self._authorisation(), **how)
        return answer

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
                    raise SecretError("the answer of the vault is too long", cure="check secrets.vault.url")
        return httpx.Response(answer.status_code, content=raw)

    def _authorisation(self) -> str:
        role = self._settings.approle
        if role is None:
            return _one_line(self._settings.token_file or "", "secrets.vault.token_file")
        if self._token is None:
            body = {
                "role_id": role.role_id,
                "secret_id": _one_line(role.secret_id_file, "secrets.vault.approle.secret_id_file"),
            }
            answer = self._call("POST", f"/v1/auth/{role.mount}/login", None, json=body)
            if answer.status_code in _PASSING:
                raise self._away(f"it answered {answer.status_code} to the login")
            if not answer.is_success:
                raise VaultDenied(
                    f"the vault refused to log us in ({answer.status_code})",
                    cure="check role_id; write a fresh secret id to its file",
                )
            self._token = self._decoded(answer, _LoggedIn).auth.client_token
        return self._token

    def _decoded(self, answer: httpx.Response, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.DecodeError:
            # Without the cause: its words could repeat a part of the answer, which may be a secret.
            raise SecretError(
                "the vault answered something else", cure="check secrets.vault.url and mount (KV version 2)"
            ) from None

    def _away(self, said: str) -> UnavailableError:
        return UnavailableError(
            f"the vault at {self._settings.url} does not answer: {said}",
            cure="check secrets.vault.url and ca_file, and whether it is unsealed",
        )

    def _refusal(self, answer: httpx.Response) -> SecretError:
        if answer.status_code in {401, 403}:
            return VaultDenied(
                f"the vault refused a call below {self.place} ({answer.status_code})",
                cure="renew the token; let its policy read, create, update, list and delete there (docs/broker.md)",
            )
        return SecretError(f"the vault answered {answer.status_code}: {_errors(answer)}", cure="see its log")


def _value(name: str, held: _Held) -> bytes:
    data = held.data or {}
    try:
        if set(data) != {_FIELD}:
            raise ValueError
        value = base64.b64decode(data[_FIELD], validate=True)
        if not 0 < len(value) <= MAX_VALUE:
            raise ValueError
    except (ValueError, binascii.Error):
        raise SecretBroken(
            f"{name} in the vault is not as we write it",
            cure="restore an older version there",
            details={"secret": name},
        ) from None
    return value


def _errors(answer: httpx.Response) -> str:
    """Return what an answer says is wrong; never its data."""
    try:
        return "; ".join(msgspec.json.decode(answer.content, type=_Said).errors)[:300]
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
