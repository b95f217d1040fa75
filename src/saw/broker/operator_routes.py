"""The operators' calls, wherever they are served: on the Unix socket, and to people who signed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.routing import Route

from saw.attest.messages import MAX_EVIDENCE
from saw.broker.agent_routes import agent_routes
from saw.broker.audit_routes import audit_routes
from saw.broker.certificates import SshRequest, X509Request
from saw.broker.core import Broker
from saw.broker.delegation_routes import operator_delegation_routes
from saw.broker.drift import DriftFinding, record_drift
from saw.broker.forward_routes import forward_routes
from saw.broker.gate_routes import gate_routes
from saw.broker.hold_routes import hold_routes
from saw.broker.http import BodyHandler, with_body, without_body
from saw.broker.images import Move
from saw.broker.job_routes import job_routes
from saw.broker.notification_routes import notification_routes
from saw.broker.openapi import Call, document
from saw.broker.operator_roles import ALLOWED
from saw.broker.policy_request_routes import operator_request_routes
from saw.broker.registry import CreateWorkspace, Kill, RecordEk, Reprovision, Step
from saw.broker.releases import Publication, TrustRoot
from saw.broker.review_routes import operator_review_routes
from saw.broker.rollout_routes import operator_rollout_routes
from saw.broker.session_routes import operator_session_routes
from saw.broker.sponsor_routes import sponsor_routes
from saw.broker.workspace_routes import workspace_list_routes
from saw.policy.envelope import MAX_ENVELOPE, SignedEnvelope

MAX_PUBLICATION = 32 * 1024 * 1024
MakeRoute = Callable[[str, str, Any], Route]


def operator_routes(broker: Broker, route: MakeRoute) -> list[Route]:
    """Return the routes; ``route`` makes one that is open to whoever may call it."""

    registry, releases, certificates = broker.registry, broker.releases, broker.certificates
    return [
        *workspace_list_routes(broker, route),
        route("/v1/workspaces", "POST", with_body(CreateWorkspace, lambda c, b, _r: registry.create(c, b))),
        route("/v1/workspaces/{id}", "GET", without_body(lambda _c, r: registry.show(r.path_params["id"]))),
        route(
            "/v1/workspaces/{id}/image",
            "PUT",
            with_body(Reprovision, lambda c, b, r: registry.reprovision(c, r.path_params["id"], b)),
        ),
        route(
            "/v1/workspaces/{id}/way-back",
            "GET",
            without_body(
                lambda _c, r: broker.image_history.way_back(
                    r.path_params["id"], further=r.query_params.get("further") == "1"
                )
            ),
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
            with_body(Kill, lambda c, b, r: registry.kill(c, r.path_params["id"], b.reason, b.idempotency_key)),
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
        *operator_request_routes(broker, route),
        *agent_routes(broker, route),
        *sponsor_routes(broker, route),
        *operator_delegation_routes(broker, route),
        route("/v1/budgets", "GET", without_body(lambda _c, r: broker.charges.show(*_days(r)))),
        route("/v1/usage", "GET", without_body(lambda _c, r: broker.resource_use.show(*_days(r)))),
        *operator_review_routes(broker, route),
        *operator_session_routes(broker, route),
        *forward_routes(broker, route),
        *gate_routes(broker, route),
        *job_routes(broker, route),
        *notification_routes(broker, route),
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
        route(
            "/v1/images/hand-over",
            "GET",
            without_body(
                lambda _c, r: broker.images.hand_over(
                    releases.tuf_roots(), r.query_params.get("name", ""), r.query_params.get("image_sha256", "")
                )
            ),
        ),
        route("/v1/certificates/ssh", "POST", with_body(SshRequest, lambda c, b, _r: certificates.ssh(c, b))),
        route("/v1/certificates/x509", "POST", with_body(X509Request, lambda c, b, _r: certificates.x509(c, b))),
        route(
            "/v1/findings/drift",
            "POST",
            with_body(DriftFinding, lambda c, b, _r: record_drift(broker.services, c, b)),
        ),
        route("/v1/trust", "GET", without_body(lambda _c, _r: broker.trust())),
        *audit_routes(broker, route),
        *hold_routes(broker, route),
        route("/v1/openapi.json", "GET", without_body(lambda _c, _r: described(broker))),
    ]


def described(broker: Broker) -> dict[str, Any]:
    """Return the OpenAPI document about these calls."""
    calls: list[Call] = []

    def note(path: str, method: str, handler: Any) -> Route:
        calls.append(Call(method, path, handler.body if isinstance(handler, BodyHandler) else None))
        return Route(path, handler, methods=[method])

    operator_routes(broker, note)
    return document(calls, lambda method, path: tuple(ALLOWED.get((method, path), ())))


def _days(request: Request) -> tuple[str | None, str | None, str | None]:
    """Return the first day, the last day and the workspace that a call asks for."""
    asked = request.query_params
    return asked.get("first"), asked.get("last"), asked.get("workspace_id")
