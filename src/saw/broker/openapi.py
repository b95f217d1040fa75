"""The operator API as an OpenAPI 3.1 document (https://spec.openapis.org/oas/v3.1.0), made from the routes that are served.

Paths, methods, bodies and roles are those of the running broker; only the words about a call and its query parameters stand here.
Bodies are the types that the broker parses by, so that the document cannot say something else than the parser does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from saw import __version__
from saw.broker.agent_views import Agent, Changed, Changes, Page
from saw.broker.delegation_views import DelegationChanges, DelegationPage, Issued, Revoked, Signed
from saw.broker.job_views import ChangedJob, Job, JobPage, JobSteps
from saw.broker.policy_request_views import AnsweredRequest, JudgedRequest, PolicyRequestPage
from saw.broker.review_views import (
    AskedBack,
    ChangedReview,
    Nonce,
    ReviewBytes,
    ReviewPage,
    ShownReview,
    SignedReceipt,
)
from saw.broker.session_views import ChangedSession, RecordingKey, Session, SessionCertificate, SessionPage
from saw.broker.sponsor_views import ChangedSponsor, Sponsor, SponsorChanges, SponsorPage
from saw.broker.workspace_views import ChangedWorkspace, WayBack, Workspace, WorkspaceChanges, WorkspacePage


class Call(NamedTuple):
    """One call: how it is made, and the type of its body (None: it has none)."""

    method: str
    path: str
    body: Any


class Words(NamedTuple):
    """What is said about a call, its query parameters, and the type of its answer where that is told."""

    summary: str
    query: tuple[str, ...] = ()
    answer: Any = None


_WAIT = "wait"
_QUERY: Mapping[str, str] = {
    "after": "Where to go on: the `next` of the page before, or the number of the last event.",
    "limit": "Most entries of the answer.",
    "behind": "The `behind` of the answer before: up to which id, or name, those of number `after` were told.",
    _WAIT: "Hold the answer back until there is something new, seconds, 30 at most.",
    "first": "First day, YYYY-MM-DD.",
    "last": "Last day, YYYY-MM-DD.",
    "since": "From this time on, milliseconds since 1970.",
    "until": "Up to this time, milliseconds since 1970.",
    "live": "1: those that live.",
    "all": "1: those that ended too.",
    "further": "1: from there one more step back, where the workspace has just gone back.",
}
ABOUT: Mapping[str, Words] = {
    "GET /v1/workspaces": Words(
        "Workspaces by id, in pages", ("after", "limit", "state", "sponsor", "blueprint", "ring", "image", "text"), WorkspacePage
    ),
    "GET /v1/workspace-changes": Words(
        "Workspaces that changed, the oldest change first", ("after", "behind", _WAIT), WorkspaceChanges
    ),
    "POST /v1/workspaces": Words("Register a workspace; the same idempotency key is the same workspace", (), ChangedWorkspace),
    "GET /v1/workspaces/{id}": Words("One workspace", (), Workspace),
    "PUT /v1/workspaces/{id}/image": Words(
        "Bind a workspace to another image, before it is rebuilt; from the version that was seen", (), ChangedWorkspace
    ),
    "GET /v1/workspaces/{id}/way-back": Words(
        "The stable image that a workspace ran before and goes back to", ("further",), WayBack
    ),
    "PUT /v1/workspaces/{id}/ek": Words("Record the endorsement key, once", (), ChangedWorkspace),
    "POST /v1/workspaces/{id}/transition": Words(
        "Take a workspace to another state of its life; from the version that was seen", (), ChangedWorkspace
    ),
    "POST /v1/workspaces/{id}/kill": Words(
        "Kill switch: refuse everything of a workspace at once, whatever its version", (), ChangedWorkspace
    ),
    "GET /v1/workspaces/{id}/policy": Words("Which policy a workspace shall load, and what it loaded"),
    "PUT /v1/policy/root": Words("Install the first TUF root, once"),
    "POST /v1/policy/publish": Words("Publish releases that officers signed"),
    "GET /v1/policy/state": Words("Releases by ring and blueprint"),
    "GET /v1/policy/repository": Words("The TUF repository, as a tar archive"),
    "GET /v1/policy/rings": Words("The rings and how far each is"),
    "GET /v1/policy/rollouts": Words("Rollouts, with their limits"),
    "GET /v1/policy/rollouts/{ring}": Words("The rollout of one ring, workspace by workspace"),
    "POST /v1/policy/rollouts/{ring}/halt": Words("Halt a rollout"),
    "POST /v1/policy/rollouts/{ring}/resume": Words("Let a halted rollout go on"),
    "PUT /v1/policy/rollouts/{ring}/rollback": Words("Hand in the signed way back of a release"),
    "GET /v1/policy/requests": Words(
        "What agents ask for beyond their policy, newest first",
        ("state", "workspace_id", "sponsor", "after", "limit"),
        PolicyRequestPage,
    ),
    "GET /v1/policy/requests/{id}": Words(
        "One such request, and what of a bundle would allow it", (), JudgedRequest
    ),
    "POST /v1/policy/requests/{id}/answer": Words(
        "Accept or decline one; it allows nothing, a signed release does", (), AnsweredRequest
    ),
    "GET /v1/agents": Words(
        "Agents by id, in pages", ("after", "limit", "state", "sponsor", "workspace", "blueprint", "name", "text"), Page
    ),
    "POST /v1/agents": Words("Register an agent", (), Changed),
    "GET /v1/agents/changes": Words("Agents that changed, the oldest change first", ("after", _WAIT), Changes),
    "GET /v1/agents/{id}": Words("One agent", (), Agent),
    "PUT /v1/agents/{id}": Words("Change an agent, or bind it", (), Changed),
    "POST /v1/agents/{id}/retire": Words("End an agent for good", (), Changed),
    "POST /v1/agents/{id}/succeed": Words("Put another agent in its place", (), Changed),
    "GET /v1/sponsors": Words("Sponsors by name, in pages", ("after", "limit", "state", "text"), SponsorPage),
    "GET /v1/sponsor-changes": Words(
        "Sponsors that changed, or whose workspaces or agents did, the oldest change first",
        ("after", "behind", _WAIT),
        SponsorChanges,
    ),
    "GET /v1/sponsors/{name}": Words("One sponsor, with workspaces and agents", (), Sponsor),
    "POST /v1/sponsors/{name}/disable": Words(
        "End everything on behalf of a sponsor at once, and let nothing begin", (), ChangedSponsor
    ),
    "POST /v1/sponsors/{name}/enable": Words("Let things begin on behalf of a sponsor again", (), ChangedSponsor),
    "GET /v1/delegations": Words(
        "Delegations, newest first, in pages", ("after", "limit", "state", "workspace_id"), DelegationPage
    ),
    "POST /v1/delegations": Words(
        "Hand a task to the agent of a workspace; the same idempotency key is the same delegation", (), Issued
    ),
    "GET /v1/delegations/changes": Words(
        "Delegations that were issued or revoked, the oldest change first", ("after", _WAIT), DelegationChanges
    ),
    "GET /v1/delegations/{id}": Words("One delegation, with its signed statement", (), Signed),
    "POST /v1/delegations/{id}/revoke": Words("Revoke a delegation and all below it", (), Revoked),
    "GET /v1/budgets": Words("Budgets and what was charged", ("first", "last", "workspace_id")),
    "GET /v1/usage": Words("What agents used of their workspaces", ("first", "last", "workspace_id")),
    "GET /v1/reviewers": Words("Reviewers with their keys"),
    "GET /v1/reviewers/{name}": Words("One reviewer"),
    "PUT /v1/reviewers/{name}": Words("Register a reviewer, or give one other groups"),
    "POST /v1/reviewers/{name}/retire": Words("Retire a reviewer, for good"),
    "GET /v1/reviews": Words(
        "Reviews, newest first, in pages", ("after", "limit", "state", "workspace_id", "owed"), ReviewPage
    ),
    "GET /v1/reviews/{id}": Words("One review, with what people are shown", (), ShownReview),
    "GET /v1/reviews/{id}/call": Words(
        "The exact call, to be shown and digested on a reviewer's own machine", (), ReviewBytes
    ),
    "GET /v1/reviews/{id}/receipt": Words(
        "A signed receipt of what was decided and what became of it", (), SignedReceipt
    ),
    "POST /v1/reviews/{id}/nonce": Words("Take a nonce for one decision", (), Nonce),
    "POST /v1/reviews/{id}/decide": Words("Hand in a signed decision", (), ChangedReview),
    "POST /v1/reviews/{id}/cancel": Words("Cancel a review", (), ChangedReview),
    "POST /v1/reviews/{id}/read-back": Words(
        "Look again what became of a call whose end is not known", (), AskedBack
    ),
    "GET /v1/sessions": Words(
        "Sessions, newest first, in pages; without a limit all that live are on one",
        ("after", "limit", "workspace_id", "person", "live"),
        SessionPage,
    ),
    "POST /v1/sessions": Words("A certificate for one session through the bastion", (), SessionCertificate),
    "GET /v1/sessions/{id}": Words("One session", (), Session),
    "POST /v1/sessions/{id}/end": Words("End a session", (), ChangedSession),
    "GET /v1/sessions/{id}/recording": Words("The encrypted recording of a session"),
    "POST /v1/sessions/{id}/recording/hold": Words("Keep a recording beyond its time", (), ChangedSession),
    "POST /v1/sessions/{id}/recording/release": Words("Let a kept recording go", (), ChangedSession),
    "POST /v1/sessions/{id}/key": Words("The key of a recording; who asked is in the trail", (), RecordingKey),
    "GET /v1/forwards": Words("Ports of workspaces that are granted to people", ("workspace_id", "all")),
    "POST /v1/forwards": Words("Grant a port of a workspace to one person, for hours"),
    "POST /v1/forwards/{id}/revoke": Words("Revoke such a grant; what goes through it ends"),
    "POST /v1/gates": Words("Ask whether a change of the fleet may be made"),
    "POST /v1/gates/preview": Words("Show what would be asked"),
    "GET /v1/gates/{id}": Words("One question, and what was decided", (_WAIT,)),
    "POST /v1/gates/{id}/claim": Words("Claim an approval, once"),
    "POST /v1/gates/{id}/result": Words("Say how the change ended"),
    "GET /v1/jobs": Words("Lifecycle jobs, newest first", ("state", "workspace", "after", "limit"), JobPage),
    "POST /v1/jobs": Words("Ask for a lifecycle job; the same idempotency key is the same job", (), ChangedJob),
    "GET /v1/jobs/{id}": Words("One job", (), Job),
    "GET /v1/jobs/{id}/events": Words("How a job goes on", ("after", _WAIT), JobSteps),
    "POST /v1/jobs/{id}/cancel": Words("Cancel a job", (), ChangedJob),
    "POST /v1/jobs/{id}/resume": Words("Go on with a job that failed or was lost", (), ChangedJob),
    "GET /v1/notifications": Words("What people were told, newest first", ("state", "channel", "after", "limit")),
    "GET /v1/notifications/{id}": Words("One message, and whether it arrived", (_WAIT,)),
    "POST /v1/notifications/test": Words("Send a test to everyone whom a channel reaches"),
    "POST /v1/notifications/{id}/retry": Words("Try a message again now"),
    "GET /v1/images": Words("Images with their release records"),
    "GET /v1/images/hand-over": Words(
        "What a hypervisor needs to judge images itself: roots, a signed record, what was revoked", ("name", "image_sha256")
    ),
    "PUT /v1/images": Words("Register an image by its signed release record"),
    "POST /v1/images/{name}/state": Words("Promote, deprecate or revoke an image"),
    "POST /v1/certificates/ssh": Words("A short certificate to log in past the bastion, where that is allowed"),
    "POST /v1/certificates/x509": Words("A certificate for a perimeter, a bastion or a machine"),
    "POST /v1/findings/drift": Words("Tell that a host is not as it should be"),
    "GET /v1/trust": Words("The public parts that others are set up with"),
    "GET /v1/audit/events": Words("The events of one source, with their chain", ("source", "after", "limit")),
    "GET /v1/audit/log": Words(
        "All events in the order of their arrival, filtered",
        ("after", "limit", _WAIT, "since", "until", "source", "workspace", "agent", "principal", "class", "activity",
         "verdict", "text"),
    ),
    "GET /v1/audit/verify": Words("Check every chain of the trail"),
    "GET /v1/holds": Words("Legal holds", ("all",)),
    "POST /v1/holds": Words("Begin a legal hold"),
    "POST /v1/holds/{id}/release": Words("End a legal hold"),
    "GET /v1/openapi.json": Words("This document"),
}  # fmt: skip
_REFUSAL = {
    "type": "object",
    "description": "Why nothing was done, and what to do.",
    "required": ["error", "code", "message", "cure", "details", "request_id"],
    "properties": {
        "error": {"type": "string"},
        "code": {"type": "string", "description": "For programs; it does not change."},
        "message": {"type": "string"},
        "cure": {"type": "string"},
        "details": {"type": "object"},
        "request_id": {"type": "string", "description": "In the broker's log and in the header x-request-id."},
    },
}


def document(calls: Sequence[Call], roles: Callable[[str, str], Sequence[str]]) -> dict[str, Any]:
    """Return the document about ``calls``; ``roles`` tells which roles of people who signed in may make one, none: no person may.

    Raises :class:`KeyError` for a call that nothing is said about.
    """
    kinds = [kind for call in calls for kind in (call.body, _about(call).answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    given = dict(zip(map(id, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(
            call, given, sorted(roles(call.method, call.path))
        )
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Secure Agent Workspace: operator API",
            "version": __version__,
            "description": "On the operator's Unix socket, by peer credentials; for people who signed in below `/operator` of the"
            " pages, as far as `x-saw-roles` goes. Changing calls change nothing when they are repeated.",
        },
        "servers": [{"url": "http://broker", "description": "over the Unix socket"}, {"url": "/operator"}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": {**components, "Refusal": _REFUSAL},
            "securitySchemes": {
                "session": {"type": "http", "scheme": "bearer", "description": "The session that `saw login` made."}
            },
        },
    }


def _about(call: Call) -> Words:
    return ABOUT[f"{call.method} {call.path}"]


def _operation(call: Call, given: Mapping[int, dict[str, Any]], roles: Sequence[str]) -> dict[str, Any]:
    about = _about(call)
    names = re.findall(r"\{(\w+)\}", call.path)
    parameters = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    parameters += [
        {"name": name, "in": "query", "schema": {"type": "string"}, "description": _QUERY.get(name, "Only these.")}
        for name in about.query
    ]
    made: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{call.method.lower()}{call.path.removeprefix('/v1')}").strip("_"),
        "summary": about.summary,
        "tags": [call.path.split("/")[2]],
        "x-saw-roles": list(roles),
        "responses": {
            "200": {
                "description": "Done, or how it stands.",
                **(
                    {}
                    if about.answer is None
                    else {"content": {"application/json": {"schema": given[id(about.answer)]}}}
                ),
            },
            "default": {
                "description": "Refused.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}},
            },
        },
    }
    if roles:
        made["security"] = [{"session": []}, {}]
    if parameters:
        made["parameters"] = parameters
    if call.body is not None:
        made["requestBody"] = {"required": True, "content": {"application/json": {"schema": given[id(call.body)]}}}
    return made
