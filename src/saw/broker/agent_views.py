"""What the calls about agents answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

import msgspec

from saw.broker.agent_states import AgentState


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody said of an agent; nothing proves it."""

    harness: str
    model: str


class Agent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An agent as it is answered. Times are RFC 3339; ``workspace`` is null before it is bound."""

    id: str
    name: str
    sponsor: str
    owner: str
    purpose: str
    claims: Claims
    workspace: str | None
    blueprint: str | None
    state: AgentState
    created_at: str
    retired_at: str | None
    retired_by: str | None
    retired_reason: str | None
    predecessor: str | None
    successor: str | None
    version: int
    seq: int


class Changed(Agent, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An agent after a call, and whether the call changed it; ids of delegations that it ended and issued."""

    changed: bool
    revoked: tuple[str, ...] = ()
    reissued: tuple[str, ...] = ()


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Agents by id; ``next`` is the ``after`` of the page that follows, null at the end. Changes are told behind ``seq``."""

    agents: tuple[Agent, ...]
    next: str | None
    seq: int


class Changes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Agents that changed, as they are now, the oldest change first; ``next`` is the number to ask behind."""

    agents: tuple[Agent, ...]
    next: int
