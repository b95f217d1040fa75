"""One consistent view of the perimeter's state that a decision is made on, and how a new one takes its place."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from datetime import datetime

import msgspec

from saw.gateway.clock import Clock
from saw.gateway.contact import Contact
from saw.gateway.delegations import Engagement, Handed, engagements, verify_statements
from saw.gateway.releases import Release, TrustRoot, verify_releases
from saw.gateway.state import OPEN_STATES, Cache, Grace, PerimeterState, StateFile, WorkspaceEntry, next_graces
from saw.policy.delegation import MAX_DEPTH

LOG = logging.getLogger("saw.gateway")


class View(msgspec.Struct, frozen=True):
    """An immutable generation of everything that decisions depend on.

    ``handed`` holds the verified delegations by statement, ``engagements`` what each workspace's agent holds of them.
    """

    seq: int
    workspaces: Mapping[str, WorkspaceEntry]
    releases: Mapping[str, Release]
    graces: Mapping[str, Grace]
    floors: Mapping[str, int]
    handed: Mapping[str, Handed] = {}
    engagements: Mapping[str, Engagement] = {}

    def open_numbers(self) -> tuple[int, ...]:
        """Return the numbers of the workspaces whose listeners exist."""
        return tuple(sorted(entry.number for entry in self.workspaces.values() if entry.state in OPEN_STATES))

    def credential_headers(self) -> frozenset[str]:
        """Return every header name that a loaded release may inject."""
        return frozenset().union(*(release.credential_headers() for release in self.releases.values()))


EMPTY = View(seq=-1, workspaces={}, releases={}, graces={}, floors={})


def raise_floors(
    floors: Mapping[str, int], workspaces: Mapping[str, WorkspaceEntry], releases: Mapping[str, Release]
) -> dict[str, int]:
    """Return the floors after these releases: for each workspace the highest released revision it was attested with.

    Not for each ring: during a rollout, and after a halt, workspaces of one ring are given different releases.
    """
    raised = dict(floors)
    for entry in workspaces.values():
        release = releases.get(entry.policy_digest or "")
        if release is not None and entry.policy_digest == entry.released_digest:
            raised[entry.id] = max(raised.get(entry.id, 0), release.revision)
    return raised


class ViewKeeper:
    """Holds the current :class:`View`, takes in new states, and knows how fresh they are.

    ``ca_pem`` is the authority that signers of delegations must chain to. ``changed`` is called, from the event loop, for
    every state taken in once its releases are verified. ``monotonic`` returns seconds. ``contact`` knows whether the broker
    can be reached.
    """

    def __init__(
        self,
        root: TrustRoot,
        clock: Clock,
        file: StateFile,
        monotonic: Callable[[], float],
        stale_after_s: float,
        *,
        ca_pem: bytes,
        contact: Contact,
    ) -> None:
        self.view = EMPTY
        self.changed: Callable[[View], None] = lambda _view: None
        self.keeps: Callable[[], bool] = lambda: True
        """Whether this process saves what it takes in: of several replicas, the one that leads."""
        self._state: PerimeterState | None = None
        self._turn = asyncio.Lock()
        self._root = root
        self._ca_pem = ca_pem
        self.contact = contact
        self._clock = clock
        self._file = file
        self._monotonic = monotonic
        self._stale_after_s = stale_after_s
        self._heard: float | None = None
        self._told: dict[str, str] = {}
        self._started = monotonic()
        self._provisional = False

    def offline_s(self, granted_s: float, now: datetime) -> float:
        """Return by how many seconds the lease of a workspace is prolonged at ``now`` under a grant of ``granted_s``."""
        return self.contact.offline_s(granted_s, now)

    async def lost(self) -> None:
        """Note that a question to the broker found nobody."""
        await asyncio.to_thread(self.contact.lost, self._clock.now())

    def doubt(self, offline_s: float = 0.0) -> str:
        """Return why the state as a whole cannot be relied on now, or an empty text.

        ``offline_s`` is what :meth:`offline_s` answered; while it is there, silence alone is no doubt.
        """
        if self.view is EMPTY:
            return "the broker has not told anything yet"
        silence = self._monotonic() - (self._started if self._heard is None else self._heard)
        if silence > self._stale_after_s and not offline_s:
            return f"the broker has not answered for {silence:.0f} s"
        return self._clock.doubt

    @property
    def after(self) -> int | None:
        """The sequence number after which a state is news; None when any is.

        That is so while what we have may be of other numbers or none, and while it is not on disk.
        """
        return None if self._provisional or self.view is EMPTY else self.view.seq

    def credential_headers(self) -> frozenset[str]:
        """Return every header name that a release of the current view may inject."""
        return self.view.credential_headers()

    async def restore(self, cache: Cache) -> None:
        """Start from what was saved (:meth:`_restore`)."""
        async with self._turn:
            await self._restore(cache)
            self.changed(self.view)

    async def succeed(self, cache: Cache | None) -> None:
        """Take over from a replica that saved ``cache`` last: what is written next is never older than what it knew."""
        async with self._turn:
            if cache is not None:
                known = self.view.floors
                floors = {name: max(known.get(name, 0), cache.floors.get(name, 0)) for name in {*known, *cache.floors}}
                if cache.state.seq > self.view.seq:
                    await self._restore(cache)
                self.view = msgspec.structs.replace(self.view, floors=floors)
            if self.view is EMPTY or self._state is None:
                return
            self.changed(self.view)
            try:
                await self._save()
            except OSError as error:  # the broker is asked for the state again, and that one is saved
                LOG.critical("the state cannot be saved: %s", error)
                self._provisional = True

    async def _save(self) -> None:
        if self._state is not None and self.keeps():
            view, now = self.view, self._clock.now()
            await asyncio.to_thread(self._file.save, self._state, view.graces, view.floors, now)

    async def _restore(self, cache: Cache) -> None:
        """Start from what was saved; leases in it end when they said, whether or not the broker answers again.

        It may have been saved when this perimeter served other numbers, so the broker's first answer counts even if nothing
        has changed there since.
        """
        workspaces = {entry.id: entry for entry in cache.state.workspaces}
        releases, refused = await asyncio.to_thread(verify_releases, cache.state, {}, self._root, self._clock.now())
        handed = await self._hand(cache.state, {})
        self._tell(refused)
        held = engagements(workspaces.values(), handed)
        self.view = View(cache.state.seq, workspaces, releases, cache.graces, cache.floors, handed, held)
        self._state = cache.state
        self._provisional = True

    async def take(self, state: PerimeterState) -> None:
        """Make ``state`` the current one: workspaces at once, new releases as soon as they are verified."""
        async with self._turn:
            await self._take(state)

    async def _take(self, state: PerimeterState) -> None:
        self._heard = self._monotonic()
        self._clock.confirm(state.now)
        self.contact.heard(self._clock.now())
        before = self.view
        known_seq = state.seq == self.after
        statements = {text for entry in state.workspaces for text in entry.delegations}
        if known_seq and state.releases.keys() <= before.releases.keys() and statements <= before.handed.keys():
            return
        now = self._clock.now()
        workspaces = {entry.id: entry for entry in state.workspaces}
        graces = next_graces(before.graces, state.workspaces, now)
        known = {digest: before.releases[digest] for digest in state.releases if digest in before.releases}
        floors = raise_floors(before.floors, workspaces, known)
        handed = {text: before.handed[text] for text in statements if text in before.handed}
        held = engagements(workspaces.values(), handed)
        self.view = view = View(state.seq, workspaces, known, graces, floors, handed, held)
        if len(handed) < len(statements):
            handed = await self._hand(state, handed)
            held = engagements(workspaces.values(), handed)
            self.view = view = msgspec.structs.replace(view, handed=handed, engagements=held)
        if len(known) < len(state.releases):
            releases, refused = await asyncio.to_thread(verify_releases, state, known, self._root, now)
            self._tell(refused)
            floors = raise_floors(floors, workspaces, releases)
            self.view = view = msgspec.structs.replace(view, releases=releases, floors=floors)
        # A state that the disk does not take is asked for again, so that no restart forgets a kill.
        self._provisional, self._state = True, state
        self.changed(view)
        await self._save()
        self._provisional = False

    async def _hand(self, state: PerimeterState, known: Mapping[str, Handed]) -> dict[str, Handed]:
        verified, refused = await asyncio.to_thread(
            verify_statements, state.workspaces, known, self._ca_pem, self._clock.now()
        )
        for statement, why in refused.items():
            LOG.error("the delegation whose statement ends in %s is refused: %s", statement, why)
        return verified

    def _tell(self, refused: Mapping[str, str]) -> None:
        for digest, why in refused.items():
            if self._told.get(digest) != why:
                LOG.error("release %s is refused: %s", digest, why)
        self._told = dict(refused)


def offline_granted(view: View, workspace_id: str, svid_digest: str) -> int:
    """Return the seconds without a broker that signed policy grants a workspace.

    Only the release that it is given now, and runs, counts: a grant that officers took back is no grant.
    """
    entry = view.workspaces.get(workspace_id)
    if entry is None or not svid_digest or not entry.policy_digest == entry.released_digest == svid_digest:
        return 0
    release = view.releases.get(svid_digest)
    return 0 if release is None else release.governance.lease.offline_ttl_s


def root_of(view: View, delegation: str) -> str:
    """Return the id of the delegation that the line of ``delegation`` began with: the engagement; empty stays empty."""
    records = {handed.record.id: handed.record for handed in view.handed.values()}
    found = delegation
    for _ in range(MAX_DEPTH):
        record = records.get(found)
        if record is None or not record.parent:
            break
        found = record.parent
    return found


def release_for(view: View, entry: WorkspaceEntry, svid_digest: str, now: datetime, grace_s: float) -> Release | str:
    """Return the release that judges a call of ``entry``, or why there is none.

    The digest attested in the SVID must be the digest loaded, and that the digest released: or the one released just
    before, for ``grace_s`` seconds. A text starts with the reason, a colon and a space.
    """
    if not entry.policy_digest or svid_digest != entry.policy_digest:
        return "digest_mismatch: the certificate attests another policy than the one reported as loaded"
    if entry.policy_digest != entry.released_digest:
        grace = view.graces.get(entry.id)
        in_grace = (
            grace is not None
            and grace.previous == entry.policy_digest
            and grace.current == entry.released_digest
            and (now - grace.since).total_seconds() <= grace_s
        )
        if not in_grace:
            return "not_released: the loaded policy is not the current release of this workspace's ring"
    release = view.releases.get(entry.policy_digest)
    if release is None:
        return "not_released: the release could not be verified against the trusted keys"
    if release.blueprint != entry.blueprint:
        return f"not_released: the release is for blueprint {release.blueprint}"
    if now >= release.not_after:
        return "not_released: the release's signature has expired"
    if entry.policy_digest == entry.released_digest and release.revision < view.floors.get(entry.id, 0):
        return "not_released: this workspace ran a newer revision before"
    return release
