"""What the calls about delegations answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

import msgspec

from saw.broker.delegation_list import DelegationState
from saw.policy.delegation import Approval, Resource, Tools


class HandedOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A delegation as it is answered. Times are RFC 3339; what is null was not. ``tools`` is there where the record names tools,
    ``data_classes`` where it brings classes of data.

    ``version`` is 1, and 2 once it is revoked: nothing else of a delegation changes.
    """

    format: str
    id: str
    parent: str
    sponsor: str
    workspace: str
    agent: str
    task: str
    resources: tuple[Resource, ...]
    tools: tuple[Tools, ...] | msgspec.UnsetType = msgspec.UNSET
    data_classes: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    not_before: str
    expires: str
    approval: Approval
    state: DelegationState
    issued_by: str
    issued_at: str
    revoked_by: str | None
    revoked_at: str | None
    revoked_reason: str | None
    version: int
    seq: int


class Signed(HandedOut, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A delegation with its signed statement."""

    statement: str


class Issued(Signed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A delegation that was asked for; ``changed`` is false where it was issued before, under the same key."""

    changed: bool


class Revoked(Signed, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A delegation after it was revoked; ``revoked`` has the ids of all that the call ended."""

    changed: bool
    revoked: tuple[str, ...]


class DelegationPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Delegations, the newest first; ``next`` is the ``after`` of the page that follows, null at the end. Changes are told behind
    ``seq``."""

    delegations: tuple[HandedOut, ...]
    next: str | None
    seq: int


class DelegationChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Delegations that were issued or revoked, as they are now, the oldest change first; ``next`` is the number to ask behind.

    That one ends by its time is no change: it says when it will.
    """

    delegations: tuple[HandedOut, ...]
    next: int
