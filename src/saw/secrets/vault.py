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
from typing import TypeVar

import httpx
import msgspec

from saw.errors import UnavailableError
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
from saw.secrets.vault_calls import Held, Metadata, VaultCalls, errors_of
from saw.secrets.vault_settings import VaultSettings

T = TypeVar("T")
MAX_FOLDERS = 64
_FIELD = "value"


class _Written(msgspec.Struct, frozen=True):
    data: Metadata


class _Keys(msgspec.Struct, frozen=True):
    keys: tuple[str, ...]


class _Listed(msgspec.Struct, frozen=True):
    data: _Keys


class VaultStore:
    """Secrets below ``mount/prefix``. ``pause`` waits between two tries, seconds."""

    kind = "vault"

    def __init__(self, settings: VaultSettings, pause: Callable[[float], None] = time.sleep) -> None:
        self._settings = settings
        self.place = f"{settings.mount}/{settings.prefix} of {settings.url}"
        self._calls = VaultCalls(settings, "secrets.vault", self.place, pause=pause)

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
            answer = self._calls.send("POST", self._path("data", name), json=body)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the answer to writing {name} was lost: {type(error).__name__}",
                cure="do it again; it replaces what it finds",
            ) from error
        if answer.status_code == 400 and "check-and-set" in errors_of(answer):
            kind = SecretExists if new else SecretConflict
            raise kind(f"somebody else wrote {name} in {self.place} meanwhile", cure="nothing was written; do it again")
        if not answer.is_success:
            raise self._calls.refusal(answer)
        self._calls.decoded(answer, _Written)

    def remove(self, name: str) -> None:
        """Remove a secret with all its versions."""
        try:
            answer = self._calls.send("DELETE", self._path("metadata", check_name(name)))
        except httpx.HTTPError as error:
            raise self._calls.away(str(error) or type(error).__name__) from error
        if not answer.is_success and answer.status_code != 404:
            raise self._calls.refusal(answer)

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
        self._calls.close()

    def _path(self, kind: str, name: str) -> str:
        tail = f"/{name}" if name else ""
        return f"/v1/{self._settings.mount}/{kind}/{self._settings.prefix}{tail}"

    def _held(self, name: str) -> Held | None:
        """Return what the server has of a secret: no data when its newest version was deleted, None when it never was."""
        return self._calls.held(self._path("data", name))

    def _get(self, path: str, kind: type[T], *, query: Mapping[str, str]) -> T | None:
        answer = self._calls.read(path, query)
        return None if answer.status_code == 404 else self._calls.decoded(answer, kind)


def _value(name: str, held: Held) -> bytes:
    data = held.data or {}
    try:
        if set(data) != {_FIELD} or not isinstance(data[_FIELD], str):
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
