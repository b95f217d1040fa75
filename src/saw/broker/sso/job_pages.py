"""The pages about lifecycle jobs: start, stop and rebuild a workspace, look at a job, end it, run it again (control LIF-01).

Looking and changing take the roles of the same calls of the command line (:data:`saw.broker.operator_roles.ALLOWED`), and
changing also that people may operate at all (``sso.operate``). A form is good for one job: the key in it is that job's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from starlette.responses import Response

from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import ForbiddenError, MalformedError, NotFoundError
from saw.broker.job_states import unknown_job
from saw.broker.jobs import makes_sense
from saw.broker.operator_roles import ALLOWED
from saw.broker.people import Person
from saw.broker.registry import unknown_workspace
from saw.broker.sso.access import sees_workspace
from saw.broker.sso.refused import record_refused
from saw.broker.sso.sessions import Session, new_secret
from saw.broker.sso.web import Visit, Web, redirect
from saw.jobs.messages import LIVE, STATES, AskJob, Cancel, IdempotencyKey, JobState, Kind, Words

PAGE = 50
"""Jobs in one page of the list."""
OF_WORKSPACE = 5
"""Jobs on the page of a workspace, the newest."""
EVENTS = 200
"""Events on one page of a job, the newest of its part."""

Offered = Literal["start", "stop", "rebuild"]
OFFERED: tuple[Offered, ...] = ("start", "stop", "rebuild")
"""Kinds that a page asks for. A kill has a form of its own; to create and to destroy take more than a button."""
Position = Annotated[int, msgspec.Meta(ge=1, lt=2**53)]
_Short = Annotated[str, msgspec.Meta(max_length=64)]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which jobs: in a state, of one workspace, behind a job."""

    state: JobState | None = None
    workspace: _Short = ""
    after: _Short = ""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which events of a job: those in front of this number."""

    before: Position | None = None


class AskForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A confirmed job. ``key`` makes it one job however often the form is sent; a rebuild has the workspace's name typed."""

    key: IdempotencyKey
    reason: Words | None = None
    confirm: _Short = ""


class ResumeForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The attempt that the page showed: a form of an older one resumes nothing."""

    attempt: Position


class JobPages:
    """What these pages show and do."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker

    def of_workspace(self, visit: Visit, session: Session, workspace: dict[str, Any]) -> dict[str, Any]:
        """Return what the page of a workspace says of its jobs, for the template ``workspace_jobs.html``."""
        found = self._broker.jobs.live(workspace["id"])
        listed: list[dict[str, Any]] = []
        if _may(session.person, "GET", "/v1/jobs"):
            caller = _caller(visit, session)
            listed = self._broker.jobs.listed(
                caller, state="", workspace=workspace["id"], after="", limit=OF_WORKSPACE
            )["jobs"]
        return {
            "jobs_on": self._on,
            "operate": self._web.sso.settings.operate,
            "may_ask": _may(session.person, "POST", "/v1/jobs"),
            "may_look": _may(session.person, "GET", "/v1/jobs"),
            "live": found,
            "offered": [kind for kind in OFFERED if makes_sense(kind, workspace["state"])],
            "jobs": listed,
        }

    def listed(self, visit: Visit) -> Response:
        """All jobs, the newest first."""
        session = visit.session()
        if not _may(session.person, "GET", "/v1/jobs"):
            raise _not_allowed("GET", "/v1/jobs")
        wanted = visit.asked(Wanted)
        found = self._broker.jobs.listed(
            _caller(visit, session),
            state=wanted.state or "",
            workspace=wanted.workspace,
            after=wanted.after,
            limit=PAGE,
        )
        return self._web.render("jobs.html", session, wanted=wanted, states=STATES, jobs_on=self._on, **found)

    def job(self, visit: Visit) -> Response:
        """One job: how far it is, what happened, and what may be done with it."""
        session = visit.session()
        return self._web.render("job.html", session, **self._shown(visit, session))

    def now(self, visit: Visit) -> Response:
        """The part of the page that changes, for a page that is open. That a page asks is no use of the session."""
        session = visit.session(used=False)
        return self._web.render("job_now.html", session, **self._shown(visit, session))

    def confirm(self, visit: Visit) -> Response:
        """What a job would do to this workspace, before anything is asked for."""
        session = visit.session()
        kind, workspace = self._kind(visit), self._workspace(visit, session)
        if not _may(session.person, "POST", "/v1/jobs"):
            raise _not_allowed("POST", "/v1/jobs")
        self._require_on()
        shown = self._broker.overview.show(workspace)
        return self._web.render(
            "job_ask.html",
            session,
            kind=kind,
            workspace=shown,
            possible=makes_sense(kind, shown["state"]),
            live=self._broker.jobs.live(workspace),
            key=new_secret(self._broker.services),
        )

    def ask(self, visit: Visit) -> Response:
        """A job that was confirmed. The provider is asked first whether the person still has the role."""
        caller = visit.change(visit.session())
        session = visit.session(fresh=True)
        kind, workspace = self._kind(visit), self._workspace(visit, session)
        self._allow(session.person, "/v1/jobs", caller, f"job.{kind}", workspace)
        form = visit.filled_in(AskForm)
        if kind == "rebuild" and form.confirm != workspace:
            raise MalformedError(
                f"{form.confirm!r} was typed, and this is {workspace}",
                cure=f"type {workspace} to confirm",
                code="not_confirmed",
            )
        parameters = {} if form.reason is None else {"reason": form.reason}
        job = self._broker.jobs.ask(
            caller, AskJob(kind=kind, workspace=workspace, idempotency_key=form.key, parameters=parameters)
        )
        return redirect(f"/jobs/{job['id']}")

    def cancel(self, visit: Visit) -> Response:
        """A job is told to end."""
        caller, session, job = self._changed(visit)
        self._allow(session.person, "/v1/jobs/{id}/cancel", caller, "job.cancel", job["workspace"])
        self._broker.jobs.cancel(caller, job["id"], visit.filled_in(Cancel))
        return redirect(f"/jobs/{job['id']}")

    def resume(self, visit: Visit) -> Response:
        """A job that failed or was interrupted is run again."""
        caller, session, job = self._changed(visit)
        self._allow(session.person, "/v1/jobs/{id}/resume", caller, "job.resume", job["workspace"])
        self._broker.jobs.resume(caller, job["id"], attempt=visit.filled_in(ResumeForm).attempt)
        return redirect(f"/jobs/{job['id']}")

    @property
    def _on(self) -> bool:
        return self._broker.config.jobs is not None

    def _require_on(self) -> None:
        if not self._on:
            raise NotFoundError(
                "this broker runs no jobs", cure="set the role variable broker_jobs (docs/jobs.md)", code="jobs_off"
            )
        self._require_operate()

    def _require_operate(self) -> None:
        if not self._web.sso.settings.operate:
            raise ForbiddenError(
                "these pages do not operate",
                cure="set operate in broker_sso (docs/sign-in.md), or use saw job on the control host",
                code="operate_off",
            )

    def _changed(self, visit: Visit) -> tuple[Caller, Session, dict[str, Any]]:
        """Return who changes the job of the path, of whose roles the provider was asked now, and the job."""
        caller = visit.change(visit.session())
        session = visit.session(fresh=True)
        return caller, session, self._job(visit, session)

    def _job(self, visit: Visit, session: Session) -> dict[str, Any]:
        """Return the job of the path; to those who may not look there is none."""
        identifier = str(visit.parameters["id"])
        if not _may(session.person, "GET", "/v1/jobs/{id}"):
            raise unknown_job(identifier)
        return self._broker.jobs.show(_caller(visit, session), identifier)

    def _shown(self, visit: Visit, session: Session) -> dict[str, Any]:
        job = self._job(visit, session)
        before = visit.asked(Place).before
        start = max(0, min(before or 2**53, job["seq"] + 1) - 1 - EVENTS)
        # Job and events of one snapshot.
        found = self._broker.jobs.events(_caller(visit, session), job["id"], start)
        job, operate, person = found["job"], self._web.sso.settings.operate, session.person
        return {
            "job": job,
            "events": [one for one in reversed(found["events"]) if before is None or one["seq"] < before],
            "before": before,
            "earlier": start + 1 if start else 0,
            "is_live": job["state"] in LIVE,
            "jobs_on": self._on,
            "operate": operate,
            "may_cancel": _may(person, "POST", "/v1/jobs/{id}/cancel"),
            "may_resume": _may(person, "POST", "/v1/jobs/{id}/resume"),
        }

    @staticmethod
    def _kind(visit: Visit) -> Kind:
        kind = visit.parameters["kind"]
        for one in OFFERED:
            if kind == one:
                return one
        raise NotFoundError(
            f"there is no page {visit.path[:256]}", cure="begin at the page of the workspace", code="no_such_page"
        )

    def _workspace(self, visit: Visit, session: Session) -> str:
        """Return the workspace of the path; one that the person may not see does not exist."""
        name = str(visit.parameters["id"])
        if not sees_workspace(session.person, self._broker.overview.sponsor(name)):
            raise unknown_workspace(name)
        return name

    def _allow(self, person: Person, path: str, caller: Caller, operation: str, workspace: str) -> None:
        """Raise :class:`ForbiddenError` unless the roles allow the call, which is audited, and the pages operate."""
        if not _may(person, "POST", path):
            record_refused(self._broker.services, caller, operation, workspace)
            raise _not_allowed("POST", path)
        self._require_operate()


def _may(person: Person, method: str, path: str) -> bool:
    return bool(ALLOWED[method, path] & set(person.roles))


def _not_allowed(method: str, path: str) -> ForbiddenError:
    wanted = " or ".join(sorted(ALLOWED[method, path]))
    return ForbiddenError(f"this takes the role {wanted}", cure="ask somebody who has it", code="not_allowed")


def _caller(visit: Visit, session: Session) -> Caller:
    return Caller(session.principal, visit.address, visit.request_id)
