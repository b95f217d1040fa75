"""The policy agent: keeps the workspace on the policy that its ring released, and proves which one that is.

It goes round one loop: look whether the generation in force is untouched, ask which release it is given, fetch through TUF,
verify the bundle, bring it into force, acknowledge. Whatever fails keeps the generation in force and is reported with its
reason. Of each release that is offered the broker hears ``offered``, ``verified``, and ``loaded`` or ``refused``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec

from saw.errors import SawError
from saw.files import write_atomic, write_private
from saw.policy.bundle import VerifiedBundle, verify_bundle
from saw.policy.errors import BundleRefused, RepositoryError
from saw.policy.tuf_client import fetch_target, kept_root, refresh
from saw.policy.tuf_repository import trusted_policy_keys
from saw.runtime import generation
from saw.runtime.generation import Content
from saw.runtime.policyd_activate import ActivationRefused, Activator, ensure_secret_file
from saw.runtime.policyd_broker import Offer, PolicyBroker
from saw.runtime.policyd_bundle import content_of, digest_of, revision_of
from saw.runtime.policyd_calls import CallReports
from saw.runtime.policyd_config import PolicydConfig, Workspace
from saw.runtime.policyd_decisions import DecisionReports, Journal
from saw.runtime.policyd_floor import FloorError, RevisionFloor
from saw.runtime.policyd_tools import ToolFile
from saw.runtime.policyd_usage import UsageReports

_LONGEST_BACKOFF = 300.0
_MOST_OWED = 32
"""Most findings that wait for the broker."""


class State(msgspec.Struct, frozen=True, kw_only=True):
    """``/run/saw/policy/state.json``: what is in force and, when the newest offer was refused, why."""

    state: str
    policy_digest: str = ""
    revision: int = 0
    reason: str = ""
    detail: str = ""


class Refusal(SawError):
    """A policy that was offered may not load; ``reason`` is stable and machine-readable."""

    code = "policy_refused"

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Candidate(msgspec.Struct, frozen=True):
    """A bundle as it was fetched, not verified yet, and the digest that was stated for it (empty: none was)."""

    raw: bytes
    digest: str


class Unreachable(SawError):
    """The broker does not answer; nothing can be said about newer policies."""

    code = "broker_unreachable"


class Policyd:
    """One workspace's policy agent; :meth:`cycle` goes round once."""

    def __init__(
        self,
        config: PolicydConfig,
        workspace: Workspace,
        broker: PolicyBroker,
        activator: Activator,
        floor: RevisionFloor,
        *,
        now: Callable[[], datetime],
        boottime: Callable[[], float],
        log: Callable[[str], None],
    ) -> None:
        self._config = config
        self._workspace = workspace
        self._broker = broker
        self._activator = activator
        self._floor = floor
        self._now = now
        self._boottime = boottime
        self._log = log
        self._stop = threading.Event()
        self._went_round = boottime()
        self._sequence = 0
        self._reported: set[tuple[str, ...]] = set()
        self._owed: dict[tuple[str, str, str, str], str] = {}
        self._failed: dict[str, tuple[int, float]] = {}
        self._tried = ""
        self._calls = CallReports(config.decide_socket, broker.report_calls, boottime, config.calls_s)
        place = config.state / "decisions.json"
        journal = Journal(config.journal_dir)
        self._tools = ToolFile(config, broker, log)
        self._tools.restore()
        self._decisions = DecisionReports(journal, broker.report_decisions, place, boottime, config.decisions_s)
        self._usage = UsageReports(broker.report_usage, boottime, config.usage_s)

    @property
    def last_good(self) -> Path:
        """The bundle that was last in force."""
        return self._config.state / "last-good.bundle.json"

    def stop(self) -> None:
        """Ask :meth:`run` to end."""
        self._stop.set()

    def close(self) -> None:
        """Close the connections to the broker."""
        self._broker.close()

    def run(self) -> None:
        """Go round until stopped, woken by the broker or every ``poll_s`` seconds."""
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        while not self._stop.is_set():
            self.cycle()
            self.report_calls()
            self.report_decisions()
            self.report_usage()
            self._wait()

    def cycle(self) -> None:
        """Go round once. Decisions are reported, not raised."""
        self._went_round = self._boottime()
        self._watch_files()
        try:
            offer = self._offer()
        except Unreachable as error:
            self._log(f"broker unreachable: {error.message}")
            self._use_last_good()
            return
        self._tools.look(offer.seq)
        self._deliver_owed()
        active = self._activator.active
        digest, revision = offer.policy_digest or "", offer.revision or 0
        if active is not None and digest == active.digest:
            digest, revision = "", 0  # what goes wrong now says nothing about the release in force
        try:
            candidate = self._fetch(offer)
            if candidate is None:
                self._keep()
                return
            if not digest and (active is None or candidate.digest != active.digest):
                digest = candidate.digest
            if digest:
                self._report("policy_state", "offered", "", policy_digest=digest, revision=revision)
            verified = self._verify(candidate.raw)
            if candidate.digest and candidate.digest != verified.digest:
                raise Refusal("member_mismatch", "the released digest is not the digest of the bundle")
        except Refusal as refusal:
            self._refuse(refusal.reason, refusal.message, digest, revision)
            return
        except Unreachable as error:
            self._log(f"broker unreachable: {error.message}")
            self._use_last_good()
            return
        if digest:
            self._report("policy_state", "verified", "", policy_digest=verified.digest, revision=verified.revision)
        self._bring_into_force(candidate.raw, verified)

    def report_calls(self) -> None:
        """Tell the broker which calls ring 1 denied under the policy in force, at most every ``calls_s`` seconds."""
        active = self._activator.active
        if active is not None:
            try:
                self._calls.report(active.digest)
            except SawError as error:
                self._log(f"denied calls not reported: {error.message}")

    def report_decisions(self) -> None:
        """Tell the broker what was decided in this workspace, at most every ``decisions_s`` seconds."""
        try:
            self._decisions.report()
        except (SawError, OSError) as error:
            self._log(f"decisions not reported: {error}")

    def report_usage(self) -> None:
        """Tell the broker what the agent used of this workspace, at most every ``usage_s`` seconds."""
        try:
            self._usage.report()
        except (SawError, OSError) as error:
            self._log(f"usage not reported: {error}")

    def beat(self) -> None:
        """Write the heartbeat, unless the loop itself stands still."""
        now = self._boottime()
        if now - self._went_round <= self._config.stall_s:
            write_atomic(self._config.run / "policy" / "heartbeat", msgspec.json.encode({"boottime": now}))

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                self.beat()
            except OSError as error:
                self._log(f"heartbeat not written: {error}")
            self._stop.wait(self._config.heartbeat_s)

    def _wait(self) -> None:
        started = time.monotonic()
        # Until it has attested a workspace is told of no tools, and its agent has none until it is told. What was not told
        # may be a revocation.
        poll_s = self._config.poll_s if self._tools.known else min(self._config.poll_s, 2.0)
        try:
            sequence = self._broker.watch(self._sequence, poll_s)
        except SawError:
            self._stop.wait(min(self._config.poll_s, 2.0))
            return
        if sequence == self._sequence:
            self._stop.wait(max(0.0, poll_s - (time.monotonic() - started)))
        self._sequence = sequence

    def _watch_files(self) -> None:
        ensure_secret_file(self._config)
        changed = self._activator.tampered()
        if changed:
            names = ", ".join(changed)
            self._report("finding", "refused", "generation_tampered", f"changed in the workspace: {names}")
            self._forget_reports("finding")
            self._log(f"the generation in force was changed and is restored: {names}")
            try:
                self._activator.restore()
            except ActivationRefused as refusal:
                self._refuse(refusal.reason, refusal.message)

    def _offer(self) -> Offer:
        try:
            return self._broker.offer()
        except SawError as error:
            raise Unreachable(error.message) from error

    def _fetch(self, offer: Offer) -> Candidate | None:
        """Return the release that this workspace is given, the newest one vouched for by TUF; None when that is none.

        The broker may hold this workspace on an earlier release than the ring's newest. That one is the policy in force,
        or its copy, or is fetched and must then be signed, within its window, above the floor, and older than the newest.
        """
        raw, custom = self._released()
        stated = str(custom.get("policy_digest") or "")
        given = offer.policy_digest
        if given is None:
            return None
        if given in {"", stated}:
            return Candidate(raw, stated)
        active = self._activator.active
        if active is not None and given == active.digest:
            return None
        if self.last_good.exists() and digest_of(self.last_good.read_bytes()) == given:
            return Candidate(self.last_good.read_bytes(), given)
        earlier = self._earlier()
        newest = custom.get("revision")
        if not isinstance(newest, int) or revision_of(earlier) >= newest or digest_of(earlier) != given:
            raise Refusal("not_released", f"the broker gives {given[:16]}…, which is no earlier release of this ring")
        return Candidate(earlier, given)

    def _earlier(self) -> bytes:
        try:
            return self._broker.given_bundle()
        except SawError as error:
            raise Unreachable(error.message) from error

    def _keep(self) -> None:
        """Stay with what is in force while a newer release is held back, and attest it again if something else was tried."""
        active = self._activator.active
        if active is None:
            self._write_state(
                State(state="refused", reason="not_released", detail="no release is given to this workspace")
            )
            return
        self._reported = {mark for mark in self._reported if mark[0] != "policy_state" or mark[3] == active.digest}
        if self._tried and self._tried != active.digest:
            try:
                self._activator.reassert()
            except ActivationRefused as refusal:
                self._refuse(refusal.reason, refusal.message)
                return
            self._tried = ""
        self._failed.clear()
        self._write_state(State(state="loaded", policy_digest=active.digest, revision=active.revision))
        self._report("policy_state", "loaded", "", policy_digest=active.digest, revision=active.revision)

    def _released(self) -> tuple[bytes, dict[str, object]]:
        """Return the bundle that the ring's newest release is, verified by TUF, and what was stated with it."""
        metadata, targets = self._config.state / "tuf" / "metadata", self._config.state / "tuf" / "targets"
        root = msgspec.json.encode(self._workspace.tuf_root)
        try:
            updater = refresh(metadata, targets, self._broker.tuf_url, root, self._broker.fetcher)
            return fetch_target(updater, self._workspace.target)
        except RepositoryError as error:
            if error.code == "unreachable":
                raise Unreachable(error.message) from error
            raise Refusal(error.code, error.message) from error
        except OSError as error:
            raise Refusal("state_not_kept", f"the TUF metadata cannot be kept: {error}") from error

    def _verify(self, raw: bytes) -> VerifiedBundle:
        root = msgspec.json.encode(self._workspace.tuf_root)
        try:
            keys, threshold = trusted_policy_keys(kept_root(self._config.state / "tuf" / "metadata", root))
            verified = verify_bundle(raw, keys, threshold, self._now(), min_revision=self._floor.get())
            self._floor.check(verified.revision)
        except (BundleRefused, FloorError, RepositoryError) as error:
            raise Refusal(error.code, error.message) from error
        if verified.blueprint != self._workspace.blueprint:
            raise Refusal(
                "wrong_blueprint",
                f"the bundle is for blueprint {verified.blueprint}, this workspace for {self._workspace.blueprint}",
            )
        return verified

    def _use_last_good(self) -> None:
        """Without a broker, take up the last policy again if it still verifies; without a lease it allows nothing."""
        if self._activator.active is not None or not self.last_good.exists():
            return
        raw = self.last_good.read_bytes()
        try:
            verified = self._verify(raw)
        except Refusal as refusal:
            self._refuse(refusal.reason, f"last-known-good: {refusal.message}")
            return
        self._bring_into_force(raw, verified)

    def _bring_into_force(self, raw: bytes, verified: VerifiedBundle) -> None:
        content = content_of(verified)
        active = self._activator.active
        try:
            if active is None or active.digest != content.digest:
                if not self._may_try(content.digest):
                    return
                self._activate(content)
            self._floor.raise_to(content.revision)
            if not self.last_good.exists() or self.last_good.read_bytes() != raw:
                write_private(self.last_good, raw)
        except ActivationRefused as refusal:
            self._note_failure(content.digest)
            self._refuse(refusal.reason, refusal.message, content.digest, content.revision)
            return
        except (FloorError, OSError) as error:
            self._refuse("state_not_kept", str(error), content.digest, content.revision)
            return
        self._failed.clear()
        self._tried = ""
        self._write_state(State(state="loaded", policy_digest=content.digest, revision=content.revision))
        self._forget_reports("policy_state", keep=("policy_state", "loaded", "", content.digest))
        self._report("policy_state", "loaded", "", policy_digest=content.digest, revision=content.revision)

    def _activate(self, content: Content) -> None:
        self._tried = content.digest
        if generation.current(self._config.generations) != content.digest:
            self._activator.activate(content)
        elif not self._activator.adopt(content):
            self._report("finding", "refused", "generation_tampered", "changed while the policy agent was away")
        self._log(f"policy {content.digest} revision {content.revision} is in force")

    def _may_try(self, digest: str) -> bool:
        """Space out repeated attempts: each may extend the policy PCR."""
        count, at = self._failed.get(digest, (0, 0.0))
        pause = min(_LONGEST_BACKOFF, 2.0 ** min(count, 9)) if count else 0.0
        return self._boottime() - at >= pause

    def _note_failure(self, digest: str) -> None:
        self._failed = {digest: (self._failed.get(digest, (0, 0.0))[0] + 1, self._boottime())}

    def _refuse(self, reason: str, detail: str, digest: str = "", revision: int = 0) -> None:
        active = self._activator.active
        self._write_state(
            State(
                state="refused",
                policy_digest=active.digest if active else "",
                revision=active.revision if active else 0,
                reason=reason,
                detail=detail,
            )
        )
        self._log(f"refused ({reason}): {detail}")
        self._report("policy_state", "refused", reason, detail, policy_digest=digest, revision=revision)
        self._report("finding", "refused", reason, detail, policy_digest=digest, revision=revision)

    def _report(
        self, kind: str, state: str, reason: str, detail: str = "", *, policy_digest: str = "", revision: int = 0
    ) -> None:
        """Report once; what could not be delivered is tried again when it is reported the next time round."""
        mark = (kind, state, reason, policy_digest)
        if mark in self._reported:
            return
        try:
            self._broker.report(
                kind, state, reason=reason, detail=detail, policy_digest=policy_digest, revision=revision
            )
        except SawError as error:
            self._log(f"report not delivered: {error.message}")
            if kind == "finding" and len(self._owed) < _MOST_OWED:
                self._owed[mark] = detail
        else:
            self._reported.add(mark)
            self._owed.pop(mark, None)

    def _deliver_owed(self) -> None:
        """Tell the findings that could not be told while the broker was away."""
        for (kind, state, reason, digest), detail in list(self._owed.items()):
            self._owed.pop((kind, state, reason, digest))
            self._report(kind, state, reason, detail, policy_digest=digest)
            self._forget_reports("finding")

    def _forget_reports(self, kind: str, keep: tuple[str, ...] = ()) -> None:
        self._reported = {mark for mark in self._reported if mark == keep or (kind == "finding") != (mark[0] == kind)}

    def _write_state(self, state: State) -> None:
        """Say in the workspace how things are. Without room for it that is logged, and told the broker as ever."""
        raw = msgspec.json.encode(state)
        path = self._config.run / "policy" / "state.json"
        try:
            if not path.exists() or path.read_bytes() != raw:
                write_atomic(path, raw)
        except OSError as error:
            self._log(f"state not written: {error}")
