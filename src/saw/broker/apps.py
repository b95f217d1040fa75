"""The two applications: the operator API on the Unix socket and the public side on TLS."""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import time
from datetime import UTC
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from saw.addressing import COLUMNS, HIGHEST
from saw.attest.messages import MAX_EVIDENCE, ActivateRequest, EnrolRequest, Evidence, NonceRequest
from saw.broker.audit_routes import audit_routes
from saw.broker.certificates import Renewal
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError, NotFoundError
from saw.broker.gate_routes import gate_routes
from saw.broker.http import (
    DEFAULT_LIMIT,
    LONGEST_WAIT_S,
    answer,
    guarded,
    refusal,
    whole_number,
    with_body,
    without_body,
)
from saw.broker.job_routes import job_routes, worker_routes
from saw.broker.limits import RateLimit
from saw.broker.local_changes import LocalChanges, changes
from saw.broker.operator_routes import operator_routes
from saw.broker.peer import SCOPE_KEY, Peer
from saw.broker.perimeter import Report, Shipment
from saw.broker.policy_request_routes import workspace_request_routes
from saw.broker.review_routes import perimeter_review_routes
from saw.broker.session_routes import bastion_session_routes
from saw.broker.source_clocks import sent_at
from saw.broker.tool_review_routes import tool_review_routes
from saw.broker.tree_files import tree_routes
from saw.broker.wake import PERIMETER
from saw.errors import SawError
from saw.identity.x509 import SpiffeId, verify_peer

MAX_SHIPMENT = 8 * 1024 * 1024


def operator_app(broker: Broker) -> Starlette:
    """Return the operator API. Only root and members of the operator group may use it, by peer credentials.

    Where people sign in, changes that are asked for here are an alarm (:mod:`saw.broker.local_changes`).
    """

    def identify(request: Request) -> Caller:
        return socket_caller(request, broker.config.operator_group, "operator", "operate the broker", "not_an_operator")

    local = LocalChanges(broker.services, broker.notifications)

    def route(path: str, method: str, handler: Any) -> Route:
        async def told(request: Request, caller: Caller) -> Any:
            workspace = str(request.path_params["id"])[:64] if path.startswith("/v1/workspaces/{id}") else ""
            peer: Peer = request.scope.get(SCOPE_KEY, Peer())
            await run_in_threadpool(local.note, caller, peer, f"{method} {path}", workspace)
            return await handler(request, caller)

        return Route(path, guarded(identify, told if changes(method, path) else handler), methods=[method])

    return Starlette(
        routes=[Route("/healthz", _health(broker), methods=["GET"]), *operator_routes(broker, route)],
        exception_handlers={404: _not_found, 405: _not_found},
    )


def public_app(broker: Broker) -> Starlette:
    """Return the TLS side: attestation, workspaces, perimeters, bastions, machines, the TUF repository, the trail's tree."""
    attestation, views = broker.attestation, broker.views
    # Anyone who reaches the port may ask. A share is of who is proven, else of an address: none can use up another's.
    asked = RateLimit(40, 4.0, time.monotonic)
    heard = RateLimit(20, 1.0, time.monotonic)

    def identify(request: Request) -> Caller:
        return tls_caller(broker, request)

    def perimeter(request: Request) -> Caller:
        caller = tls_caller(broker, request)
        if not caller.principal.startswith("perimeter:"):
            raise ForbiddenError("this call needs a perimeter certificate", cure="present one", code="not_a_perimeter")
        return caller

    def bastion(request: Request) -> Caller:
        caller = tls_caller(broker, request)
        if not caller.principal.startswith("bastion:"):
            raise ForbiddenError("this call needs a bastion's certificate", cure="present one", code="not_a_bastion")
        return caller

    def machine_route(path: str, method: str, handler: Any) -> Route:
        async def admitted(request: Request, caller: Caller) -> Any:
            # The provider may have to be asked for its keys, so not in the event loop.
            token = request.headers.get("authorization", "")
            return await handler(request, await run_in_threadpool(broker.machines.admit, caller, token))

        return route(path, method, admitted)

    def limited(kind: type[Any], call: Any, *, limit: int = DEFAULT_LIMIT) -> Any:
        def run(caller: Caller, body: Any, _request: Request) -> Any:
            asked.take(share_of(caller, body.workspace_id))
            return call(caller, body)

        return with_body(kind, run, limit=limit)

    def report(caller: Caller, body: Report) -> Any:
        kind, _, name = caller.principal.partition(":")
        if kind != "anonymous" and caller.principal != f"workspace:{body.workspace_id}":
            raise ForbiddenError(
                f"{kind} {name} cannot report for {body.workspace_id}",
                cure="report for yourself",
                code="foreign_report",
            )
        if body.kind == "telemetry" and kind == "workspace":
            # Up to 64 KiB each, and as many as a flooded journal has: the trail takes them in at a pace of its own. Without proof
            # nothing is kept, so that needs no share of it.
            heard.take(caller.principal)
        return views.report(caller, body, verified=kind == "workspace")

    async def watch(request: Request, _caller: Caller) -> Any:
        workspace = request.query_params.get("workspace_id", "")
        after = whole_number(request, "after", 0, 2**53)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(views.watch, workspace)

        return await broker.waker.poll(workspace, read, lambda found: bool(found["seq"] != after), _wait(request))

    def given_bundle(caller: Caller, request: Request) -> Any:
        workspace = request.query_params.get("workspace_id", "")
        asked.take(share_of(caller, workspace))
        return broker.rollout_views.bundle(workspace)

    async def perimeter_state(request: Request, _caller: Caller) -> Any:
        after = whole_number(request, "after", 0, 2**53)
        # Perimeters of before numbers went further ask for none, and would refuse a state that has higher ones.
        first, last = (whole_number(request, name, at, HIGHEST) for name, at in (("first", 1), ("last", COLUMNS)))

        async def read() -> int:
            return await run_in_threadpool(views.registry_seq)

        await broker.waker.poll(PERIMETER, read, lambda seq: seq != after, _wait(request))
        return await run_in_threadpool(views.perimeter_state, first, last)

    def route(path: str, method: str, handler: Any, who: Any = identify) -> Route:
        return Route(path, guarded(who, handler), methods=[method])

    tuf = broker.config.tuf_dir
    return Starlette(
        routes=[
            Route("/healthz", _health(broker), methods=["GET"]),
            route("/v1/attest/enrol", "POST", limited(EnrolRequest, attestation.enrol)),
            # Without an outstanding challenge an answer leaves no trace, so it needs no share of its own.
            route(
                "/v1/attest/activate", "POST", with_body(ActivateRequest, lambda c, b, _r: attestation.activate(c, b))
            ),
            route("/v1/attest/nonce", "POST", limited(NonceRequest, attestation.nonce)),
            route("/v1/attest/quote", "POST", limited(Evidence, attestation.quote, limit=MAX_EVIDENCE)),
            route("/v1/workspace/watch", "GET", watch),
            route("/v1/workspace/bundle", "GET", without_body(given_bundle)),
            route("/v1/workspace/report", "POST", limited(Report, report)),
            *tool_review_routes(broker, route),
            *workspace_request_routes(broker, route),
            route("/v1/perimeter/state", "GET", perimeter_state, perimeter),
            route(
                "/v1/perimeter/events",
                "POST",
                with_body(Shipment, lambda c, b, r: views.accept_events(c, b, sent_at(r.headers)), limit=MAX_SHIPMENT),
                perimeter,
            ),
            route(
                "/v1/perimeter/renew",
                "POST",
                with_body(Renewal, lambda c, b, _r: broker.certificates.renew(c, b)),
                perimeter,
            ),
            *perimeter_review_routes(broker, lambda path, method, handler: route(path, method, handler, perimeter)),
            *bastion_session_routes(broker, lambda path, method, handler: route(path, method, handler, bastion)),
            *gate_routes(broker, machine_route),
            *job_routes(broker, machine_route),
            *worker_routes(broker, machine_route),
            Mount("/tuf/metadata", StaticFiles(directory=tuf / "metadata", check_dir=False)),
            Mount("/tuf/targets", StaticFiles(directory=tuf / "targets", check_dir=False)),
            *tree_routes(broker.config.audit_tree),
        ],
        exception_handlers={404: _not_found, 405: _not_found},
    )


def tls_caller(broker: Broker, request: Request) -> Caller:
    """Return who presented which certificate; a certificate that has expired since the handshake is refused."""
    peer: Peer = request.scope.get(SCOPE_KEY, Peer())
    if peer.certificate is None:
        return Caller("anonymous:", peer.address, request.state.request_id)
    pem = x509.load_der_x509_certificate(peer.certificate).public_bytes(Encoding.PEM)
    try:
        holder: SpiffeId = verify_peer(pem, broker.authority.ca_pem, broker.services.clock().astimezone(UTC))
    except SawError as error:
        raise ForbiddenError(error.message, cure=error.cure, code="certificate_refused") from error
    return Caller(f"{holder.kind}:{holder.name}", peer.address, request.state.request_id)


def share_of(caller: Caller, workspace_id: str) -> str:
    """Return whose share a call about a workspace takes.

    Who shows a certificate has one of its own. Of all others each address has one for each workspace (of IPv6 the network of 64
    bits, RFC 6177: one host has all of its addresses), so a stranger elsewhere keeps no workspace from attesting.
    """
    kind, _, name = caller.principal.partition(":")
    if kind != "anonymous":
        return f"{kind}:{name}"
    address = caller.address.partition("%")[0]
    with contextlib.suppress(ValueError):
        if (found := ipaddress.ip_address(address)).version == 6 and found.ipv4_mapped is None:
            address = str(ipaddress.ip_network((address, 64), strict=False))
    return f"{kind} {address} {workspace_id}"


def operator_gid(group: str | None) -> int | None:
    """Return the group id of the operator group, or None when it is not configured or unknown here."""
    if group is None:
        return None
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _wait(request: Request) -> float:
    return float(whole_number(request, "wait", 0, LONGEST_WAIT_S))


def audit_app(broker: Broker) -> Starlette:
    """Return what the audit socket serves: the trail, for reading. Only root and members of the audit group may use it."""

    def identify(request: Request) -> Caller:
        return socket_caller(request, broker.config.audit_group, "auditor", "read the trail", "not_an_auditor")

    def route(path: str, method: str, handler: Any) -> Route:
        return Route(path, guarded(identify, handler), methods=[method])

    return Starlette(
        routes=[Route("/healthz", _health(broker), methods=["GET"]), *audit_routes(broker, route)],
        exception_handlers={404: _not_found, 405: _not_found},
    )


def worker_app(broker: Broker) -> Starlette:
    """Return what the workers' socket serves: claiming jobs and telling how they go. Root and the workers' group may use it."""
    settings = broker.config.jobs
    group = None if settings is None else settings.worker_group

    def identify(request: Request) -> Caller:
        return socket_caller(request, group, "worker", "work on jobs", "not_a_worker")

    def route(path: str, method: str, handler: Any) -> Route:
        return Route(path, guarded(identify, handler), methods=[method])

    return Starlette(
        routes=[Route("/healthz", _health(broker), methods=["GET"]), *worker_routes(broker, route)],
        exception_handlers={404: _not_found, 405: _not_found},
    )


def socket_caller(request: Request, group: str | None, kind: str, purpose: str, code: str) -> Caller:
    """Return who calls over a Unix socket: root or a member of ``group`` by peer credentials, else a refusal."""
    peer: Peer = request.scope.get(SCOPE_KEY, Peer())
    gid = operator_gid(group)
    if peer.uid is None or not (peer.uid == 0 or (gid is not None and gid in peer.gids)):
        raise ForbiddenError(
            f"this user may not {purpose}", cure=f"become root or a member of the {kind} group", code=code
        )
    return Caller(f"{kind}:{peer.user}", peer.address, request.state.request_id)


def _health(broker: Broker) -> Any:
    async def health(_request: Request) -> Response:
        seq = await run_in_threadpool(broker.views.registry_seq)
        return answer({"ok": True, "seq": seq})

    return health


async def _not_found(request: Request, _error: Exception) -> Response:
    path = request.url.path[:256]
    return refusal(
        NotFoundError(f"there is no {request.method} {path}", cure="see docs/architecture.md", code="no_such_call")
    )
