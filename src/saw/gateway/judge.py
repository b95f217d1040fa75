"""The decision of ring 2 on one call: identity, freshness, policy, delegation, destination, credential, in this order."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from urllib.parse import urlsplit

import msgspec

from saw.errors import SawError
from saw.gateway.credentials import CredentialStore, Injection
from saw.gateway.definitions import DefinitionsUnavailable, KeptDefinitions
from saw.gateway.delegations import NONE, Engagement, OutsideDelegation, brought, cover, reach, shown
from saw.gateway.errors import (
    CallUnsignable,
    CredentialUnavailable,
    DestinationBlocked,
    PeerRefused,
    ResolutionFailed,
)
from saw.gateway.held import Held, held_by
from saw.gateway.mcp_exchange import Rules
from saw.gateway.metering import Meter
from saw.gateway.paying import Unpaid, pay
from saw.gateway.peer import PeerReader
from saw.gateway.pg_login import Login
from saw.gateway.placeholders import headers_with_placeholder, target_with_placeholder
from saw.gateway.recording import Recorder
from saw.gateway.records import RecordUnavailable
from saw.gateway.releases import Release
from saw.gateway.resolve import Resolver
from saw.gateway.sigv4 import Outgoing
from saw.gateway.state import WorkspaceEntry
from saw.gateway.view import View, offline_granted, release_for
from saw.identity.x509 import Svid
from saw.policy import databases
from saw.policy.addresses import is_blocked_host
from saw.policy.errors import NotCanonical
from saw.policy.governance import InferenceRoute
from saw.policy.grpc_calls import goes_unread, is_grpc
from saw.policy.inference import DATA_CLASS_HEADER, Edit, edit_of
from saw.policy.matcher import Matcher
from saw.policy.mcp_answers import Definitions
from saw.policy.mcp_servers import usable_tools
from saw.policy.model import Decision, Request
from saw.policy.paths import canonicalise_path
from saw.policy.review_poll import Poll, may_poll, poll_of
from saw.policy.websocket import TEXT

LOG = logging.getLogger("saw.gateway")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
DEFAULT_PORT = {"https": 443, "http": 80}
DIAL_DEADLINE_S = 6.0
"""Longest time for all that a call waits for elsewhere, its secrets, its token and its address (seconds).

Envoy waits longer for the decision (``AUTHZ_TIMEOUT``). What it gave up is never sent, and must not be recorded as allowed.
"""


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
    send_ticket: str = ""
    upgrade: str = ""


class Dial(msgspec.Struct, frozen=True):
    """Where an allowed call goes: ``address`` is ``ip:port``; ``inject`` is the credential to add, never logged.

    ``frames`` is what the client may send on the WebSocket that the call opens, empty for every other call. ``charge`` is the
    reservation that pays for it, empty where nothing is paid. ``edit`` is what is written into its body, if anything is.
    ``record`` names the record that its answer belongs to, empty where no answer is kept.
    ``login`` is as whom ring 2 opens the session that the call asks for, None for every other call; never logged.
    """

    address: str
    authority: str
    transport: str
    path: str
    inject: Injection | None
    remove: tuple[str, ...]
    frames: str = ""
    charge: str = ""
    edit: Edit | None = None
    record: str = ""
    login: Login | None = None


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The whole outcome: what was decided, why, about whom, and for an allowed call where it goes.

    ``held``: only a person is missing; all else holds. ``poll``: an allowed question about a review, which goes nowhere.
    ``review`` is the id of the review that the call belongs to. ``offline``: it rests on the time that policy grants without a
    broker. ``budget``: what was reserved for it, or what is left of the budget that does not pay for it. ``limit``: what is left
    of the limit that it would pass. ``cure``: what may be done about a refusal, where the reason alone does not say. ``server``:
    the MCP server over HTTP that an allowed call goes to, whose answer is looked at. ``record``: what was kept of it, by name.
    """

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
    held: Held | None = None
    poll: Poll | None = None
    review: str = ""
    offline: bool = False
    budget: Mapping[str, object] | None = None
    limit: Mapping[str, object] | None = None
    cure: str = ""
    server: str = ""
    record: str = ""


class Refused(Exception):
    """Ends a decision with one of the reasons in ``docs/architecture.md``."""

    def __init__(self, reason: str, detail: str, cure: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.cure = cure


class Judge:
    """Decides calls on the view that ``view`` returns; ``doubt`` says why nothing may be allowed at the moment.

    ``offline`` says how many of the seconds that policy grants without a broker count now, and ``doubt`` is told them.
    ``reviews``: there is a review service, which answers the path that workspaces ask for their reviews under. ``meter``
    charges calls to budgets; without one, calls that a budget pays for are refused. ``definitions``: what is known of those of
    MCP tools; without it, calls of pinned tools are refused. ``recorder`` keeps calls where policy says so; without one, such
    calls are refused.
    """

    def __init__(
        self,
        *,
        view: Callable[[], View],
        doubt: Callable[[float], str],
        offline: Callable[[float, datetime], float],
        now: Callable[[], datetime],
        peers: PeerReader,
        resolver: Resolver,
        credentials: CredentialStore,
        release_grace_s: float,
        reviews: bool = False,
        meter: Meter | None = None,
        definitions: KeptDefinitions | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._recorder = recorder
        self._definitions = definitions
        self._view = view
        self._doubt = doubt
        self._offline = offline
        self._now = now
        self._peers = peers
        self._resolver = resolver
        self._credentials = credentials
        self._grace = release_grace_s
        self._reviews = reviews
        self._meter = meter

    async def give_back(self, verdict: Verdict, why: str) -> None:
        """Release what was reserved for a call that is certainly not sent."""
        try:
            if self._meter is not None and verdict.dial is not None and verdict.dial.charge:
                await self._meter.give_back(verdict.dial.charge, why)
        finally:
            if self._recorder is not None and verdict.record:
                await self._recorder.forget(verdict.record)

    async def decide(self, call: Call) -> Verdict:
        """Return the verdict; never raises for a refusal."""
        case = _Case(call, self._now(), self._view())
        try:
            await self._examine(case)
        except Refused as refusal:
            return case.refused(refusal)
        return case.verdict(allowed=True)

    async def decide_approved(
        self, call: Call, workspace_id: str, policy_digest: str, review: str, *, rule: str = ""
    ) -> Verdict:
        """Return the verdict on a call that people agreed to, as if the workspace made it now under ``policy_digest``.

        ``rule`` is what asked for the review; one about a budget lets the call pass that budget. Everything counts as for any
        other call, except that no person is needed any more and that it comes from no network.
        """
        return await self._decide_for(call, workspace_id, policy_digest, review, question=False, rule=rule or "-")

    async def decide_question(self, call: Call, workspace_id: str, policy_digest: str, review: str) -> Verdict:
        """Like :meth:`decide_approved` for a call that nobody approved: what policy lets people decide on is refused."""
        return await self._decide_for(call, workspace_id, policy_digest, review, question=True)

    async def _decide_for(
        self, call: Call, workspace_id: str, policy_digest: str, review: str, *, question: bool, rule: str = "-"
    ) -> Verdict:
        view = self._view()
        entry = view.workspaces.get(workspace_id)
        case = _Case(msgspec.structs.replace(call, listener=str(entry.number) if entry else ""), self._now(), view)
        case.workspace_id, case.digest, case.review, case.approved = workspace_id, policy_digest, review, True
        case.question, case.agreed = question, rule
        try:
            await self._permit(case)
        except Refused as refusal:
            return case.refused(refusal)
        return case.verdict(allowed=True)

    async def _examine(self, case: _Case) -> None:
        svid = self._identify(case)
        case.workspace_id, case.digest = svid.workspace_id, svid.policy_digest
        await self._permit(case)

    def rules(self, verdict: Verdict) -> Rules:
        """Return what answers to an allowed call are judged by now; raise :class:`Refused` once it may not be made any more."""
        case = _Case(verdict.call, self._now(), self._view())
        case.workspace_id, case.digest, case.approved = (
            verdict.workspace_id,
            verdict.policy_digest,
            bool(verdict.review),
        )
        entry, release = self._release(case)
        request = _request(case)
        decision = release.matcher.decide(request, approved=True)
        server = release.matcher.mcp_server_named(verdict.server)
        if not decision.allowed or server is None:
            raise Refused(decision.reason, decision.detail)
        case.server = server.name
        _delegated(case, entry, request, release, decision)
        held, path = case.view.engagements.get(entry.id, NONE), decision.canonical_path.partition("?")[0]
        return Rules(
            lambda: usable_tools(lambda call: release.matcher.decide(call, approved=True), request, server),
            Definitions() if self._definitions is None else self._definitions.of(verdict.workspace_id, server.name),
            shown(held, request, path, server.name, case.now),
        )

    def _release(self, case: _Case) -> tuple[WorkspaceEntry, Release]:
        """Return the workspace of a case and the release that counts for it; refuse what may not act at all."""
        view = case.view
        # What people approved is sent with the broker's consent, so there is no time offline for it.
        granted = 0 if case.approved else offline_granted(view, case.workspace_id, case.digest)
        offline_s = self._offline(granted, case.now) if granted else 0.0
        doubt = self._doubt(offline_s)
        if doubt:
            raise Refused("gatekeeper_stale", doubt)
        entry = _standing(case, offline_s)
        case.offline = case.offline or bool(offline_s and self._doubt(0.0))
        release = release_for(view, entry, case.digest, case.now, self._grace)
        if isinstance(release, str):
            reason, _, detail = release.partition(": ")
            raise Refused(reason, detail)
        case.revision = release.revision
        return entry, release

    async def _permit(self, case: _Case) -> None:
        call, view = case.call, case.view
        entry, release = self._release(case)
        request = _request(case)
        asks = self._reviews and not case.approved and not call.upgrade
        poll = poll_of(call.method, call.target) if asks else None
        if poll is not None:
            _asked(case, entry, request, release, poll)
            return
        case.decision = asked = release.matcher.decide(request, approved=case.approved and not case.question)
        decision = asked
        if asked.reason == "review_required":
            decision = release.matcher.decide(request, approved=True)
        if not decision.allowed:
            raise Refused(decision.reason, decision.detail)
        await self._pinned(case, request, release, decision)
        if decision.canonical_path != call.target:
            raise Refused("not_canonical", "the path is not in the form in which it was decided")
        case.delegation, why = _delegated(case, entry, request, release, decision)
        case.dial = await self._dial(case, entry, request, release, decision)
        if not asked.allowed or why:
            detail = why if asked.allowed else asked.detail
            case.held, problem = held_by(release, request, asked, case.delegation if why else "")
            raise Refused("review_required", problem or detail)
        kept = self._kept(request, release, decision)
        # Near the end, so that nothing refused is ever charged.
        try:
            held = await pay(
                self._meter, request, decision, release, entry,
                view=view, delegation=case.delegation, request_id=call.request_id, agreed=case.agreed,
            )  # fmt: skip
        except Unpaid as error:
            case.budget, case.limit, case.held = error.budget, error.limit, error.held
            reason = error.reason if error.held is None else "review_required"
            raise Refused(reason, error.detail, error.cure) from error
        if held is not None:
            case.budget, case.dial = held.detail, msgspec.structs.replace(case.dial, charge=held.id)
        if kept is not None:
            await self._keep(case, entry, request, decision, kept, counted="" if held is None else held.counted)

    def _kept(self, request: Request, release: Release, decision: Decision) -> InferenceRoute | None:
        """Return the route of a call that is to be kept, None for every other; refuse it where nothing is kept at all."""
        if decision.inference is None or request.method != "POST":
            return None
        route = release.governance.way(decision.inference, request.port, decision.way)
        if route.record is None:
            return None
        if self._recorder is None:
            detail = f"the policy has {route.record.content} of {route.alias} kept, and this perimeter keeps none"
            raise Refused("record_unavailable", detail)
        return route

    async def _keep(
        self,
        case: _Case,
        entry: WorkspaceEntry,
        request: Request,
        decision: Decision,
        route: InferenceRoute,
        *,
        counted: str,
    ) -> None:
        """Write what is to be kept of a call; one that cannot be kept is refused, and what was reserved for it is given back.

        ``counted`` is the name under which its request was counted, which it is no more then; empty where it was not.
        """
        if self._recorder is None or case.dial is None:  # pragma: no cover - _kept refused it
            raise Refused("record_unavailable", "this perimeter keeps no calls")
        try:
            case.record = await self._recorder.keep(
                request, decision, route, entry,
                policy_digest=case.digest, delegation=case.delegation, review=case.review, request_id=case.call.request_id,
            )  # fmt: skip
        except BaseException as error:
            await self._unkept(case.dial.charge, counted)
            case.budget = None
            if isinstance(error, RecordUnavailable):
                raise Refused(error.code, error.message, error.cure) from error
            raise
        if route.record is not None and route.record.content == "prompts-and-responses":
            case.dial = msgspec.structs.replace(case.dial, record=case.record)

    async def _unkept(self, charge: str, counted: str) -> None:
        """Give back what was reserved and counted for a call that cannot be kept."""
        if self._meter is None:
            return
        if charge:
            try:
                await self._meter.give_back(charge, "the call could not be kept")
            except SawError as left:  # it ends by itself, as one of a call that nobody heard of again
                LOG.critical("charge %s is not given back: %s", charge, left.message)
        if counted:
            try:
                await self._meter.uncount(counted)
            except SawError as left:  # it takes its part of the limit until that has room again by itself
                LOG.critical("the request %s stays counted: %s", counted, left.message)

    async def _pinned(self, case: _Case, request: Request, release: Release, decision: Decision) -> None:
        """Note which MCP server a call goes to; refuse a tool that the server defines in another way than the policy pins."""
        path = decision.canonical_path.partition("?")[0]
        server = release.matcher.mcp_server(request.host, request.port, path) if decision.protocol == "mcp" else None
        if server is None:
            return
        case.server = server.name
        if not server.pins(decision):
            return
        if self._definitions is None:
            raise Refused(
                "gatekeeper_unavailable", f"a tool of {server.name} is pinned, and nothing is kept of those here"
            )
        try:
            known = self._definitions.of(case.workspace_id, server.name)
            refused = await asyncio.to_thread(server.redefined, decision, known)
        except DefinitionsUnavailable as error:
            raise Refused(error.code, error.message, error.cure) from error
        if refused is not None:
            case.decision = refused
            raise Refused(refused.reason, refused.detail)

    def _identify(self, case: _Case) -> Svid:
        try:
            return self._peers.read(case.call.peer, case.now)
        except PeerRefused as error:
            raise Refused("no_identity", error.message) from error

    async def _dial(
        self, case: _Case, entry: WorkspaceEntry, request: Request, release: Release, decision: Decision
    ) -> Dial:
        scheme, host, port, path = request.scheme, request.host, request.port, decision.canonical_path
        credential_id, call, edit = decision.credential, case.call, None
        exact, allowed = _reach(release.matcher, host, port)
        if decision.inference is not None:
            route = release.governance.way(decision.inference, port, decision.way)
            (host, port), scheme = route.upstream_address, urlsplit(route.upstream).scheme or "https"
            exact, allowed = True, ()
            path = _upstream_path(path, route.upstream_prefix)
            credential_id = route.credential
            edit = edit_of(route, call.body) if call.method == "POST" else None
            headers = {name: value for name, value in call.headers.items() if name != DATA_CLASS_HEADER}
            call = msgspec.structs.replace(call, headers=headers, body=edit.apply(call.body) if edit else call.body)
        session = databases.is_session(call.upgrade)
        blocked = is_blocked_host(host)
        if blocked:
            raise Refused("destination_blocked", blocked)
        _bound(case.call, credential_id)
        authority = host if port == DEFAULT_PORT[scheme] else f"{host}:{port}"
        late = Refused("credential_unavailable", f"credential {credential_id} is not at hand: it takes too long")
        try:
            async with asyncio.timeout(DIAL_DEADLINE_S):
                inject, login = None, None
                if session:
                    login = await self._login(release, credential_id, entry)
                else:
                    outgoing = _outgoing(call, scheme, authority, path)
                    inject = await self._inject(release, credential_id, entry, outgoing)
                late = Refused(ResolutionFailed.code, f"there is no time left to look up {host}")
                address = await self._resolver.chosen(host, exact=exact, allowed=allowed)
        except TimeoutError:
            raise late from None
        except (DestinationBlocked, ResolutionFailed) as error:
            raise Refused(error.code, error.message) from error
        return Dial(
            address=f"[{address}]:{port}" if ":" in address else f"{address}:{port}",
            authority=authority,
            transport="postgres"
            if session
            else ("tls" if scheme == "https" else "plain") + _lasting(case.call, decision),
            path=path,
            inject=inject,
            remove=_dropped(case.call.headers, inject, decision),
            frames=decision.frames,
            edit=edit,
            login=login,
        )

    async def _login(self, release: Release, identifier: str | None, entry: WorkspaceEntry) -> Login:
        try:
            credential = release.governance.credential(identifier or "")
            return await self._credentials.login(credential, {"sponsor": entry.sponsor, "workspace": entry.id})
        except CredentialUnavailable as error:
            raise Refused("credential_unavailable", error.message) from error
        except KeyError as error:
            raise Refused("credential_unavailable", "no credential is defined for this session") from error

    async def _inject(
        self, release: Release, identifier: str | None, entry: WorkspaceEntry, outgoing: Outgoing
    ) -> Injection | None:
        if identifier is None:
            return None
        caller = {"sponsor": entry.sponsor, "workspace": entry.id}
        try:
            return await self._credentials.injection(release.governance.credential(identifier), caller, outgoing)
        except CallUnsignable as error:
            raise Refused("credential_unavailable", error.message, error.cure) from error
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
        self.held: Held | None = None
        self.poll: Poll | None = None
        self.review = ""
        self.approved = False
        self.question = False
        self.offline = False
        self.budget: Mapping[str, object] | None = None
        self.limit: Mapping[str, object] | None = None
        self.agreed = ""
        self.server = ""
        self.record = ""

    def refused(self, refusal: Refused) -> Verdict:
        return self.verdict(allowed=False, reason=refusal.reason, detail=refusal.detail, cure=refusal.cure)

    def verdict(self, *, allowed: bool, reason: str = "", detail: str = "", cure: str = "") -> Verdict:
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
            held=self.held,
            poll=self.poll if allowed else None,
            review=self.review,
            offline=self.offline,
            budget=self.budget,
            limit=self.limit,
            cure=cure,
            server=self.server if allowed else "",
            record=self.record if allowed else "",
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
    port = int(stated or told or DEFAULT_PORT.get(call.scheme, 0))
    return (match[1].lower(), port) if 0 < port < 65536 else None


def _standing(case: _Case, offline_s: float) -> WorkspaceEntry:
    """Return the workspace when it may act at all: registered, on its own network, active, under a lease.

    ``offline_s``: how many seconds longer than the broker said the lease lasts now.
    """
    entry = case.view.workspaces.get(case.workspace_id)
    if entry is None:
        raise Refused("no_identity", f"workspace {case.workspace_id} is not registered")
    case.workspace = entry
    if case.call.listener != str(entry.number):
        raise Refused("no_identity", "the certificate belongs to a workspace on another network")
    if entry.state != "active":
        raise Refused("workspace_not_active", f"workspace {entry.id} is {entry.state}")
    if entry.agent_retired:
        raise Refused("agent_retired", f"{entry.agent}, the agent of workspace {entry.id}, is retired")
    if entry.lease_expires_at is None or case.now >= entry.lease_expires_at + timedelta(seconds=offline_s):
        raise Refused("lease_expired", f"the lease of workspace {entry.id} has ended; it must attest again")
    case.offline = case.now >= entry.lease_expires_at
    return entry


def _asked(case: _Case, entry: WorkspaceEntry, request: Request, release: Release, poll: Poll) -> None:
    """Let a question about a review pass where the workspace may call the host for something; it is never sent there."""
    case.decision = decision = may_poll(release.matcher, request)
    if not decision.allowed:
        raise Refused(decision.reason, decision.detail)
    try:
        case.delegation = reach(case.view.engagements.get(entry.id, NONE), request.host, request.port, case.now)
    except OutsideDelegation as error:
        raise Refused(error.code, error.message) from error
    case.poll, case.review = poll, poll.review


def _delegated(
    case: _Case, entry: WorkspaceEntry, request: Request, release: Release, decision: Decision
) -> tuple[str, str]:
    """Return the id of the delegation that covers an allowed call, and why it wants a person to decide, if it does.

    Refuses a call that nothing handed to the agent covers.
    """
    held = case.view.engagements.get(entry.id, NONE)
    git = release.matcher.speaks_git(request.host)
    session = databases.is_session(request.upgrade)
    if session:
        request = msgspec.structs.replace(request, method=databases.METHOD)
    try:
        if decision.frames not in {"", "none"}:
            _messages_delegated(held, request, decision, case.now)
        return cover(
            held, request, decision, git_host=git, now=case.now, approved=case.approved, server=case.server
        ), ""
    except OutsideDelegation as error:
        if error.code == "review_required" and is_grpc(request.headers):
            detail = f"delegation {error.delegation} wants every write reviewed, and a gRPC client cannot wait for that"
            raise Refused("outside_delegation", detail) from error
        if error.code == "review_required" and session:
            detail = f"delegation {error.delegation} wants every write reviewed, and nobody can review each statement"
            raise Refused("outside_delegation", detail) from error
        if error.code == "review_required":
            return error.delegation, error.message
        raise Refused(error.code, error.message) from error


def _messages_delegated(held: Engagement, request: Request, decision: Decision, now: datetime) -> None:
    """Refuse a WebSocket on which the agent could send what nobody handed to it, or what a person would have to decide."""
    sending = msgspec.structs.replace(request, method=TEXT)
    try:
        cover(held, sending, decision, git_host=False, now=now)
    except OutsideDelegation as error:
        if error.code != "review_required":
            raise
        detail = f"delegation {error.delegation} wants every write reviewed, and nobody can review each message of a WebSocket"
        raise OutsideDelegation("outside_delegation", detail) from error


def _request(case: _Case) -> Request:
    """Return the call in the matcher's words; refuse forms that could be read in two ways."""
    call = case.call
    if call.scheme not in DEFAULT_PORT:
        raise Refused("not_canonical", f"scheme {call.scheme[:16]!r} is neither https nor http")
    if case.destination is None:
        raise Refused("not_canonical", "the authority is not a plain host with one port")
    if call.method != call.method.upper():
        detail = f"the method {call.method[:16]!r} is not in capitals, so services may read it in two ways"
        raise Refused("not_canonical", detail, f"send it as {call.method[:16].upper()}")
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
        upgrade=call.upgrade,
        data_classes=brought(case.view.engagements.get(case.workspace_id, NONE), case.now),
    )


def _lasting(call: Call, decision: Decision) -> str:
    """Return how the transport's name ends for what goes on after it was decided: a WebSocket, or a gRPC call."""
    if decision.frames:
        return "-upgrade"
    return "-unread" if goes_unread(call.method, call.headers) else ""


def _reach(
    matcher: Matcher, host: str, port: int
) -> tuple[bool, tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]]:
    return matcher.host_declared_exactly(host), tuple(matcher.allowed_ips(host, port))


def _upstream_path(path: str, prefix: str) -> str:
    """Replace the leading ``/v1`` of an inference path by the upstream's own prefix."""
    if path == "/v1" or path.startswith(("/v1/", "/v1?")):
        return f"{prefix}{path[3:]}" or "/"
    raise Refused("method_or_path_not_allowed", "inference paths start with /v1/")


def _outgoing(call: Call, scheme: str, authority: str, target: str) -> Outgoing:
    """Return a call as it will reach its service, without the credential."""
    dropped = headers_with_placeholder(call.headers)
    headers = {name: value for name, value in call.headers.items() if name not in dropped}
    return Outgoing(call.method, scheme, authority, target, headers, call.body, call.body_complete)


def _bound(call: Call, credential: str | None) -> None:
    """Refuse a call that would take a placeholder out: in the query, or in a header where no credential takes its place."""
    if target_with_placeholder(call.target):
        raise Refused(
            "placeholder_unbound", "the path or query holds the placeholder of a credential, and none is put there"
        )
    names = headers_with_placeholder(call.headers)
    if names and credential is None:
        detail = f"the header {min(names)[:64]} holds the placeholder of a credential, and none is bound to this call"
        raise Refused("placeholder_unbound", detail)


def _dropped(headers: Mapping[str, str], inject: Injection | None, decision: Decision) -> tuple[str, ...]:
    """Return the client's headers that must not go on; what a call of a model holds is not the service's to know."""
    told = {DATA_CLASS_HEADER} & set(headers) if decision.inference is not None else set()
    return tuple(sorted({*_placeholders(headers, inject), *told}))


def _placeholders(headers: Mapping[str, str], inject: Injection | None) -> tuple[str, ...]:
    """Return the client's headers that must not go on: its own authorisation, and every placeholder, once we inject."""
    if inject is None:
        return ()
    found = set(headers_with_placeholder(headers))
    found |= {name for name in ("authorization", *inject.replaces) if name in headers}
    return tuple(sorted(found - inject.names))
