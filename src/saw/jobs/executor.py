"""What runs a job: the interface of executors, and how progress is gathered from the events of Ansible.

An executor starts a run once, tells how far it is, ends it when asked, and finds it again after the worker was restarted.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from saw.jobs.messages import MAX_HOSTS, MAX_LINES, Counts, Event, JobError, Outcome, Progress, Work
from saw.jobs.redact import redact

MAX_KEPT_EVENTS = 2000
"""Events that wait for the next beat; more are dropped, with a note."""

_ENDED: dict[str, Literal["failed", "unreachable"]] = {"failed": "failed", "unreachable": "unreachable"}
"""Results with which a host is out of the run."""


class Ended(msgspec.Struct, frozen=True):
    """How a run ended."""

    outcome: Outcome
    error: JobError | None = None


class Handle(Protocol):
    """One run."""

    @property
    def external_id(self) -> str:
        """Return the executor's own name for the run, under which it is found again."""
        ...

    def wait(self, timeout_s: float) -> Ended | None:
        """Return how the run ended, or None when it goes on after ``timeout_s`` seconds."""
        ...

    def progress(self) -> tuple[Progress, list[Event]]:
        """Return how far the run is, and what happened since the last call."""
        ...

    def cancel(self) -> None:
        """Ask the run to end; returns at once. :meth:`wait` tells when nothing of it runs any more."""
        ...

    def leave(self) -> None:
        """Stop following a run that goes on without the worker; one that does not is ended."""
        ...


class Executor(Protocol):
    """A way to run jobs. ``name`` is recorded with each job."""

    @property
    def name(self) -> str:
        """Return its name."""
        ...

    @property
    def survives(self) -> bool:
        """Tell whether its runs go on without the worker; then it starts none that it can find."""
        ...

    def start(self, work: Work) -> Handle:
        """Start ``work``; raise :class:`saw.errors.SawError` when it did not start. The same attempt never starts twice."""
        ...

    def reattach(self, work: Work, external_id: str) -> Handle | None:
        """Return the run of ``work`` that an earlier worker started, None when nothing of it runs any more."""
        ...


class Gathered:
    """Progress from the events of Ansible as ansible-runner and AWX tell them. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._play = self._task = ""
        self._tasks = 0
        self._hosts: dict[str, Counts] = {}
        self._lines: list[str] = []
        self._events: list[Event] = []
        self._dropped = 0
        self.failures: list[str] = []

    def take(self, event: Mapping[str, Any]) -> None:
        """Count one event; of results only what failed has words, and never a task's whole result."""
        kind = str(event.get("event") or "")
        found = event.get("event_data")
        data: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        with self._lock:
            if kind == "playbook_on_play_start":
                self._play, self._task = redact(str(data.get("name") or data.get("play") or ""), 256), ""
                self._add(Event(kind="play", text=self._play))
            elif kind in {"playbook_on_task_start", "playbook_on_handler_task_start"}:
                self._task = redact(str(data.get("name") or data.get("task") or ""), 256)
                self._tasks += 1
                self._add(Event(kind="task", text=self._task))
            elif kind in {"runner_on_ok", "runner_on_failed", "runner_on_unreachable", "runner_on_skipped"}:
                self._result(kind.removeprefix("runner_on_"), data)

    def note(self, text: str) -> None:
        """Add words of the executor itself."""
        with self._lock:
            self._add(Event(kind="note", text=redact(text)))

    def told(self) -> tuple[Progress, list[Event]]:
        """Return the progress, and the events since the last call."""
        with self._lock:
            events, self._events = self._events, []
            if self._dropped:
                events.append(Event(kind="note", text=f"{self._dropped} more events are not shown"))
                self._dropped = 0
            progress = Progress(
                play=self._play, task=self._task, tasks=self._tasks, hosts=dict(self._hosts), lines=tuple(self._lines)
            )
            return progress, events

    def _result(self, result: str, data: Mapping[str, Any]) -> None:
        host = redact(str(data.get("host") or data.get("host_name") or ""), 256)
        raw = data.get("res")
        told: Mapping[str, Any] = raw if isinstance(raw, Mapping) else {}
        if result == "failed" and data.get("ignore_errors"):
            result = "ok"
        changed = result == "ok" and bool(told.get("changed", data.get("changed", False)))
        if host in self._hosts or len(self._hosts) < MAX_HOSTS:
            counts = self._hosts.get(host, Counts())
            more = {result: getattr(counts, result) + 1, **({"changed": counts.changed + 1} if changed else {})}
            self._hosts[host] = msgspec.structs.replace(counts, **more)
        task = redact(str(data.get("task") or self._task), 200)
        if (ended := _ENDED.get(result)) is not None:
            words = f"{task}: {_words(told)}"
            self.failures.append(f"{host}: {redact(words, 1000)}")
            self._add(Event(kind="host", host=host, result=ended, text=redact(words)))
        elif changed:
            self._add(Event(kind="host", host=host, result="changed", text=task))

    def _add(self, event: Event) -> None:
        if len(self._events) < MAX_KEPT_EVENTS:
            self._events.append(event)
        else:
            self._dropped += 1
        words = {"play": f"play: {event.text}", "task": f"task: {event.text}"}.get(
            event.kind, f"{event.host} {event.result}: {event.text}" if event.host else event.text
        )
        self._lines = [*self._lines, redact(words)][-MAX_LINES:]


def _words(result: Mapping[str, Any]) -> str:
    """Return why a task failed; of one with ``no_log`` Ansible tells nothing."""
    if "censored" in result:
        return "its result is hidden (no_log)"
    return " ".join(str(result[name]) for name in ("msg", "stderr") if result.get(name))[:8000] or "no reason given"
