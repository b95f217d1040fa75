"""Runs rollouts: takes in what workspaces say, judges it against the limits, halts, rolls back, resumes.

Every change is one transaction with its audit row, so a killed broker goes on where it stood. A rollback is due from the
transaction that halts; publishing it is repeated at each start and tick until it is done or refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Row, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import BrokerError, ConflictError, NotFoundError
from saw.broker.releases import Releases
from saw.broker.repository import Repository
from saw.broker.rollout import (
    FINAL,
    Course,
    Word,
    find_rollout,
    live_workspaces,
    newest_rollouts,
    of_rollout,
    offer,
    this,
)
from saw.broker.rollout_audit import RolloutAudit
from saw.broker.rollout_calls import calls_under, forget_calls
from saw.broker.rollout_escrow import (
    check_escrow,
    command_for,
    decode_escrow,
    is_root,
    keep,
    kept,
    kept_targets,
    settle,
    unpack,
)
from saw.broker.rollout_limits import count, crossed
from saw.broker.schema import policy_states, rollout_members, rollouts, workspaces
from saw.broker.store import Transaction
from saw.errors import SawError
from saw.policy.tuf_compared import NotCompared

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
BlueprintName = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?\Z")]

logger = logging.getLogger("saw.broker")


class Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An operator's halt or resume: of the newest release of a ring (and of one blueprint where it has several).

    ``roll_back`` asks a halt to publish the rollback in escrow as well.
    """

    reason: Text
    blueprint: BlueprintName = ""
    roll_back: bool = False


class Deposit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rollback publication, complete with the officers' signatures: file name or path → base64 of its bytes."""

    metadata: Annotated[dict[str, str], msgspec.Meta(min_length=1, max_length=64)]
    targets: Annotated[dict[str, str], msgspec.Meta(min_length=1, max_length=1)]
    blueprint: BlueprintName = ""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """One report of a workspace about a release; ``verified`` when it came under the workspace's identity."""

    policy_digest: str
    revision: int
    state: str
    reason: str
    verified: bool


class Rollouts:
    """The rollouts of all rings."""

    def __init__(self, services: Services, repository: Repository, releases: Releases) -> None:
        self._s = services
        self._repository = repository
        self._releases = releases
        self._audit = RolloutAudit(services)
        self._acting = threading.Lock()

    # ------------------------------------------------------------ what workspaces and perimeters tell

    def hear(self, tx: Transaction, workspace: Row[Any], said: Said) -> None:
        """Take in a report, inside its transaction: history, the workspace's last word, and what follows from it.

        Unverified reports are history only: anybody can send them. ``loaded`` counts when the digest is the attested one.
        """
        now = self._s.clock()
        where = (
            (rollouts.c.ring == workspace.ring)
            & (rollouts.c.blueprint == workspace.blueprint)
            & (rollouts.c.policy_digest == said.policy_digest)
        )
        rollout = tx.connection.execute(select(rollouts).where(where)).one_or_none()
        self._remember(tx, workspace, said, rollout.revision if rollout is not None else said.revision, now)
        if rollout is None or not said.verified:
            return
        if said.state == Word.LOADED and workspace.policy_digest != said.policy_digest:
            self._audit.finding(
                tx,
                rollout,
                "loaded_not_attested",
                f"{workspace.id} reports a policy as loaded that it was not attested with",
                workspace=workspace.id,
            )
            return
        mine = of_rollout(rollout) & (rollout_members.c.workspace_id == workspace.id)
        known = tx.connection.execute(select(rollout_members).where(mine)).one_or_none()
        if known is None:
            if said.state != Word.LOADED and rollout.state not in {Course.RUNNING, Course.COMPLETE}:
                return
            offer(tx, rollout, [workspace.id], now)
        elif known.state == Word.LOADED or (known.state == said.state and known.reason == said.reason):
            return
        tx.connection.execute(
            rollout_members.update()
            .where(mine)
            .values(state=said.state, reason=said.reason, said_at=iso(now), silent=False)
        )
        self._judge(tx, rollout, now)

    def counted(self, tx: Transaction, digests: frozenset[str]) -> None:
        """Judge the rollouts of policies for which further calls were counted, inside the shipment's transaction."""
        if digests:
            for rollout in newest_rollouts(tx.connection):
                if rollout.policy_digest in digests:
                    self._judge(tx, rollout, self._s.clock())

    def tick(self) -> None:
        """Judge every newest rollout by the time that has passed, look after the escrow, and act."""
        with self._s.store.read() as connection:
            found = kept_targets(connection)
        for targets in found:
            with suppress(SawError):
                self._repository.compare(targets)
        with self._s.store.write() as tx:
            for rollout in newest_rollouts(tx.connection):
                self._judge(tx, rollout, self._s.clock())
                self._check_kept(tx, rollout)
        self.act()

    # ------------------------------------------------------------ what operators order

    def halt(self, caller: Caller, ring: str, order: Order) -> int:
        """Stop offering the newest release of ``ring``; return its revision. Halting twice changes nothing."""
        with self._s.store.write() as tx:
            rollout = self._newest(tx, ring, order.blueprint)
            if rollout.state != Course.HALTED:
                self._halt(tx, rollout, (order.reason,), caller, roll_back=order.roll_back)
        self.act()
        return int(rollout.revision)

    def resume(self, caller: Caller, ring: str, order: Order) -> int:
        """Offer a halted release again; refusals, silence and counted calls from before are forgiven."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            rollout = self._newest(tx, ring, order.blueprint)
            if rollout.state == Course.RUNNING:
                return int(rollout.revision)
            if rollout.state != Course.HALTED:
                raise ConflictError(
                    f"revision {rollout.revision} of {ring}/{rollout.blueprint} is {rollout.state}, not halted",
                    cure="see saw policy watch",
                    code="not_halted",
                )
            self._move(tx, rollout, Course.RUNNING, order.reason, caller, rollback_due=False, warned="")
            tx.connection.execute(
                rollout_members.update()
                .where(of_rollout(rollout) & (rollout_members.c.state != Word.LOADED))
                .values(state=Word.WAITING, reason="", offered_at=iso(now), said_at=iso(now), silent=False)
            )
            forget_calls(tx, ring, rollout.policy_digest)
            self._audit.record(tx, rollout, caller, "start", f"rollout resumed: {order.reason}")
            tx.touch(*self._concerned(tx, rollout))
            self._judge(tx, self._again(tx, rollout), now)
        return int(rollout.revision)

    def deposit(self, caller: Caller, ring: str, body: Deposit) -> bool:
        """Take a rollback into escrow for the newest release of ``ring``; return whether anything changed."""
        now = self._s.clock()
        escrow = decode_escrow(body.metadata, body.targets)
        self._repository.compare(escrow.targets)
        with self._s.store.write() as tx:
            rollout = self._newest(tx, ring, body.blueprint)
            if rollout.state == Course.HALTED:
                raise ConflictError(
                    f"revision {rollout.revision} of {ring}/{rollout.blueprint} is halted already",
                    cure="publish the rollback at once: saw policy publish",
                    code="halted",
                )
            found = check_escrow(tx.connection, self._repository, self._s.config.tuf_dir, escrow, rollout, now=now)
            changed = keep(tx, rollout, escrow, found, by=caller.principal, now=now)
            if changed:
                text = f"rollback to revision {found.returns_to} taken into escrow"
                self._audit.record(tx, rollout, caller, "update", text)
            if rollout.state == Course.WAITING:
                wave = self._s.config.rollout.first_wave
                self._move(tx, rollout, Course.RUNNING, "", caller, everyone=wave == 0)
                ready = [row.id for row in live_workspaces(tx.connection, rollout.ring, rollout.blueprint)]
                offer(tx, rollout, ready[:wave] if wave else ready, now)
                tx.touch(*self._concerned(tx, rollout))
        return changed

    # ------------------------------------------------------------ rollback

    def act(self) -> None:
        """Publish the rollbacks that are due; called outside any transaction, as often as one likes."""
        with self._acting:
            due = (rollouts.c.state == Course.HALTED) & rollouts.c.rollback_due
            with self._s.store.read() as connection:
                found = [(row, kept(connection, row)) for row in connection.execute(select(rollouts).where(due))]
            for rollout, rollback in found:
                self._roll_back(rollout, rollback)

    def _roll_back(self, rollout: Row[Any], rollback: Row[Any] | None) -> None:
        if rollback is None or rollback.state != "kept":
            return
        escrow = unpack(rollback)
        now = self._s.clock()
        metadata = {name: raw for name, raw in escrow.metadata.items() if not is_root(name)}
        try:
            self._repository.accept(metadata, escrow.targets, now)
        except SawError as error:
            self._releases.synchronise()
            with self._s.store.write() as tx:
                # What an earlier attempt published before it was killed is recorded by now.
                if (newest := find_rollout(tx.connection, rollout.ring, rollout.blueprint)) is not None and (
                    newest.policy_digest == rollback.policy_digest
                ):
                    return
                settle(tx, rollout, "failed", error.message)
                tx.connection.execute(rollouts.update().where(this(rollout)).values(rollback_due=False))
                text = f"the rollback in escrow was refused: {error.message}"
                self._audit.finding(
                    tx, rollout, "rollback_failed", text, severity="critical", cure=command_for(rollout)
                )
            return
        logger.warning("ring %s: revision %d is rolled back", rollout.ring, rollout.revision)
        self._releases.synchronise(BROKER)

    def _check_kept(self, tx: Transaction, rollout: Row[Any]) -> None:
        """Say at once when another publication made a rollback in escrow useless."""
        rollback = kept(tx.connection, rollout)
        if rollback is None or rollback.state != "kept" or rollout.rollback_due:
            return
        try:
            now, directory = self._s.clock(), self._s.config.tuf_dir
            check_escrow(tx.connection, self._repository, directory, unpack(rollback), rollout, now=now)
        except NotCompared:
            return  # somebody published a moment ago; the next tick compares with that
        except SawError as error:
            settle(tx, rollout, "stale", error.message)
            text = f"the rollback in escrow can no longer be published: {error.message}"
            self._audit.finding(tx, rollout, "rollback_stale", text, cure=command_for(rollout) + " --prepare-only")

    # ------------------------------------------------------------ judgement

    def _judge(self, tx: Transaction, rollout: Row[Any], now: datetime) -> None:
        """Offer on, mark who is silent, and halt or complete what has come to that."""
        newest = find_rollout(tx.connection, rollout.ring, rollout.blueprint)
        if newest is None or newest.revision != rollout.revision:
            return
        rollout = newest
        if rollout.state not in {Course.RUNNING, Course.COMPLETE}:
            return
        limits = self._s.config.rollout
        live = live_workspaces(tx.connection, rollout.ring, rollout.blueprint)
        everyone = self._offer_on(tx, rollout, live, now)
        members = list(tx.connection.execute(select(rollout_members).where(of_rollout(rollout))))
        running = {row.id: row for row in live}
        words: list[tuple[str, bool]] = []
        for member in members:
            silent = self._is_silent(member, running.get(member.workspace_id), now)
            if silent and not member.silent:
                self._tell_silent(tx, rollout, member)
            if member.state in FINAL or member.workspace_id in running:
                words.append((member.state, silent))
        counts = count(words)
        calls = calls_under(tx.connection, rollout.ring, rollout.policy_digest)
        before = calls_under(tx.connection, rollout.ring, rollout.previous_digest)
        reasons = crossed(limits, counts, calls, before)
        if reasons:
            self._over_the_limit(tx, rollout, reasons)
            return
        last = max([rollout.opened_at, rollout.state_since, *(member.said_at for member in members)])
        soaked = now - parse_iso(last) >= timedelta(seconds=limits.soak_s)
        if rollout.state == Course.RUNNING and everyone and not counts.open and not counts.refused and soaked:
            self._move(tx, rollout, Course.COMPLETE, "everyone loaded it", BROKER)
            self._audit.record(tx, rollout, BROKER, "enable", "rollout complete: everyone loaded it")

    def _over_the_limit(self, tx: Transaction, rollout: Row[Any], reasons: tuple[str, ...]) -> None:
        """Halt, or where there is nothing to go back to, or going back itself meets trouble, say so once."""
        if rollout.state == Course.RUNNING and rollout.previous_revision is not None and rollout.returns_to is None:
            self._halt(tx, rollout, reasons, BROKER, roll_back=True)
            return
        text = "; ".join(reason.partition(":")[0] for reason in reasons)
        if rollout.warned != text:
            tx.connection.execute(rollouts.update().where(this(rollout)).values(warned=text))
            self._audit.finding(tx, rollout, "rollout_limit", f"over the limit, not halted: {'; '.join(reasons)}")

    def _offer_on(self, tx: Transaction, rollout: Row[Any], live: list[Row[Any]], now: datetime) -> bool:
        """Offer the release to who is next; return whether everyone is offered it."""
        query = select(rollout_members.c.workspace_id, rollout_members.c.state).where(of_rollout(rollout))
        words = {row.workspace_id: row.state for row in tx.connection.execute(query)}
        left = [row.id for row in live if row.id not in words]
        if rollout.everyone:
            offer(tx, rollout, left, now)
            return True
        if any(words.get(row.id, Word.LOADED) != Word.LOADED for row in live):
            return False
        size = max(1, self._s.config.rollout.first_wave, len(words))
        offer(tx, rollout, left[:size], now)
        if len(left) <= size:
            tx.connection.execute(rollouts.update().where(this(rollout)).values(everyone=True))
            tx.touch(*self._concerned(tx, rollout))
            return True
        return False

    def _is_silent(self, member: Row[Any], workspace: Row[Any] | None, now: datetime) -> bool:
        """Tell whether an attested workspace left the release without an end for too long."""
        if member.state in FINAL or workspace is None:
            return False
        since = max(member.said_at, workspace.state_since)
        return now - parse_iso(since) > timedelta(seconds=self._s.config.rollout.max_silent_s)

    def _tell_silent(self, tx: Transaction, rollout: Row[Any], member: Row[Any]) -> None:
        mine = of_rollout(rollout) & (rollout_members.c.workspace_id == member.workspace_id)
        tx.connection.execute(rollout_members.update().where(mine).values(silent=True))
        text = f"{member.workspace_id} was offered revision {rollout.revision} and is silent since {member.said_at}"
        self._audit.finding(tx, rollout, "policy_silent", text, workspace=member.workspace_id)

    # ------------------------------------------------------------ changes of state

    def _halt(
        self, tx: Transaction, rollout: Row[Any], reasons: tuple[str, ...], caller: Caller, *, roll_back: bool
    ) -> None:
        rollback = kept(tx.connection, rollout)
        due = roll_back and rollback is not None and rollback.state == "kept"
        self._move(tx, rollout, Course.HALTED, "; ".join(reasons), caller, rollback_due=due)
        self._audit.record(tx, rollout, caller, "stop", f"rollout halted: {'; '.join(reasons)}", outcome="failure")
        what = (
            "the rollback in escrow is published" if due else "workspaces that have not loaded it keep the one before"
        )
        self._audit.finding(
            tx,
            rollout,
            "rollout_halted",
            f"Revision {rollout.revision} of {rollout.ring}/{rollout.blueprint} is halted; {what}",
            severity="critical",
            cure="" if due else command_for(rollout),
            reasons=reasons,
        )
        tx.touch(*self._concerned(tx, rollout))
        logger.error("ring %s: revision %d is halted: %s", rollout.ring, rollout.revision, "; ".join(reasons))

    def _move(
        self, tx: Transaction, rollout: Row[Any], state: Course, reason: str, caller: Caller, **further: Any
    ) -> None:
        values = {"state": state, "reason": reason, "state_by": caller.principal, "state_since": iso(self._s.clock())}
        tx.connection.execute(rollouts.update().where(this(rollout)).values(**values, **further))

    def _remember(self, tx: Transaction, workspace: Row[Any], said: Said, revision: int, now: datetime) -> None:
        """Add a report to the history, unless it only repeats the newest entry of this workspace."""
        query = select(policy_states).where(policy_states.c.workspace_id == workspace.id)
        last = tx.connection.execute(query.order_by(policy_states.c.id.desc()).limit(1)).one_or_none()
        entry = (said.policy_digest, said.state, said.reason, said.verified)
        if last is not None and (last.policy_digest, last.state, last.reason, last.verified) == entry:
            return
        tx.connection.execute(
            policy_states.insert().values(
                workspace_id=workspace.id,
                policy_digest=said.policy_digest,
                revision=revision,
                state=said.state,
                reason=said.reason,
                verified=said.verified,
                at=iso(now),
            )
        )

    def _newest(self, tx: Transaction, ring: str, blueprint: str) -> Row[Any]:
        found = [row for row in newest_rollouts(tx.connection) if row.ring == ring and blueprint in {"", row.blueprint}]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(row.blueprint for row in found)
            raise BrokerError(f"ring {ring} has several blueprints: {names}", cure="name one", code="ambiguous")
        raise NotFoundError(
            f"nothing rolls out to ring {ring[:64]!r}", cure="see saw policy rings", code="unknown_rollout"
        )

    @staticmethod
    def _again(tx: Transaction, rollout: Row[Any]) -> Row[Any]:
        return tx.connection.execute(select(rollouts).where(this(rollout))).one()

    @staticmethod
    def _concerned(tx: Transaction, rollout: Row[Any]) -> Iterable[str]:
        where = (workspaces.c.ring == rollout.ring) & (workspaces.c.blueprint == rollout.blueprint)
        return list(tx.connection.execute(select(workspaces.c.id).where(where)).scalars())
