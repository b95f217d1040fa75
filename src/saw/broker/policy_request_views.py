"""What the calls about policy requests answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from saw.policy.policy_request import Asked, Judged


class PolicyRequest(Asked, frozen=True, kw_only=True):
    """A request as operators see it. ``host``, ``method``, ``path``, ``program`` and ``reason`` are the agent's words.

    ``standing`` is how policy stood to it when it was asked."""

    workspace: str
    agent: str
    sponsor: str
    blueprint: str
    ring: str
    standing: str
    answered_by: str | None


class JudgedRequest(PolicyRequest, frozen=True, kw_only=True):
    """One request, with how the policy that is in force there ``now`` stands to it."""

    now: Judged
    policy_now: str | None


class AnsweredRequest(PolicyRequest, frozen=True, kw_only=True):
    """A request after an answer. An answer changes nothing of what is allowed."""

    changed: bool


class PolicyRequestPage(msgspec.Struct, frozen=True, kw_only=True):
    """Requests, the newest first; ``next`` is the ``after`` of the page that follows, null at the end."""

    requests: tuple[PolicyRequest, ...]
    next: str | None


class AnswerRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a person says: ``accept`` that a signed release shall allow it, or ``decline``; and why, which the agent reads too."""

    decision: Literal["accept", "decline"]
    comment: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
