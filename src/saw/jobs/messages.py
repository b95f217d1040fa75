"""What a lifecycle job is: its kinds with their parameters, its states, and the messages between broker, asker and worker.

Parameters become variables of a playbook, which Ansible would evaluate as templates: no text here may have a brace in it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from saw.errors import SawError

Kind = Literal["create", "start", "stop", "rebuild", "destroy", "kill"]
KINDS: tuple[Kind, ...] = ("create", "start", "stop", "rebuild", "destroy", "kill")

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled", "interrupted"]
STATES: tuple[JobState, ...] = ("queued", "running", "succeeded", "failed", "cancelled", "interrupted")
LIVE: frozenset[JobState] = frozenset({"queued", "running"})
"""A workspace has one job in these at a time."""
RESUMABLE: frozenset[JobState] = frozenset({"failed", "interrupted"})
Outcome = Literal["succeeded", "failed", "cancelled", "interrupted"]

MAX_LINES, MAX_LINE = 20, 300
"""The last lines that progress has, and the longest one, in characters."""
MAX_HOSTS = 256
MAX_BEAT_EVENTS = 200

WorkspaceId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
Label = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
#: Free text of people. Without braces nothing in it is a template, without control characters it is one line.
Words = Annotated[str, msgspec.Meta(pattern=r"^[^{}\x00-\x1f\x7f]{1,256}\Z")]
ImageName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,127}\Z")]
AbsolutePath = Annotated[str, msgspec.Meta(pattern=r"^/[A-Za-z0-9._/@+-]{1,255}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
IdempotencyKey = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{8,128}\Z")]
ClaimToken = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{43}\Z")]
Seconds = Annotated[int, msgspec.Meta(ge=0, le=30)]
_Line = Annotated[str, msgspec.Meta(max_length=MAX_LINE)]
_Short = Annotated[str, msgspec.Meta(max_length=256)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class JobMalformed(SawError):
    """Parameters that do not belong to the kind, or are not what it takes."""

    code = "parameters_refused"


class Create(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A new workspace. ``image`` is a registered image, ``image_path`` its file on the hypervisor."""

    sponsor: Words
    blueprint: Label
    ring: Label
    image: ImageName
    image_path: AbsolutePath
    reason: Words | None = None


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Start, stop, destroy or kill, and why."""

    reason: Words | None = None


class Kill(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The kill switch needs a reason, as everywhere."""

    reason: Words


class Rebuild(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A new root disk: from the image that it has, or from another registered one (``image`` and ``image_path`` together)."""

    image: ImageName | None = None
    image_path: AbsolutePath | None = None
    reason: Words | None = None


Parameters = Create | Step | Kill | Rebuild
PARAMETERS: dict[Kind, type[Create | Step | Kill | Rebuild]] = {
    "create": Create, "start": Step, "stop": Step, "rebuild": Rebuild, "destroy": Step, "kill": Kill,
}  # fmt: skip


class AskJob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A job that somebody asks for. ``parameters`` are those of the kind; the same ``idempotency_key`` is the same job."""

    kind: Kind
    workspace: WorkspaceId
    idempotency_key: IdempotencyKey
    parameters: dict[str, Any] = {}


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a job is to end."""

    reason: Words


class Counts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Results of tasks on one host."""

    ok: _Count = 0
    changed: _Count = 0
    failed: _Count = 0
    unreachable: _Count = 0
    skipped: _Count = 0


class Progress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far a run is: the play and task it is at, tasks begun so far, results by host, its last lines (redacted)."""

    play: _Short = ""
    task: _Short = ""
    tasks: _Count = 0
    hosts: dict[_Short, Counts] = {}
    lines: tuple[_Line, ...] = ()


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Something that happened in a run. ``kind`` is ``play``, ``task``, ``host`` (a result that is not plain ok) or ``note``."""

    kind: Literal["play", "task", "host", "note"]
    text: _Line
    host: _Short = ""
    result: Literal["", "changed", "failed", "unreachable"] = ""


class JobError(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a job did not succeed, in the form of every refusal."""

    code: _Short
    message: Annotated[str, msgspec.Meta(max_length=4000)]
    cure: Annotated[str, msgspec.Meta(max_length=1000)] = ""


class AskClaim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A worker that is free. ``claim`` is a secret of its own for the job that it may get; the same claim gets the same job.

    ``kinds``: only these; empty means any. ``wait``: how long to wait for one, seconds.
    """

    claim: ClaimToken
    executor: Label
    kinds: tuple[Kind, ...] = ()
    wait: Seconds = 0


class Work(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A claimed job as its worker sees it. ``image_sha256`` is the register's; the lease ends ``lease_s`` after each beat."""

    id: str
    kind: Kind
    workspace: WorkspaceId
    attempt: int
    asked_at: str
    lease_s: int
    parameters: dict[str, Any]
    image_sha256: Digest | None = None


class ClaimAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The job that was claimed, or None."""

    claimed: Work | None = None


class Beat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sign of life with what happened since the last one. ``external_id`` is the executor's own name for the run."""

    claim: ClaimToken
    progress: Progress | None = None
    events: Annotated[tuple[Event, ...], msgspec.Meta(max_length=MAX_BEAT_EVENTS)] = ()
    external_id: _Short | None = None


class BeatAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``cancel``: somebody wants the run to end."""

    cancel: bool
    lease_s: int


class End(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a run ended; all but a success say why."""

    claim: ClaimToken
    outcome: Outcome
    error: JobError | None = None


def parameters_of(kind: Kind, given: dict[str, Any]) -> Parameters:
    """Return the parameters of ``kind``, strictly; raise :class:`JobMalformed` naming the field."""
    try:
        found: Parameters = msgspec.convert(given, PARAMETERS[kind])
    except msgspec.ValidationError as error:
        raise JobMalformed(
            f"the parameters of {kind} are not valid: {error}",
            cure="saw job run --help lists them; braces are not taken",
        ) from error
    if isinstance(found, Rebuild) and (found.image is None) != (found.image_path is None):
        raise JobMalformed("image and image_path belong together", cure="give both, or neither to keep the image")
    return found


def variables_of(work: Work) -> dict[str, str]:
    """Return the variables of the playbook for ``work``; raise :class:`JobMalformed` for parameters that are not the kind's."""
    found = parameters_of(work.kind, work.parameters)
    told = {f"workspace_{name}": value for name, value in msgspec.structs.asdict(found).items() if value is not None}
    if "workspace_image" in told:
        if work.image_sha256 is None:
            raise JobMalformed("the digest of the image is missing", cure="register the image again")
        told["workspace_image_sha256"] = work.image_sha256
    return {"workspace_id": work.workspace, **told}
