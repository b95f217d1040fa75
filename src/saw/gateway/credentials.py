"""Credentials: read at the moment of use, shaped as policy says, never logged or shown to a workspace."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from saw.gateway.credential_sources import CredentialSource, FileSource
from saw.gateway.envoy_parts import HOP_HEADERS
from saw.gateway.errors import CredentialUnavailable
from saw.gateway.oauth2 import Handed, TokenKeeper
from saw.gateway.pg_login import Login
from saw.gateway.redaction import longest_first, reflections
from saw.gateway.sigv4 import HEADERS as SIGNATURE
from saw.gateway.sigv4 import Outgoing, sign
from saw.policy.governance import Credential
from saw.policy.providers import OAuth2
from saw.policy.references import Place, parse_reference

_HEADER = re.compile(r"[a-z0-9!#$%&'*+.^`|~-]+")
_FIELD = re.compile(r"\{b64:([^{}]*)\{secret\}([^{}]*)\}|\{secret\}")
_FORBIDDEN = frozenset({*HOP_HEADERS, "host", "x-forwarded-client-cert", "x-request-id"})


def header_name(credential: Credential) -> str:
    """Return the lower-case header that ``credential`` sets; raise :class:`CredentialUnavailable` for one it must not."""
    header = "" if credential.inject is None else credential.inject.header
    name = header.lower()
    if not _HEADER.fullmatch(name) or name in _FORBIDDEN or name.startswith(("x-saw-", "x-envoy-")):
        raise CredentialUnavailable(
            f"credential {credential.id} may not set the header {header!r}",
            cure="inject into Authorization or a header of the service's own",
        )
    return name


def header_names(credential: Credential) -> frozenset[str]:
    """Return the lower-case headers that ``credential`` sets; raise :class:`CredentialUnavailable` for one it must not."""
    return frozenset(SIGNATURE) if credential.sigv4 is not None else frozenset({header_name(credential)})


def fill(template: str, secret: str) -> str:
    """Return ``template`` with ``{secret}`` and ``{b64:<before>{secret}<after>}`` (RFC 4648 base64) filled in."""

    def one(match: re.Match[str]) -> str:
        if match[0] == "{secret}":
            return secret
        return base64.b64encode(f"{match[1]}{secret}{match[2]}".encode()).decode()

    return _FIELD.sub(one, template)


class Injection(msgspec.Struct, frozen=True):
    """The headers to inject, and every form in which a secret in them could come back in an answer; never logged.

    ``replaces`` are headers of the client that do not go on beside them.
    """

    headers: tuple[tuple[str, str], ...]
    reflections: tuple[str, ...]
    replaces: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the headers, in lower case."""
        return frozenset(name for name, _ in self.headers)


class CredentialStore:
    """Turns what policy says of a credential into headers: finds the secret at its ``ref``, and puts in it or its token.

    ``vault`` and ``tokens`` are None where this perimeter host has neither: what needs one is refused.
    """

    def __init__(
        self, directory: Path, *, vault: CredentialSource | None = None, tokens: TokenKeeper | None = None
    ) -> None:
        self._sources: dict[str, CredentialSource] = {"file": FileSource(directory)}
        if vault is not None:
            self._sources["vault"] = vault
        self._tokens = tokens

    async def injection(
        self, credential: Credential, caller: Mapping[str, str], outgoing: Outgoing | None = None
    ) -> Injection:
        """Return the headers to inject for ``caller``, whose ``sponsor`` and ``workspace`` stand in for the fields of a ``ref``.

        ``outgoing`` is the call, for credentials that sign it. Raises :class:`CredentialUnavailable` (without the value).
        """
        if (signing := credential.sigv4) is not None:
            _, keys = await self._secret(credential.id, credential.ref, caller)
            signed = await sign(credential.id, signing, keys, outgoing)
            forms = (form for secret in signed.secrets for form in reflections(secret, ()))
            return Injection(signed.headers, longest_first(forms), SIGNATURE)
        name, template = header_name(credential), "" if credential.inject is None else credential.inject.format
        place, secret = await self._secret(credential.id, credential.ref, caller)
        if (wanted := credential.oauth2) is not None:
            secret = await self._token(credential, wanted, Handed(place, secret), caller)
        encoded = [fill(field[0], secret) for field in _FIELD.finditer(template) if field[0] != "{secret}"]
        return Injection(((name, fill(template, secret)),), reflections(secret, encoded))

    async def login(self, credential: Credential, caller: Mapping[str, str]) -> Login:
        """Return as whom a session of PostgreSQL is opened for ``caller``; raises :class:`CredentialUnavailable`."""
        wanted = credential.postgres
        if wanted is None:
            raise CredentialUnavailable(f"credential {credential.id} opens no session", cure="say postgres in it")
        _, secret = await self._secret(credential.id, credential.ref, caller)
        return Login(credential.id, wanted.user, wanted.databases, secret)

    async def _token(self, credential: Credential, wanted: OAuth2, handed: Handed, caller: Mapping[str, str]) -> str:
        if self._tokens is None:
            raise CredentialUnavailable(f"this perimeter host fetches no token for credential {credential.id}")
        client_secret = ""
        if wanted.client_secret is not None:
            _, client_secret = await self._secret(credential.id, wanted.client_secret, caller)
        elif wanted.grant == "client_credentials":
            client_secret = handed.secret
        return await self._tokens.token(credential.id, wanted, handed, client_secret)

    async def _secret(self, identifier: str, ref: str, caller: Mapping[str, str]) -> tuple[Place, str]:
        try:
            place = parse_reference(ref).at(caller)
        except ValueError as error:
            raise CredentialUnavailable(f"credential {identifier} cannot be looked up: {error}") from None
        source = self._sources.get(place.store)
        if source is None:
            raise CredentialUnavailable(
                f"credential {identifier} lies in a store that this perimeter host has not: {place.store}",
                cure="ask the platform team to configure it on the perimeter host",
            )
        return place, await source.read(identifier, place, caller.get("workspace", ""))
