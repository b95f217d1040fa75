"""What the calls about lifecycle jobs answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from saw.jobs.messages import JobError, JobState, Kind, Progress


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A job as it is now. Times are RFC 3339; what is null was not yet. ``parameters`` are those of its kind."""

    id: str
    kind: Kind
    state: JobState
    attempt: int
    asked_by: str
    asked_at: str
    queued_at: str
    started_at: str | None
    ended_at: str | None
    executor: str | None
    external_id: str | None
    worker: str | None
    cancel_asked_at: str | None
    cancel_reason: str | None
    workspace: str
    parameters: dict[str, Any]
    progress: Progress
    error: JobError | None
    resumable: bool
    seq: int


class ChangedJob(Job, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A job after a call, and whether the call changed it; false too when it was asked for before under its key."""

    changed: bool


class JobPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Jobs, the newest first; ``next`` is the ``after`` of the page that follows, null at the end."""

    jobs: tuple[Job, ...]
    next: str | None


class JobStep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Something that happened in a job: ``state`` is a state that it came to (``text``, and why in ``comment``), the other kinds
    are what its run tells."""

    seq: int
    at: str
    attempt: int
    kind: Literal["state", "play", "task", "host", "note"]
    text: str
    comment: str | msgspec.UnsetType = msgspec.UNSET
    host: str | msgspec.UnsetType = msgspec.UNSET
    result: Literal["", "changed", "failed", "unreachable"] | msgspec.UnsetType = msgspec.UNSET


class JobSteps(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job with what happened behind the number that was asked for; ``next`` is the number to ask behind next."""

    job: Job
    events: tuple[JobStep, ...]
    next: int
