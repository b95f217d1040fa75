"""What the calls about sponsors answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

import msgspec

from saw.broker.sponsor_states import SponsorState


class Sponsor(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sponsor as it is answered. ``workspaces``: state → ids of those that are not decommissioned; ``agents``: ids of those
    that are not retired. Nothing was ever decided about one without ``changed_at`` (RFC 3339)."""

    name: str
    state: SponsorState
    reason: str
    changed_at: str | None
    changed_by: str | None
    version: int
    workspaces: dict[str, tuple[str, ...]]
    agents: tuple[str, ...]


class ChangedSponsor(Sponsor, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sponsor after a call; ``quarantined``, ``revoked`` and ``sign_ins``: workspaces and delegations that the call ended, and
    how many sessions of the person at the pages and the command line."""

    changed: bool
    quarantined: tuple[str, ...] = ()
    revoked: tuple[str, ...] = ()
    sign_ins: int = 0


class SponsorPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sponsors by name; ``next`` is the ``after`` of the page that follows, null at the end. Behind ``seq`` the feed
    of changes goes on."""

    sponsors: tuple[Sponsor, ...]
    next: str | None
    seq: int


class FollowedSponsor(Sponsor, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sponsor as it is now; ``seq``: the number of what changed last, a decision, a workspace or an agent."""

    seq: int


class SponsorChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sponsors that changed, the oldest change first; ``next`` and ``behind`` are ``after`` and ``behind`` of the next call."""

    sponsors: tuple[FollowedSponsor, ...]
    next: int
    behind: str
