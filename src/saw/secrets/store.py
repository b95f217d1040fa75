"""What every place for secrets offers, and how each says no.

A name is a relative path such as ``x509/ca-key.pem``; a value is up to :data:`MAX_VALUE` bytes. No error and no message ever
holds a value.
"""

from __future__ import annotations

import re
from typing import Protocol

from saw.errors import SawError

MAX_VALUE = 64 * 1024
"""Longest secret, bytes."""
_SEGMENT = r"[a-z0-9][a-z0-9._-]{0,62}"
_NAME = re.compile(rf"{_SEGMENT}(?:/{_SEGMENT}){{0,3}}")


class SecretError(SawError):
    """A secret cannot be read, written or removed as asked."""

    code = "secret_refused"


class SecretMissing(SecretError):
    """There is no secret of that name."""

    code = "secret_missing"


class SecretExists(SecretError):
    """A secret that was to be new is there already."""

    code = "secret_exists"


class SecretBroken(SecretError):
    """What is stored is not what was stored, belongs to another name, or another key sealed it."""

    code = "secret_broken"


class SecretConflict(SecretError):
    """Somebody else wrote the secret meanwhile; nothing was written."""

    code = "secret_conflict"


class SecretStore(Protocol):
    """A place for secrets. Each write is whole or not there, and lasts over a crash once it has returned."""

    @property
    def kind(self) -> str:
        """The provider: ``files``, ``sealed``, ``vault`` or ``environment``."""

    @property
    def place(self) -> str:
        """Where that is, in words for people."""

    def read(self, name: str) -> bytes:
        """Return a secret; raise :class:`SecretMissing`, :class:`SecretBroken` or another :class:`SecretError`."""

    def write(self, name: str, value: bytes, *, new: bool = False) -> None:
        """Store a secret in place of the old one; with ``new`` raise :class:`SecretExists` when there is one."""

    def remove(self, name: str) -> None:
        """Remove a secret for good, with all that is kept of older ones; one that is not there is no error."""

    def names(self) -> list[str]:
        """Return the names of all secrets, sorted, without reading one."""

    def close(self) -> None:
        """Let go of connections."""


def check_name(name: str) -> str:
    """Return ``name`` when it is one; raise :class:`SecretError`."""
    if not _NAME.fullmatch(name):
        raise SecretError(
            f"{name[:64]!r} is not the name of a secret",
            cure="use a-z, 0-9, '.', '_', '-', at most four parts behind '/'",
        )
    return name


def is_name(name: str) -> bool:
    """Tell whether ``name`` is one."""
    return _NAME.fullmatch(name) is not None


def check_value(name: str, value: bytes) -> bytes:
    """Return ``value`` when it is 1 to :data:`MAX_VALUE` bytes; raise :class:`SecretError`."""
    if not 0 < len(value) <= MAX_VALUE:
        raise SecretError(f"a value of {len(value)} bytes for {name}", cure=f"give 1 to {MAX_VALUE} bytes")
    return value


def read_or_none(store: SecretStore, name: str) -> bytes | None:
    """Return a secret, None when there is none; any other refusal is raised."""
    try:
        return store.read(name)
    except SecretMissing:
        return None


def missing(name: str, place: str) -> SecretMissing:
    """Return the error that says that there is no secret ``name``."""
    return SecretMissing(f"there is no {name} in {place}", cure="put it back from the backup", details={"secret": name})
