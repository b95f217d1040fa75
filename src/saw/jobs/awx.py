"""The second executor: AWX runs the playbook, and this follows its job. Nothing is launched twice for one attempt.

AWX's job carries our job's id as the variable ``saw_job``. Before a launch it is looked for, and a launch whose answer was
lost is looked for and never sent again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta

from saw.errors import SawError, UnavailableError
from saw.jobs.awx_api import AwxApi, AwxJob, AwxRefused, Uncertain
from saw.jobs.config import AwxSettings
from saw.jobs.executor import Ended, Gathered
from saw.jobs.messages import Event, JobError, Progress, Work, variables_of
from saw.jobs.redact import redact

JOB_VARIABLE, ATTEMPT_VARIABLE = "saw_job", "saw_job_attempt"
GOES_ON = frozenset({"new", "pending", "waiting", "running"})
CLOCKS_DIFFER = timedelta(hours=1)
"""How much earlier than our question AWX may think that its job was made."""
LOOKS_AFTER_LOSS = 5
"""How often a launch whose answer was lost is looked for."""
AWAY_S = 900.0
"""After how many seconds without AWX a job counts as interrupted."""
LATE_EVENTS = 30
"""How often is looked for events that AWX has not stored yet when its job has ended."""


class AwxExecutor:
    """Launches job templates. ``clock`` gives seconds, ``pause`` waits for some."""

    name = "awx"
    survives = True
    """AWX goes on when the worker does not."""

    def __init__(
        self,
        settings: AwxSettings,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._pause = pause

    def start(self, work: Work) -> AwxRun:
        """Begin to find or launch AWX's job; whether that went well is told by the run."""
        variables_of(work)
        return self._begin(work, "", launch=True)

    def reattach(self, work: Work, external_id: str) -> AwxRun:
        """Go on following AWX's job; without its number it is looked for, and never launched."""
        return self._begin(work, external_id, launch=False)

    def _begin(self, work: Work, number: str, *, launch: bool) -> AwxRun:
        run = AwxRun(work, self._settings, self._clock, self._pause)
        run.begin(number, launch=launch)
        return run


class AwxRun:
    """One job of AWX, followed in a thread of its own so that nothing that AWX does keeps the worker from its signs of life."""

    def __init__(
        self, work: Work, settings: AwxSettings, clock: Callable[[], float], pause: Callable[[float], None]
    ) -> None:
        self._work = work
        self._settings = settings
        self._clock = clock
        self._pause = pause
        self._gathered = Gathered()
        self._wanted, self._left, self._over = threading.Event(), threading.Event(), threading.Event()
        self._ended = Ended("failed", JobError("awx_failed", "the run ended without a word", "see the worker's log"))
        self._number = ""

    @property
    def external_id(self) -> str:
        """Return the number of AWX's job; empty before there is one."""
        return self._number

    def wait(self, timeout_s: float) -> Ended | None:
        """Return how it ended, or None when it goes on after ``timeout_s`` seconds."""
        return self._ended if self._over.wait(timeout_s) else None

    def progress(self) -> tuple[Progress, list[Event]]:
        """Return how far it is, and what happened since the last call."""
        return self._gathered.told()

    def cancel(self) -> None:
        """Have AWX cancel its job; before the launch there will be none."""
        self._wanted.set()

    def leave(self) -> None:
        """Stop looking; AWX goes on."""
        self._left.set()

    def begin(self, number: str, *, launch: bool) -> None:
        """Start to follow the job ``number``; without one it is found, or with ``launch`` launched."""

        def run() -> None:
            try:
                with AwxApi(self._settings, self._pause) as api:
                    self._ended = self._through(api, number, launch=launch)
            except SawError as error:
                self._ended = Ended("failed", JobError(error.code[:256], error.message[:4000], error.cure[:1000]))
            finally:
                self._over.set()

        threading.Thread(target=run, name=self._work.id, daemon=True).start()

    def _through(self, api: AwxApi, number: str, *, launch: bool) -> Ended:
        if not number.isdecimal():
            found = self._find_or_launch(api) if launch else self._find(api)
            if found is None:
                if launch:
                    return Ended(
                        "cancelled", JobError("cancelled", "it was cancelled before AWX heard of it", "saw job run")
                    )
                return Ended("interrupted", JobError("worker_restarted", "AWX has no job of it", "saw job resume"))
            number = str(found)
        self._number = number
        return self._follow(api, int(number))

    def _find_or_launch(self, api: AwxApi) -> int | None:
        """Return the number of AWX's job, launched where there is none; None when it was cancelled before."""
        if (found := self._find(api)) is not None:
            self._gathered.note(f"AWX has the job already: {found}")
            return found
        template = api.template(self._settings.template(self._work.kind))
        told = {**variables_of(self._work), JOB_VARIABLE: self._work.id, ATTEMPT_VARIABLE: self._work.attempt}
        if self._wanted.is_set():
            return None
        try:
            launched = api.launch(template.id, told)
        except Uncertain as error:
            return self._look_for_lost(api, error)
        self._gathered.note(f"AWX has taken it as job {launched.job}")
        if launched.ignored_fields:
            api.cancel(launched.job)
            raise AwxRefused(
                "template_fixed",
                f"AWX ignored {', '.join(sorted(launched.ignored_fields))} of job {launched.job}, which was cancelled",
                "let the template prompt for variables on launch",
            )
        return launched.job

    def _look_for_lost(self, api: AwxApi, error: Uncertain) -> int:
        for _ in range(LOOKS_AFTER_LOSS):
            self._pause(self._settings.poll_s)
            if (found := self._find(api)) is not None:
                self._gathered.note(f"AWX has taken it as job {found}; the answer was lost")
                return found
        raise AwxRefused(
            "launch_uncertain",
            f"{error.message}, and AWX shows no job of it",
            "look at AWX; saw job resume looks for it again before it launches another",
        )

    def _find(self, api: AwxApi) -> int | None:
        """Return the number of AWX's job for this attempt, or of one of an earlier attempt that has not ended."""
        template = api.template(self._settings.template(self._work.kind))
        since = (datetime.fromisoformat(self._work.asked_at) - CLOCKS_DIFFER).strftime("%Y-%m-%dT%H:%M:%SZ")
        for job in api.jobs_of(template.id, since):
            told = job.variables()
            mine = told.get(JOB_VARIABLE) == self._work.id
            if mine and (told.get(ATTEMPT_VARIABLE) == self._work.attempt or job.status in GOES_ON):
                return job.id
        return None

    def _follow(self, api: AwxApi, number: int) -> Ended:
        heard, after, status, asked = self._clock(), 0, "", False
        while not self._left.is_set():
            if self._wanted.is_set() and not asked:
                asked = self._cancel(api, number)
            try:
                job = api.job(number)
                after = self._take_events(api, number, after)
            except (UnavailableError, AwxRefused) as error:
                if self._clock() - heard > AWAY_S:
                    return Ended(
                        "interrupted", JobError("awx_away", f"{error.message} (job {number})", "saw job resume")
                    )
                self._gathered.note(error.message)
            else:
                heard = self._clock()
                if job.status != status:
                    status = job.status
                    self._gathered.note(f"AWX job {number} is {status}")
                if status not in GOES_ON:
                    return self._end(api, job, after)
            self._pause(self._settings.poll_s)

        return self._ended

    def _cancel(self, api: AwxApi, number: int) -> bool:
        """Ask AWX for the end; return whether it has heard it."""
        try:
            api.cancel(number)
        except (UnavailableError, AwxRefused) as error:
            self._gathered.note(f"AWX does not cancel job {number}: {error.message}")
            return False
        return True

    def _take_events(self, api: AwxApi, number: int, after: int) -> int:
        while page := api.events(number, after):
            for event in page:
                after = max(after, int(event.get("counter", 0)))
                self._gathered.take(event)
        return after

    def _end(self, api: AwxApi, job: AwxJob, after: int) -> Ended:
        for _ in range(LATE_EVENTS):
            if job.event_processing_finished:
                break
            self._pause(self._settings.poll_s)
            job = api.job(job.id)
            after = self._take_events(api, job.id, after)
        if job.status == "successful":
            return Ended("succeeded")
        if job.status == "canceled":
            return Ended(
                "cancelled", JobError("cancelled", f"AWX job {job.id} was cancelled", "saw job run begins anew")
            )
        words = (
            "\n".join(self._gathered.failures[:10])
            or redact(job.job_explanation, 1000)
            or f"AWX job {job.id} is {job.status}"
        )
        code = "playbook_failed" if job.status == "failed" else "awx_failed"
        return Ended("failed", JobError(code, words[:4000], f"see job {job.id} in AWX; then saw job resume"))
