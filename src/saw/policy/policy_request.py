"""What an agent may ask of the people who write its policy: one call that it wants to make, and why. It grants nothing.

An ask travels from the sandbox (:class:`Wish`) over the policy agent to the broker, which judges it by its own copy of the policy
in force (:func:`judge`) and shows people what would allow it. What allows it in the end is a signed release, and nothing else.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

import msgspec

from saw.policy.errors import NotCanonical
from saw.policy.explain import explain_call
from saw.policy.loader import Bundle
from saw.policy.model import Request
from saw.policy.paths import canonicalise_path

MAX_BODY = 4096
"""Longest body of an ask (bytes)."""
Host = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_]([a-z0-9._-]{0,251}[a-z0-9_-])?\Z")]
PathText = Annotated[str, msgspec.Meta(pattern=r"^/[!-~]{0,511}\Z")]
Method = Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z-]{0,31}\Z")]
Program = Annotated[str, msgspec.Meta(pattern=r"^(/[ -~]{1,255})?\Z")]
Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
State = Literal["open", "accepted", "declined", "expired"]
Standing = Literal["refused", "review", "never", "allowed", "delegation", "unknown"]
"""How the policy in force stands to an ask: ``refused``, and another policy could allow it; it waits for a ``review``; no policy
may allow it (``never``); ``allowed`` already; allowed, but no ``delegation`` covers it; ``unknown``: the policy is not there."""


class Wish(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body that an agent posts. ``path`` has no query; ``program`` is who shall make the call, empty for who asks."""

    host: Host
    reason: Reason
    method: Method = "GET"
    path: PathText = "/"
    port: Port | None = None
    scheme: Literal["https", "http"] = "https"
    program: Program = ""


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A call that is asked for; ``policy_digest`` is the policy in force where it is."""

    policy_digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
    host: Host
    port: Port
    scheme: Literal["https", "http"]
    method: Method
    path: PathText
    program: Program
    reason: Reason


class AskMore(Wanted, frozen=True, kw_only=True):
    """What a workspace asks of the broker."""

    workspace_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]

    @property
    def digest(self) -> str:
        """SHA-256 of what is asked for, in lower-case hex: the reason does not make it another ask."""
        parts = (self.scheme, self.host, str(self.port), self.method, self.path, self.program)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def call(self) -> Request:
        """Return the call as the matcher takes it."""
        return Request(
            scheme=self.scheme,
            host=self.host,
            port=self.port,
            method=self.method,
            path=self.path,
            binary=self.program or None,
        )


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent is told of one of its asks. ``comment`` is what a person answered; times are RFC 3339, UTC."""

    id: str
    state: State
    host: str
    port: int
    scheme: str
    method: str
    path: str
    program: str
    reason: str
    policy_digest: str
    opened_at: str
    expires_at: str
    answered_at: str | None = None
    comment: str = ""


class AskedList(msgspec.Struct, frozen=True, kw_only=True):
    """An agent's asks, the newest first."""

    requests: tuple[Asked, ...]


class Judged(msgspec.Struct, frozen=True, kw_only=True):
    """How a policy stands to an ask. ``proposal`` are the changes of the bundle that would allow it, as YAML; where there are
    none, ``impossible`` says why. ``notes`` are what else the changes do."""

    standing: Standing
    detail: str = ""
    proposal: str = ""
    impossible: str = ""
    notes: tuple[str, ...] = ()


def canonical(path: str) -> str:
    """Return ``path`` as it is matched; raise :class:`ValueError` for one that no rule can name, or that has a query."""
    try:
        found = canonicalise_path(path, allow_encoded_slash=True)
    except NotCanonical as error:
        raise ValueError(error.message) from error
    if "?" in found:
        raise ValueError("a rule names the path without its query")
    return found


def judge(bundle: Bundle, call: Request) -> Judged:
    """Return how the policy in ``bundle`` stands to ``call``, and the smallest change that would allow it.

    The change was tried: the changed bundle loads, and its own matcher allows the call (:func:`saw.policy.explain.explain_call`).
    """
    found = explain_call(bundle, call)
    decision = found.decision
    if decision.allowed:
        return Judged(standing="allowed", detail="the policy in force allows it")
    standing: Standing = "refused"
    if decision.reason == "review_required":
        standing = "review"
    elif decision.reason in {"destination_blocked", "not_canonical"}:
        standing = "never"
    return Judged(
        standing=standing,
        detail=decision.detail,
        proposal="".join(change.text() for change in found.changes),
        impossible=found.impossible,
        notes=found.notes,
    )
