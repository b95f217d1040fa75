"""What the perimeter knows: workspaces with their leases as the broker states them, and releases it verified itself.

A new state counts from the moment it is received. It is kept on disk too, so that a restart while the broker is away
neither forgets a kill nor outlives a lease.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw import jsontext
from saw.addressing import Number
from saw.errors import ConfigError
from saw.files import load_json, write_private
from saw.gateway.errors import StateRefused

State = Literal["requested", "provisioning", "attesting", "active", "stopped", "quarantined", "decommissioned"]
OPEN_STATES = frozenset({"requested", "provisioning", "attesting", "active"})
"""States in which a workspace's listeners exist at all; only ``active`` may call."""
MAX_STATE = 64 * 1024 * 1024
"""Largest state that is read (bytes)."""


class WorkspaceEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One workspace as the broker states it; times are RFC 3339, digests lower-case hex.

    ``delegations``: signed statements of what its agent was handed, with those that they were made from. ``agent_retired``: the
    agent has ended and no other has taken its place.
    """

    id: str
    number: Number
    state: State
    sponsor: str = ""
    blueprint: str = ""
    ring: str = ""
    lease_expires_at: datetime | None = None
    policy_digest: str | None = None
    released_digest: str | None = None
    released_at: datetime | None = None
    svid_sha256: str | None = None
    agent: str | None = None
    agent_retired: bool = False
    delegation_required: bool = False
    delegations: tuple[str, ...] = ()


class StatedKeys(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The policy keys as the broker states them. They are never used: the pinned TUF root says which keys count."""

    threshold: int
    keys: dict[str, str]


class PerimeterState(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The broker's answer to ``GET /v1/perimeter/state``; ``releases`` maps policy digest to base64 of a bundle."""

    seq: int
    now: datetime
    workspaces: tuple[WorkspaceEntry, ...]
    releases: dict[str, str] = {}
    policy_keys: StatedKeys | None = None


class Grace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which release a workspace was to run before the current one, and since when the current one counts."""

    current: str
    previous: str
    since: datetime


class Cache(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The file that survives a restart: the last state, graces, and the highest revision each workspace ran."""

    format: Literal["saw-perimeter-cache/1"] = "saw-perimeter-cache/1"
    saved_at: datetime
    state: PerimeterState
    graces: dict[str, Grace] = {}
    floors: dict[str, int] = {}


def parse_state(raw: bytes) -> PerimeterState:
    """Read the broker's answer strictly; raise :class:`StateRefused` for anything that is not one consistent state."""
    if len(raw) > MAX_STATE:
        raise StateRefused(f"the broker's state has {len(raw)} bytes", cure="lower the number of workspaces")
    try:
        state = jsontext.decode(raw, kind=PerimeterState)
    except msgspec.DecodeError as error:
        raise StateRefused(f"the broker's state is not valid: {error}", cure="update broker and gatekeeper") from error
    times = [state.now]
    for entry in state.workspaces:
        times += [time for time in (entry.lease_expires_at, entry.released_at) if time is not None]
    if any(time.tzinfo is None for time in times):
        raise StateRefused("the broker's state has a time without zone", cure="update the broker")
    # A decommissioned workspace gives its number back, so only workspaces that have listeners must differ.
    numbers = [entry.number for entry in state.workspaces if entry.state in OPEN_STATES]
    if len({entry.id for entry in state.workspaces}) != len(state.workspaces) or len(set(numbers)) != len(numbers):
        raise StateRefused("the broker's state names a workspace or number twice", cure="repair the registry")
    return state


def decode_release(text: str) -> bytes:
    """Return the bytes of one entry of ``releases``; raise :class:`StateRefused` when it is not base64."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise StateRefused("a release in the broker's state is not base64", cure="update the broker") from error


def next_graces(known: Mapping[str, Grace], workspaces: tuple[WorkspaceEntry, ...], now: datetime) -> dict[str, Grace]:
    """Return the graces after a new state: a changed release starts a new grace for the one before it."""
    graces: dict[str, Grace] = {}
    for entry in workspaces:
        released = entry.released_digest or ""
        before = known.get(entry.id)
        since = min(now, entry.released_at or now)
        if before is None:
            graces[entry.id] = Grace(released, "", since)
        elif before.current != released:
            graces[entry.id] = Grace(released, before.current, since)
        else:
            graces[entry.id] = before
    return graces


class StateFile:
    """The cache file of one gatekeeper."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "state.json"

    def load(self) -> Cache | None:
        """Return what was saved, or ``None`` when there is nothing usable (then nothing is allowed until the broker answers)."""
        if not self._path.exists():
            return None
        try:
            return load_json(self._path, Cache)
        except ConfigError:
            return None

    def save(
        self, state: PerimeterState, graces: Mapping[str, Grace], floors: Mapping[str, int], now: datetime
    ) -> None:
        """Replace the file atomically; raises ``OSError``."""
        cache = Cache(saved_at=now.astimezone(UTC), state=state, graces=dict(graces), floors=dict(floors))
        write_private(self._path, msgspec.json.encode(cache))
