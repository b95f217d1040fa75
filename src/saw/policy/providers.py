"""How a secret becomes what is sent, where that is more than putting it into a header: a token that is fetched first."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

from saw.policy import globs
from saw.policy.addresses import is_blocked_host
from saw.policy.databases import check_credential
from saw.policy.decode import Report, StructureReport
from saw.policy.model import Part, says
from saw.policy.partial import Unknown
from saw.policy.references import Reference, may_meet, parse_reference

if TYPE_CHECKING:
    from saw.policy.governance import Credential, Governance

MAX_SCOPES = 32
_VISIBLE = re.compile(r"[ -~]{1,256}\Z")
_SCOPE = re.compile(r"[\x21\x23-\x5b\x5d-\x7e]{1,128}\Z")
"""A scope token (RFC 6749, section 3.3)."""
_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}\Z")
_SCOPE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
_EVERY_PATH = ("/**",)


class OAuth2(Part, frozen=True):
    """An access token (RFC 6749) that ring 2 fetches and puts in place of ``{secret}``.

    The secret at ``ref`` is the client's, or with the grant ``refresh_token`` that token. Access tokens are kept in the
    memory of the perimeter alone.
    """

    token_url: Annotated[
        str, says("The token endpoint: https, one exact host, no query.", "https://id.example.com/oauth2/token")
    ]
    client_id: Annotated[str, says("Who asks there.", "agents")]
    grant: Annotated[
        Literal["client_credentials", "refresh_token"],
        says("What is handed in for an access token.", "client_credentials"),
    ] = "client_credentials"
    client_secret: Annotated[
        str | None,
        says(
            "Where the client's secret lies; only with refresh_token, and only where it has one.", "file:agents-secret"
        ),
    ] = None
    scopes: Annotated[tuple[str, ...], says("What is asked for; empty: what the server gives.", ["items.read"])] = ()
    resource: Annotated[
        str | None, says("The service that the token is for (RFC 8707).", "https://api.example.com")
    ] = None

    @property
    def address(self) -> tuple[str, int]:
        """Return host (lower case) and port of the token endpoint."""
        parts = urlsplit(self.token_url)
        return (parts.hostname or "", parts.port or 443)


class SigV4(Part, frozen=True):
    """A signature of each call (AWS Signature Version 4). The value at ``ref`` is ``ACCESS_KEY_ID:SECRET_ACCESS_KEY``, with
    temporary keys ``:SESSION_TOKEN`` behind it. It takes the place of ``inject``.
    """

    service: Annotated[str, says("Name of the service, as in its signatures.", "s3")]
    region: Annotated[str, says("Its region.", "eu-central-1")]


def check_signed(value: str, report: Report) -> None:
    """Check a name in the scope of a signature."""
    if not _SCOPE_NAME.match(value):
        report(f"{value[:64]!r} is not the name of a service or region", "use lower-case letters, digits and dashes")


def check_provider(value: Credential, report: StructureReport) -> None:
    """Check that exactly one thing is said of how a credential is put into calls."""
    if value.postgres is not None:
        check_credential(value, report)
        return
    if value.sigv4 is None:
        if value.inject is None:
            report("inject", "it is not said how the credential is put into a call", "add inject, sigv4 or postgres")
        return
    if value.inject is not None:
        report("inject", "a signature has headers of its own", "remove it")
    if value.oauth2 is not None:
        report("oauth2", "a call is signed or gets a token", "remove one of the two")


def check_reference(value: str, report: Report) -> None:
    """Check where a secret lies. The value is not repeated: what somebody wrote here by mistake may be the secret."""
    try:
        parse_reference(value)
    except ValueError as error:
        report(f"that is not a reference: {error}", "write file:NAME or vault:MOUNT/PATH, never the secret itself")


def check_optional_reference(value: str | None, report: Report) -> None:
    """Check where a secret lies, if that is said."""
    if value is not None:
        check_reference(value, report)


def check_token_url(value: str, report: Report) -> None:
    """Check where tokens are fetched."""
    try:
        parts = urlsplit(value)
        host, _ = parts.hostname or "", parts.port  # both raise for what is none
    except ValueError:
        report("the token endpoint is not a URL", "write https://host/path")
        return
    if parts.scheme != "https" or parts.query or parts.fragment or "@" in parts.netloc or not _VISIBLE.match(value):
        report("the token endpoint must be https://host[:port]/path and nothing else", "correct the URL")
    elif not globs.is_exact(host) or is_blocked_host(host):
        report("the token endpoint needs one exact host that may be reached", "correct the URL")
    else:
        with suppress(globs.GlobError):
            globs.host_glob(host)
            return
        report(f"{host[:64]!r} is not a host name", "correct the URL")


def check_client_id(value: str, report: Report) -> None:
    """Check the name of a client."""
    if not _VISIBLE.match(value):
        report("the client id has characters outside printable ASCII, none, or more than 256", "write it as registered")


def check_scope(value: str, report: Report) -> None:
    """Check one scope."""
    if not _SCOPE.match(value):
        report(f"{value[:64]!r} is not a scope", "write each scope as an item of its own")


def check_resource(value: str | None, report: Report) -> None:
    """Check the service that a token is for (RFC 8707, section 2: an absolute URI without a fragment)."""
    if value is not None and ("#" in value or ":" not in value or " " in value or not _VISIBLE.match(value)):
        report(f"{value[:64]!r} is not an absolute URI", "write for example https://api.example.com")


def check_oauth2(value: OAuth2, report: StructureReport) -> None:
    """Check what fields of an :class:`OAuth2` must agree on."""
    if value.client_secret is not None and value.grant != "refresh_token":
        report("client_secret", "with client_credentials the secret at ref is the client's", "remove it")
    if len(value.scopes) > MAX_SCOPES:
        report("scopes", f"more than {MAX_SCOPES} scopes", "ask for fewer")


def check_method(value: str, report: Report) -> None:
    """Check an HTTP method that a credential is for."""
    if not _METHOD.match(value):
        report(f"{value[:40]!r} is not an upper-case HTTP method", "write for example GET")


def fits(methods: tuple[str, ...], method: str) -> bool:
    """Return whether a credential for ``methods`` goes with ``method``: HEAD wherever GET is, all where none is named."""
    return not methods or method in methods or (method == "HEAD" and "GET" in methods)


def may_share(left: tuple[str, ...], right: tuple[str, ...]) -> bool:
    """Return whether a call exists with which both lists of methods fit."""
    if not left or not right:
        return True
    return any(fits(left, method) and fits(right, method) for method in {*left, *right, "HEAD"})


def routed_scope(value: Governance, report: StructureReport) -> None:
    """Refuse the parts of a credential's scope that nothing would ask for: a route takes it for each of its calls."""
    routed: set[str] = set()
    with suppress(Unknown):
        for route in value.inference.routes:
            routed |= {name for name in (route.credential, *(way.credential for way in route.upstreams)) if name}
    for index, credential in enumerate(value.credentials):
        with suppress(Unknown):
            if credential.id in routed and credential.postgres is not None:
                report(
                    ("credentials", index, "postgres"),
                    "an inference route takes its credential for calls, and this one opens sessions of PostgreSQL",
                    "give the route a credential of its own",
                )
            for field in _unasked(credential, named=credential.id in routed):
                report(
                    ("credentials", index, field),
                    "an inference route takes its credential for all of its calls",
                    "remove it, or use a credential of its own for the route",
                )


def secrets_apart(value: Governance, report: StructureReport) -> None:
    """Refuse references of which one leads a caller with a fitting name to the secret of another, such as a shared one."""
    found: list[tuple[str, Reference]] = []
    for index, credential in enumerate(value.credentials):
        with suppress(Unknown):
            told: dict[tuple[str, ...], str] = {("ref",): credential.ref}
            if credential.oauth2 is not None and credential.oauth2.client_secret is not None:
                told["oauth2", "client_secret"] = credential.oauth2.client_secret
            for field, text in told.items():
                with suppress(ValueError):
                    ours = parse_reference(text)
                    other = next((name for name, theirs in found if may_meet(ours, theirs)), None)
                    found.append((credential.id, ours))
                    if other is not None:
                        reason = (
                            f"a caller with a fitting name would get a secret of {other} here, or the other way round"
                        )
                        cure = "give secrets of callers a folder that holds nothing else"
                        report(("credentials", index, *field), reason, cure)


def _unasked(credential: Credential, *, named: bool) -> Iterator[str]:
    alone = not credential.hosts
    if credential.methods and (named or alone):
        yield "methods"
    if alone and credential.paths != _EVERY_PATH:
        yield "paths"
