"""Credentials: read at the moment of use, shaped as policy says, never kept, logged or shown to a workspace."""

from __future__ import annotations

import base64
import os
import re
import stat
from pathlib import Path

import msgspec

from saw.gateway.envoy_parts import HOP_HEADERS
from saw.gateway.errors import CredentialUnavailable
from saw.gateway.redaction import reflections
from saw.policy.governance import Credential

MAX_SECRET = 8192
"""Longest credential value (bytes)."""

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^`|~-]+")
_FIELD = re.compile(r"\{b64:([^{}]*)\{secret\}([^{}]*)\}|\{secret\}")
_FORBIDDEN = frozenset({*HOP_HEADERS, "host", "x-forwarded-client-cert", "x-request-id"})
PLACEHOLDER = "openshell:resolve:env:"
"""How a credential looks inside the sandbox; such a value never leaves the perimeter on a call that has a credential."""


def header_name(credential: Credential) -> str:
    """Return the lower-case header that ``credential`` sets; raise :class:`CredentialUnavailable` for one it must not."""
    name = credential.inject.header.lower()
    if not _HEADER.fullmatch(name) or name in _FORBIDDEN or name.startswith(("x-saw-", "x-envoy-")):
        raise CredentialUnavailable(
            f"credential {credential.id} may not set the header {credential.inject.header!r}",
            cure="inject into Authorization or a header of the service's own",
        )
    return name


def fill(template: str, secret: str) -> str:
    """Return ``template`` with ``{secret}`` and ``{b64:<before>{secret}<after>}`` (RFC 4648 base64) filled in."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "{secret}":
            return secret
        return base64.b64encode(f"{match[1]}{secret}{match[2]}".encode()).decode()

    return _FIELD.sub(one, template)


class Injection(msgspec.Struct, frozen=True):
    """The header to inject, and every form in which its secret could come back in an answer; never logged."""

    name: str
    value: str
    reflections: tuple[str, ...]


class CredentialStore:
    """Values as files named by credential id in one directory, private to this user (no group or other access)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def injection(self, credential: Credential) -> Injection:
        """Return the header to inject; raise :class:`CredentialUnavailable` (without the value)."""
        name, template, secret = header_name(credential), credential.inject.format, self._read(credential.id)
        encoded = [fill(field[0], secret) for field in _FIELD.finditer(template) if field[0] != "{secret}"]
        return Injection(name, fill(template, secret), reflections(secret, encoded))

    def _read(self, identifier: str) -> str:
        if not _ID.fullmatch(identifier):
            raise CredentialUnavailable(f"credential id {identifier!r} is not usable as a file name")
        path = self._directory / identifier
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise CredentialUnavailable(
                f"credential {identifier} is not at hand: {error.strerror}",
                cure="place its value on the perimeter host",
            ) from error
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            raw = stream.read(MAX_SECRET + 1).strip(b"\r\n")
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
            raise CredentialUnavailable(
                f"the file of credential {identifier} is open to group or others", cure="give it mode 0600"
            )
        if not raw or len(raw) > MAX_SECRET or any(byte < 0x20 or byte > 0x7E for byte in raw):
            raise CredentialUnavailable(
                f"the value of credential {identifier} is empty, too long or not printable ASCII",
                cure="store the bare value on one line",
            )
        return raw.decode("ascii")
