"""Which roles of people who signed in allow which of the operators' calls.

What is not here is for the control host's socket alone.
"""

from __future__ import annotations

from saw.broker.sso_settings import Role

_LOOK: frozenset[Role] = frozenset({"operator", "security", "auditor"})
_EXAMINE: frozenset[Role] = frozenset({"security", "auditor"})
_INTERVENE: frozenset[Role] = frozenset({"operator", "security"})
_OPERATE: frozenset[Role] = frozenset({"operator"})

ALLOWED: dict[tuple[str, str], frozenset[Role]] = {
    ("GET", "/v1/workspaces"): _LOOK,
    ("POST", "/v1/workspaces"): _OPERATE,
    ("GET", "/v1/workspace-changes"): _LOOK,
    ("GET", "/v1/workspaces/{id}"): _LOOK,
    ("PUT", "/v1/workspaces/{id}/image"): _OPERATE,
    ("GET", "/v1/workspaces/{id}/way-back"): _LOOK,
    ("GET", "/v1/workspaces/{id}/policy"): _LOOK,
    ("POST", "/v1/workspaces/{id}/transition"): _OPERATE,
    ("POST", "/v1/workspaces/{id}/kill"): _INTERVENE,
    ("POST", "/v1/policy/publish"): _OPERATE,
    ("GET", "/v1/policy/state"): _LOOK,
    ("GET", "/v1/policy/repository"): _LOOK,
    ("GET", "/v1/policy/rings"): _LOOK,
    ("GET", "/v1/policy/rollouts"): _LOOK,
    ("GET", "/v1/policy/rollouts/{ring}"): _LOOK,
    ("POST", "/v1/policy/rollouts/{ring}/halt"): _INTERVENE,
    ("POST", "/v1/policy/rollouts/{ring}/resume"): _OPERATE,
    ("PUT", "/v1/policy/rollouts/{ring}/rollback"): _OPERATE,
    ("GET", "/v1/policy/requests"): _LOOK,
    ("GET", "/v1/policy/requests/{id}"): _LOOK,
    ("POST", "/v1/policy/requests/{id}/answer"): _INTERVENE,
    ("GET", "/v1/agents"): _LOOK,
    ("POST", "/v1/agents"): _OPERATE,
    ("GET", "/v1/agents/changes"): _LOOK,
    ("GET", "/v1/agents/{id}"): _LOOK,
    ("PUT", "/v1/agents/{id}"): _OPERATE,
    ("POST", "/v1/agents/{id}/retire"): _INTERVENE,
    ("POST", "/v1/agents/{id}/succeed"): _OPERATE,
    ("GET", "/v1/sponsors"): _LOOK,
    ("GET", "/v1/sponsor-changes"): _LOOK,
    ("GET", "/v1/sponsors/{name}"): _LOOK,
    ("POST", "/v1/sponsors/{name}/disable"): _INTERVENE,
    ("POST", "/v1/sponsors/{name}/enable"): _OPERATE,
    ("GET", "/v1/delegations"): _LOOK,
    ("GET", "/v1/delegations/changes"): _LOOK,
    ("POST", "/v1/delegations"): _OPERATE,
    ("GET", "/v1/delegations/{id}"): _LOOK,
    ("POST", "/v1/delegations/{id}/revoke"): _INTERVENE,
    ("GET", "/v1/budgets"): _LOOK,
    ("GET", "/v1/usage"): _LOOK,
    ("GET", "/v1/sessions"): _LOOK,
    ("GET", "/v1/sessions/{id}"): _LOOK,
    ("POST", "/v1/sessions/{id}/end"): _INTERVENE,
    ("GET", "/v1/sessions/{id}/recording"): _EXAMINE,
    ("POST", "/v1/sessions/{id}/key"): _EXAMINE,
    ("POST", "/v1/sessions/{id}/recording/hold"): _EXAMINE,
    ("POST", "/v1/sessions/{id}/recording/release"): _EXAMINE,
    ("GET", "/v1/forwards"): _LOOK,
    ("POST", "/v1/forwards"): _INTERVENE,
    ("POST", "/v1/forwards/{id}/revoke"): _INTERVENE,
    ("PUT", "/v1/images"): _OPERATE,
    ("GET", "/v1/images"): _LOOK,
    ("GET", "/v1/images/hand-over"): _LOOK,
    ("POST", "/v1/images/{name}/state"): _OPERATE,
    ("POST", "/v1/findings/drift"): _OPERATE,
    ("GET", "/v1/jobs"): _LOOK,
    ("POST", "/v1/jobs"): _OPERATE,
    ("GET", "/v1/jobs/{id}"): _LOOK,
    ("GET", "/v1/jobs/{id}/events"): _LOOK,
    ("POST", "/v1/jobs/{id}/cancel"): _INTERVENE,
    ("POST", "/v1/jobs/{id}/resume"): _OPERATE,
    ("GET", "/v1/notifications"): _LOOK,
    ("GET", "/v1/notifications/{id}"): _LOOK,
    ("POST", "/v1/notifications/test"): _OPERATE,
    ("POST", "/v1/notifications/{id}/retry"): _OPERATE,
    ("GET", "/v1/trust"): _LOOK,
    ("GET", "/v1/openapi.json"): _LOOK,
    ("GET", "/v1/audit/events"): _EXAMINE,
    ("GET", "/v1/audit/log"): _EXAMINE,
    ("GET", "/v1/audit/verify"): _EXAMINE,
    ("GET", "/v1/holds"): _EXAMINE,
    ("POST", "/v1/holds"): _EXAMINE,
    ("POST", "/v1/holds/{id}/release"): _EXAMINE,
}
"""Method and route → the roles that allow it. A person with several roles may do what each of them allows; sponsors besides
make the calls of :data:`saw.broker.agent_routes.OWN` about their own agents."""
