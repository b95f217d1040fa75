"""The worker: claims jobs, has its executor run them, tells how they go, and stops what is not its own any more."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from saw.errors import SawError, UnavailableError
from saw.files import load_json, write_private
from saw.jobs.executor import Ended, Executor, Handle
from saw.jobs.messages import MAX_BEAT_EVENTS, Beat, BeatAnswer, ClaimAnswer, End, Event, JobError, Kind, Work

logger = logging.getLogger("saw.worker")

CLAIM_WAIT_S = 20
PATIENCE_S = 5.0
"""Between two tries to reach the broker, seconds."""
LOOK_S = 0.5
"""How often a run is looked at; what happened is told as often, and a sign of life six times in a lease."""
MAX_WAITING = 2000
"""Events that are kept while the broker is away, the newest."""
TRUST = 0.8
"""The part of a lease after which a worker that cannot reach the broker ends its run by itself."""
STOPPED = JobError("worker_stopped", "the worker was stopped, and the run with it", "saw job resume")
GONE = frozenset({"lease_lost", "wrong_claim", "unknown_job", "out_of_scope", "unknown_machine", "not_a_worker"})


class Client(Protocol):
    """The way to the broker."""

    def request(self, method: str, path: str, json: object | None = None) -> dict[str, Any]:
        """Call the broker; raise :class:`saw.errors.SawError` with its code, or :class:`UnavailableError`."""
        ...


class Held(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job that this worker has, as it is kept on disk until its end was told."""

    work: Work
    claim: str
    external_id: str = ""


class Worker:
    """Runs jobs until ``stop`` is set. ``connect`` makes a way to the broker for each thread; ``clock`` gives seconds."""

    def __init__(
        self,
        connect: Callable[[], Client],
        executor: Executor,
        state: Path,
        *,
        slots: int = 2,
        stop: threading.Event | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connect = connect
        self._executor = executor
        self._held = state / "held"
        self._slots = slots
        self._stop = stop or threading.Event()
        self._clock = clock
        self._idle = threading.Condition()
        self._busy = 0

    def run(self) -> None:
        """Take up what an earlier worker left, then claim and run jobs until it is stopped; runs are ended or left first."""
        self._held.mkdir(mode=0o700, parents=True, exist_ok=True)
        for file in sorted(self._held.glob("*.json")):
            self._begin(self._take_up, file)
        for number in range(self._slots + 1):
            kinds: tuple[Kind, ...] = ("kill",) if number == self._slots else ()
            # A lane that waits for a job is not waited for: whoever asks last is no longer there to be given one.
            threading.Thread(target=self._lane, args=(kinds,), daemon=True).start()
        self._stop.wait()
        with self._idle:
            self._idle.wait_for(lambda: self._busy == 0)

    def _begin(self, call: Callable[..., None], *given: Any) -> None:
        """Run ``call`` in a thread of its own, which is waited for."""

        def run() -> None:
            with self._working():
                call(*given)

        threading.Thread(target=run, daemon=True).start()

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        with self._idle:
            self._busy += 1
        try:
            yield
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _lane(self, kinds: tuple[Kind, ...]) -> None:
        client, claim = self._connect(), new_claim()
        while not self._stop.is_set():
            asked = {"claim": claim, "executor": self._executor.name, "kinds": kinds, "wait": CLAIM_WAIT_S}
            begun = self._clock()
            try:
                answer = client.request("POST", "/v1/worker/claim", asked)
                work = msgspec.convert(answer, ClaimAnswer).claimed
            except (SawError, msgspec.ValidationError) as error:
                logger.warning("no job was claimed: %s", error)
                self._stop.wait(PATIENCE_S)
                continue
            if work is not None:
                with self._working():
                    self._do(client, Held(work, claim), begun)
                claim = new_claim()

    def _do(self, client: Client, held: Held, begun: float) -> None:
        work = held.work
        logger.info("%s: %s %s, attempt %d", work.id, work.kind, work.workspace, work.attempt)
        if self._stop.is_set():
            self._tell_end(client, held, Ended("interrupted", STOPPED), begun)
            return
        self._keep(held)
        try:
            handle = self._executor.start(work)
        except SawError as error:
            words = JobError(error.code[:256], error.message[:4000], error.cure[:1000])
            self._tell_end(client, held, Ended("failed", words), begun)
            return
        self._follow(client, held, handle, begun)

    def _take_up(self, file: Path) -> None:
        """Go on with a run that an earlier worker started, or say that it was cut off."""
        client, begun = self._connect(), self._clock()
        try:
            held = load_json(file, Held)
            handle = self._executor.reattach(held.work, held.external_id)
        except SawError as error:
            logger.warning("%s is left alone: %s", file.name, error)
            return
        if handle is not None:
            logger.info("%s: going on with %s", held.work.id, held.external_id)
            self._follow(client, held, handle, begun)
            return
        words = JobError("worker_restarted", "the worker was restarted, and the run ended with it", "saw job resume")
        self._tell_end(client, held, Ended("interrupted", words), begun)

    def _follow(self, client: Client, held: Held, handle: Handle, begun: float) -> None:
        """Tell how the run goes until it ends; end it when somebody asks, or when it is not ours any more."""
        work, heard, last = held.work, begun, -1e9
        told_progress, waiting, asked, ended = None, list[Event](), False, None
        while True:
            ended = ended or handle.wait(LOOK_S)
            if handle.external_id != held.external_id:
                held = msgspec.structs.replace(held, external_id=handle.external_id)
                self._keep(held)
            progress, events = handle.progress()
            waiting = [*waiting, *events][-MAX_WAITING:]
            due = self._clock() - last >= work.lease_s / 6
            if due or waiting or progress != told_progress or ended is not None:
                last = sent = self._clock()
                try:
                    answer = self._beat(client, held, progress, waiting[:MAX_BEAT_EVENTS])
                except UnavailableError as error:
                    logger.warning("%s: %s", work.id, error)
                    self._stop.wait(LOOK_S)
                except SawError as error:
                    if error.code in GONE:
                        self._let_go(held, handle, f"{error}")
                        return
                    logger.warning("%s: %s", work.id, error)
                    self._stop.wait(LOOK_S)
                else:
                    heard, told_progress, waiting = sent, progress, waiting[MAX_BEAT_EVENTS:]
                    if answer.cancel and not asked:
                        handle.cancel()
                        asked = True
            if ended is not None and not waiting:
                self._tell_end(client, held, ended, heard)
                return
            if self._clock() - heard > work.lease_s * TRUST:
                self._let_go(held, handle, "the broker was not reached in time")
                return
            if self._stop.is_set() and self._stopped(client, held, handle, heard):
                return

    def _stopped(self, client: Client, held: Held, handle: Handle, heard: float) -> bool:
        """The worker stops: a run that survives it is left to the next one, another is ended."""
        if self._executor.survives:
            handle.leave()
            logger.info("%s: goes on without this worker", held.work.id)
            return True
        self._end_run(handle)
        self._tell_end(client, held, Ended("interrupted", STOPPED), heard)
        return True

    def _let_go(self, held: Held, handle: Handle, why: str) -> None:
        """The run does not count any more: nothing of it may go on beside another one."""
        logger.error("%s: %s; the run is given up", held.work.id, why)
        if self._executor.survives:
            handle.leave()
        else:
            self._end_run(handle)
        self._file(held).unlink(missing_ok=True)

    @staticmethod
    def _end_run(handle: Handle) -> None:
        handle.cancel()
        while handle.wait(1.0) is None:
            continue

    def _beat(self, client: Client, held: Held, progress: Any, events: list[Event]) -> BeatAnswer:
        body = Beat(claim=held.claim, progress=progress, events=tuple(events), external_id=held.external_id or None)
        answer = client.request("POST", f"/v1/worker/jobs/{held.work.id}/beat", msgspec.to_builtins(body))
        return msgspec.convert(answer, BeatAnswer)

    def _tell_end(self, client: Client, held: Held, ended: Ended, heard: float) -> None:
        """Tell how it ended, again and again within the lease; after that the broker says that it was interrupted."""
        body = msgspec.to_builtins(End(claim=held.claim, outcome=ended.outcome, error=ended.error))
        while True:
            try:
                client.request("POST", f"/v1/worker/jobs/{held.work.id}/end", body)
                logger.info("%s: %s", held.work.id, ended.outcome)
                break
            except UnavailableError as error:
                logger.warning("%s: %s", held.work.id, error)
                if self._clock() - heard > held.work.lease_s:
                    break
                time.sleep(1.0)
            except SawError as error:
                logger.warning("%s: its end was refused: %s", held.work.id, error)
                break
        self._file(held).unlink(missing_ok=True)

    def _keep(self, held: Held) -> None:
        write_private(self._file(held), msgspec.json.encode(held))

    def _file(self, held: Held) -> Path:
        return self._held / f"{held.work.id}.json"


def new_claim() -> str:
    """Return a fresh secret (256 bits) under which a job is claimed."""
    return secrets.token_urlsafe(32)
