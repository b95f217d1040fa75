"""The decision of ring 2 on one call: identity, freshness, policy, delegation, destination, credential, in this order."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from urllib.parse import urlsplit

import msgspec

from saw.gateway.credentials import PLACEHOLDER, CredentialStore
from saw.gateway.delegations import NONE, OutsideDelegation, cover
from saw.gateway.errors import (
    CredentialUnavailable,
    DestinationBlocked,
    PeerRefused,
    ResolutionFailed,
)
from saw.gateway.peer import PeerReader
from saw.gateway.releases import Release
from saw.gateway.resolve import Resolver, choose
from saw.gateway.state import WorkspaceEntry
from saw.gateway.view import View, release_for
from saw.identity.x509 import Svid
from saw.policy.addresses import is_blocked_host
from saw.policy.errors import NotCanonical
from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Request
from saw.policy.paths import canonicalise_path

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORT = {"https": 443, "http": 80}


class Call(msgspec.Struct, frozen=True):
    """One request as Envoy showed it. ``headers`` has lower-case names; ``target`` is the path with its query."""

    listener: str
    peer: str
    scheme: str
    authority: str
    port: str
    method: str
    target: str
    binary: str
    ancestors: tuple[str, ...]
    request_id: str
    headers: Mapping[str, str]
    body: bytes
    body_complete: bool


class Dial(msgspec.Struct, frozen=True):
    """Where an allowed call goes: ``address`` is ``ip:port``; ``inject`` is the credential header, never logged."""

    address: str
    authority: str
    transport: str
    path: str
    inject: tuple[str, str] | None
    remove: tuple[str, ...]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The whole outcome: what was decided, why, about whom, and for an allowed call where it goes."""

    call: Call
    time: datetime
    allowed: bool
    host: str
    port: int
    reason: str = ""
    detail: str = ""
    workspace: WorkspaceEntry | None = None
    workspace_id: str = ""
    policy_digest: str = ""
    revision: int = 0
    decision: Decision | None = None
    delegation: str = ""
    dial: Dial | None = None


class Refused(Exception):
    """Ends a decision with one of the reasons in ``docs/architecture.md``."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Judge:
    """Decides calls on the view that ``view`` returns; ``doubt`` says why nothing may be allowed at the moment."""

    def __init__(
        self,
        *,
        view: Callable[[], View],
        doubt: Callable[[], str],
        now: Callable[[], datetime],
        peers: PeerReader,
        resolver: Resolver,
        credentials: CredentialStore,
        release_grace_s: float,
    ) -> None:
        self._view = view
        self._doubt = doubt
        self._now = now
        self._peers = peers
        self._resolver = resolver
        self._credentials = credentials
        self._grace = release_grace_s

    async def decide(self, call: Call) -> Verdict:
        """Return the verdict; never raises for a refusal."""
        case = _Case(call, self._now(), self._view())
        try:
            await self._examine(case)
        except Refused as refusal:
            return case.verdict(allowed=False, reason=refusal.reason, detail=refusal.detail)
        return case.verdict(allowed=True)

    async def _examine(self, case: _Case) -> None:
        call, view = case.call, case.view
        svid = self._identify(case)
        case.workspace_id, case.digest = svid.workspace_id, svid.policy_digest
        doubt = self._doubt()
        if doubt:
            raise Refused("gatekeeper_stale", doubt)
        entry = _standing(case, svid)
        release = release_for(view, entry, svid.policy_digest, case.now, self._grace)
        if isinstance(release, str):
            reason, _, detail = release.partition(": ")
            raise Refused(reason, detail)
        case.revision = release.revision
        request = _request(case)
        case.decision = decision = release.matcher.decide(request)
        if not decision.allowed:
            raise Refused(decision.reason, decision.detail)
        if decision.canonical_path != call.target:
            raise Refused("not_canonical", "the path is not in the form in which it was decided")
        case.delegation = _delegated(case, entry, request, release, decision)
        case.dial = await self._dial(case, request, release, decision)

    def _identify(self, case: _Case) -> Svid:
        try:
            return self._peers.read(case.call.peer, case.now)
        except PeerRefused as error:
            raise Refused("no_identity", error.message) from error

    async def _dial(self, case: _Case, request: Request, release: Release, decision: Decision) -> Dial:
        scheme, host, port, path = request.scheme, request.host, request.port, decision.canonical_path
        credential_id = decision.credential
        exact, allowed = _reach(release.matcher, host, port)
        if decision.inference is not None:
            route = release.governance.route(decision.inference)
            (host, port), scheme = route.upstream_address, urlsplit(route.upstream).scheme or "https"
            exact, allowed = True, ()
            path = _upstream_path(path, route.upstream_prefix)
            credential_id = route.credential
        blocked = is_blocked_host(host)
        if blocked:
            raise Refused("destination_blocked", blocked)
        inject = self._inject(release, credential_id)
        try:
            address = choose(host, await self._resolver.addresses(host), exact=exact, allowed=allowed)
        except (DestinationBlocked, ResolutionFailed) as error:
            raise Refused(error.code, error.message) from error
        authority = host if port == _DEFAULT_PORT[scheme] else f"{host}:{port}"
        return Dial(
            address=f"[{address}]:{port}" if ":" in address else f"{address}:{port}",
            authority=authority,
            transport="tls" if scheme == "https" else "plain",
            path=path,
            inject=inject,
            remove=_placeholders(case.call.headers, inject),
        )

    def _inject(self, release: Release, identifier: str | None) -> tuple[str, str] | None:
        if identifier is None:
            return None
        try:
            return self._credentials.header(release.governance.credential(identifier))
        except CredentialUnavailable as error:
            raise Refused("credential_unavailable", error.message) from error
        except KeyError as error:
            raise Refused("credential_unavailable", f"credential {identifier} is not defined") from error


class _Case:
    """A decision in the making: what is known so far goes into the verdict, whichever way it ends."""

    def __init__(self, call: Call, now: datetime, view: View) -> None:
        self.call = call
        self.now = now
        self.view = view
        self.destination = destination(call)
        self.workspace: WorkspaceEntry | None = None
        self.workspace_id = ""
        self.digest = ""
        self.revision = 0
        self.decision: Decision | None = None
        self.delegation = ""
        self.dial: Dial | None = None

    def verdict(self, *, allowed: bool, reason: str = "", detail: str = "") -> Verdict:
        return Verdict(
            call=self.call,
            time=self.now,
            allowed=allowed,
            host=self.destination[0] if self.destination else self.call.authority[:255],
            port=self.destination[1] if self.destination else 0,
            reason=reason,
            detail=detail,
            workspace=self.workspace,
            workspace_id=self.workspace_id,
            policy_digest=self.digest,
            revision=self.revision,
            decision=self.decision,
            delegation=self.delegation,
            dial=self.dial if allowed else None,
        )


def destination(call: Call) -> tuple[str, int] | None:
    """Return lower-case host and port of a call, or ``None`` unless the authority is a plain host with one clear port."""
    match = _AUTHORITY.fullmatch(call.authority)
    told = call.port
    if match is None or match[1].endswith(".") or (told and not (told.isascii() and told.isdigit() and len(told) <= 5)):
        return None
    stated = match[2]
    if stated and told and int(stated) != int(told):
        return None
    port = int(stated or told or _DEFAULT_PORT.get(call.scheme, 0))
    return (match[1].lower(), port) if 0 < port < 65536 else None


def _standing(case: _Case, svid: Svid) -> WorkspaceEntry:
    """Return the workspace when it may act at all: registered, on its own network, active, under a lease."""
    entry = case.view.workspaces.get(svid.workspace_id)
    if entry is None:
        raise Refused("no_identity", f"workspace {svid.workspace_id} is not registered")
    case.workspace = entry
    if case.call.listener != str(entry.number):
        raise Refused("no_identity", "the certificate belongs to a workspace on another network")
    if entry.state != "active":
        raise Refused("workspace_not_active", f"workspace {entry.id} is {entry.state}")
    if entry.lease_expires_at is None or case.now >= entry.lease_expires_at:
        raise Refused("lease_expired", f"the lease of workspace {entry.id} has ended; it must attest again")
    return entry


def _delegated(case: _Case, entry: WorkspaceEntry, request: Request, release: Release, decision: Decision) -> str:
    """Return the id of the delegation that covers an allowed call; refuse one that nothing handed to the agent covers."""
    held = case.view.engagements.get(entry.id, NONE)
    try:
        git = release.matcher.speaks_git(request.host)
        return cover(held, request, decision, git_host=git, now=case.now)
    except OutsideDelegation as error:
        raise Refused(error.code, error.message) from error


def _request(case: _Case) -> Request:
    """Return the call in the matcher's words; refuse forms that could be read in two ways."""
    call = case.call
    if call.scheme not in _DEFAULT_PORT:
        raise Refused("not_canonical", f"scheme {call.scheme[:16]!r} is neither https nor http")
    if case.destination is None:
        raise Refused("not_canonical", "the authority is not a plain host with one port")
    try:
        canonical = canonicalise_path(call.target, allow_encoded_slash=True)
    except NotCanonical as error:
        raise Refused("not_canonical", error.message) from error
    if canonical != call.target:
        raise Refused("not_canonical", "the path is not in canonical form")
    return Request(
        scheme=call.scheme,
        host=case.destination[0],
        port=case.destination[1],
        method=call.method,
        path=call.target,
        binary=call.binary or None,
        ancestors=call.ancestors,
        headers=call.headers,
        body=call.body,
        body_complete=call.body_complete,
    )


def _reach(
    matcher: Matcher, host: str, port: int
) -> tuple[bool, tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]]:
    return matcher.host_declared_exactly(host), tuple(matcher.allowed_ips(host, port))


def _upstream_path(path: str, prefix: str) -> str:
    """Replace the leading ``/v1`` of an inference path by the upstream's own prefix."""
    if path == "/v1" or path.startswith(("/v1/", "/v1?")):
        return f"{prefix}{path[3:]}" or "/"
    raise Refused("method_or_path_not_allowed", "inference paths start with /v1/")


def _placeholders(headers: Mapping[str, str], inject: tuple[str, str] | None) -> tuple[str, ...]:
    """Return the client's headers that must not go on: its own authorisation, and every placeholder, once we inject."""
    if inject is None:
        return ()
    found = {name for name, value in headers.items() if PLACEHOLDER in value}
    if "authorization" in headers:
        found.add("authorization")
    return tuple(sorted(found - {inject[0]}))
