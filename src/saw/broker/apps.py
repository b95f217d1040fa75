"""The two applications: the operator API on the Unix socket and the public side on TLS."""

from __future__ import annotations

import grp
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

from saw.attest.messages import MAX_EVIDENCE, ActivateRequest, EnrolRequest, Evidence, NonceRequest
from saw.broker.certificates import Renewal, SshRequest, X509Request
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.delegation_routes import operator_delegation_routes
from saw.broker.errors import ForbiddenError, NotFoundError
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
from saw.broker.images import Move
from saw.broker.limits import RateLimit
from saw.broker.peer import SCOPE_KEY, Peer
from saw.broker.perimeter import Report, Shipment
from saw.broker.registry import CreateWorkspace, Kill, RecordEk, Reprovision, Step
from saw.broker.releases import Publication, TrustRoot
from saw.broker.review_routes import operator_review_routes, perimeter_review_routes
from saw.broker.rollout_routes import operator_rollout_routes
from saw.broker.wake import PERIMETER
from saw.errors import SawError
from saw.identity.x509 import SpiffeId, verify_peer
from saw.policy.envelope import MAX_ENVELOPE, SignedEnvelope

MAX_SHIPMENT = 8 * 1024 * 1024
MAX_PUBLICATION = 32 * 1024 * 1024


def operator_app(broker: Broker) -> Starlette:
    """Return the operator API. Only root and members of the operator group may use it, by peer credentials."""

    def identify(request: Request) -> Caller:
        peer: Peer = request.scope.get(SCOPE_KEY, Peer())
        group = operator_gid(broker.config.operator_group)
        if peer.uid is None or not (peer.uid == 0 or (group is not None and group in peer.gids)):
            raise ForbiddenError(
                "this user may not operate the broker",
                cure="become root or a member of the operator group",
                code="not_an_operator",
            )
        return Caller(f"operator:{peer.user}", peer.address, request.state.request_id)

    def route(path: str, method: str, handler: Any) -> Route:
        return Route(path, guarded(identify, handler), methods=[method])

    registry, releases, certificates = broker.registry, broker.releases, broker.certificates
    return Starlette(
        routes=[
            Route("/healthz", _health(broker), methods=["GET"]),
            route("/v1/workspaces", "GET", without_body(lambda _c, _r: registry.list())),
            route("/v1/workspaces", "POST", with_body(CreateWorkspace, lambda c, b, _r: registry.create(c, b))),
            route("/v1/workspaces/{id}", "GET", without_body(lambda _c, r: registry.show(r.path_params["id"]))),
            route(
                "/v1/workspaces/{id}/image",
                "PUT",
                with_body(Reprovision, lambda c, b, r: registry.reprovision(c, r.path_params["id"], b)),
            ),
            route(
                "/v1/workspaces/{id}/ek",
                "PUT",
                with_body(RecordEk, lambda c, b, r: registry.record_ek(c, r.path_params["id"], b)),
            ),
            route(
                "/v1/workspaces/{id}/transition",
                "POST",
                with_body(Step, lambda c, b, r: registry.transition(c, r.path_params["id"], b)),
            ),
            route(
                "/v1/workspaces/{id}/kill",
                "POST",
                with_body(Kill, lambda c, b, r: registry.kill(c, r.path_params["id"], b.reason)),
            ),
            route(
                "/v1/policy/root",
                "PUT",
                with_body(TrustRoot, lambda c, b, _r: releases.install_root(c, b), limit=MAX_EVIDENCE),
            ),
            route(
                "/v1/policy/publish",
                "POST",
                with_body(Publication, lambda c, b, _r: releases.publish(c, b), limit=MAX_PUBLICATION),
            ),
            route("/v1/policy/state", "GET", without_body(lambda _c, _r: releases.state())),
            route("/v1/policy/repository", "GET", without_body(lambda _c, _r: releases.archive())),
            route("/v1/policy/rings", "GET", without_body(lambda _c, _r: releases.rings())),
            *operator_rollout_routes(broker, route),
            *operator_delegation_routes(broker, route),
            *operator_review_routes(broker, route),
            route(
                "/v1/images",
                "PUT",
                with_body(SignedEnvelope, lambda c, b, _r: broker.images.register(c, b), limit=MAX_ENVELOPE),
            ),
            route(
                "/v1/images/{name}/state",
                "POST",
                with_body(Move, lambda c, b, r: broker.images.move(c, r.path_params["name"], b)),
            ),
            route("/v1/images", "GET", without_body(lambda _c, _r: broker.images.list())),
            route("/v1/certificates/ssh", "POST", with_body(SshRequest, lambda c, b, _r: certificates.ssh(c, b))),
            route("/v1/certificates/x509", "POST", with_body(X509Request, lambda c, b, _r: certificates.x509(c, b))),
            route("/v1/trust", "GET", without_body(lambda _c, _r: broker.trust())),
            route("/v1/audit/events", "GET", without_body(lambda _c, r: _audit_page(broker, r))),
            route("/v1/audit/verify", "GET", without_body(lambda _c, _r: broker.trail.verify())),
        ],
        exception_handlers={404: _not_found, 405: _not_found},
    )


def public_app(broker: Broker) -> Starlette:
    """Return the TLS side: attestation, workspaces, perimeters, the TUF repository."""
    attestation, views = broker.attestation, broker.views
    # Anyone who reaches the port may ask; each workspace id has its share, so none can fill the trail or starve another.
    asked = RateLimit(40, 4.0, time.monotonic)

    def identify(request: Request) -> Caller:
        return tls_caller(broker, request)

    def perimeter(request: Request) -> Caller:
        caller = tls_caller(broker, request)
        if not caller.principal.startswith("perimeter:"):
            raise ForbiddenError("this call needs a perimeter certificate", cure="present one", code="not_a_perimeter")
        return caller

    def limited(kind: type[Any], call: Any, *, limit: int = DEFAULT_LIMIT) -> Any:
        def run(caller: Caller, body: Any, _request: Request) -> Any:
            asked.take(body.workspace_id)
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
        return views.report(caller, body, verified=kind == "workspace")

    async def watch(request: Request, _caller: Caller) -> Any:
        workspace = request.query_params.get("workspace_id", "")
        after = whole_number(request, "after", 0, 2**53)

        async def read() -> dict[str, Any]:
            return await run_in_threadpool(views.watch, workspace)

        return await broker.waker.poll(workspace, read, lambda found: bool(found["seq"] != after), _wait(request))

    def given_bundle(_caller: Caller, request: Request) -> Any:
        workspace = request.query_params.get("workspace_id", "")
        asked.take(workspace)
        return broker.rollout_views.bundle(workspace)

    async def perimeter_state(request: Request, _caller: Caller) -> Any:
        after = whole_number(request, "after", 0, 2**53)

        async def read() -> int:
            return await run_in_threadpool(views.registry_seq)

        await broker.waker.poll(PERIMETER, read, lambda seq: seq != after, _wait(request))
        return await run_in_threadpool(views.perimeter_state)

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
            route("/v1/perimeter/state", "GET", perimeter_state, perimeter),
            route(
                "/v1/perimeter/events",
                "POST",
                with_body(Shipment, lambda c, b, _r: views.accept_events(c, b), limit=MAX_SHIPMENT),
                perimeter,
            ),
            route(
                "/v1/perimeter/renew",
                "POST",
                with_body(Renewal, lambda c, b, _r: broker.certificates.renew(c, b)),
                perimeter,
            ),
            *perimeter_review_routes(broker, lambda path, method, handler: route(path, method, handler, perimeter)),
            Mount("/tuf/metadata", StaticFiles(directory=tuf / "metadata", check_dir=False)),
            Mount("/tuf/targets", StaticFiles(directory=tuf / "targets", check_dir=False)),
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


def _audit_page(broker: Broker, request: Request) -> dict[str, Any]:
    after, limit = whole_number(request, "after", 0, 2**53), whole_number(request, "limit", 100, 1000)
    return broker.trail.page(request.query_params.get("source", "broker"), after, limit)


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
