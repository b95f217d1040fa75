"""What the calls about workspaces answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

import msgspec

from saw.broker.lifecycle import State


class Workspace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A workspace as it is answered. Times are RFC 3339; what is null was not yet, or is no more.

    ``version`` counts changes of state, image, agent and endorsement key; what the workspace reports itself does not count.
    """

    id: str
    number: int
    sponsor: str
    blueprint: str
    ring: str
    image: str
    image_sha256: str
    agent_id: str
    state: State
    state_reason: str
    state_since: str
    created_at: str
    watch_seq: int
    ek_recorded: bool
    ak_id: str | None
    tpm_clock: int | None
    tpm_reset_count: int | None
    tpm_restart_count: int | None
    policy_digest: str | None
    lease_expires_at: str | None
    svid_sha256: str | None
    attested_at: str | None
    reported_state: str | None
    reported_digest: str | None
    reported_reason: str | None
    reported_verified: bool | None
    reported_at: str | None
    version: int


class ChangedWorkspace(Workspace, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A workspace after a call, and whether the call changed it; false too when it was told before under its key."""

    changed: bool


class WorkspacePage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Workspaces by id; ``next`` is the ``after`` of the page that follows, null at the end.

    Behind ``seq`` of the first page the feed of changes goes on.
    """

    workspaces: tuple[Workspace, ...]
    next: str | None
    seq: int


class WorkspaceChanges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Workspaces that changed, as they are now, the oldest change first; ``next`` and ``behind`` are what to ask with next."""

    workspaces: tuple[Workspace, ...]
    next: int
    behind: str


class ImageBinding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An image that a workspace was bound to, where it stands now, and why nobody may use it (empty when one may)."""

    name: str
    image_sha256: str
    state: str
    refusal: str = ""


class WayBack(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The image that a workspace goes back to.

    ``passed_over`` are images in between with the reason. ``gone_back``: it is bound to ``image`` already and left a newer one.
    """

    workspace: str
    present: str
    image: ImageBinding
    passed_over: tuple[str, ...]
    gone_back: bool
