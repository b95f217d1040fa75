"""The pages about workspaces: mine or all, one with its engagements and sessions, and the three ways to end something there.

Handlers say who may see and do what (:mod:`saw.broker.sso.access`) and call what the command line and the API call. What a
person may not see answers as what does not exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from starlette.responses import Response, StreamingResponse

from saw.audit.choose import Choice
from saw.broker import delegation_list
from saw.broker.bastion_sessions import EndRequest
from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.delegations import Revoke, unknown_delegation
from saw.broker.errors import ForbiddenError, MalformedError
from saw.broker.lifecycle import State
from saw.broker.registry import unknown_workspace
from saw.broker.session_views import unknown_session
from saw.broker.sso.access import (
    has_workspaces,
    may_attach,
    may_end,
    may_intervene,
    may_replay,
    may_revoke,
    sees_everything,
    sees_workspace,
)
from saw.broker.sso.agent_pages import AgentPages
from saw.broker.sso.job_pages import JobPages
from saw.broker.sso.port_pages import PortPages
from saw.broker.sso.refused import record_refused
from saw.broker.sso.sessions import Session
from saw.broker.sso.web import Visit, Web, redirect
from saw.identity.sealed import SealKey
from saw.sessions.asciicast import lines
from saw.sessions.recording import events, verify

SESSIONS = 10
"""Sessions on the page of a workspace."""
SESSION_PAGE = 50
ENGAGEMENTS = 100
"""Most engagements on the page of a workspace, the newest."""
STEPS = 20
"""Steps of the history in one page."""
_LIVE = frozenset({"requested", "open", "ending"})
_NO_KILL = frozenset({State.QUARANTINED, State.DECOMMISSIONED})

Short = Annotated[str, msgspec.Meta(max_length=64)]
Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Page = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which workspaces: a part of their id, sponsor, blueprint or ring, a state, and the id to go on behind."""

    q: Short = ""
    state: State | None = None
    after: Short = ""


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far back the history of a workspace is wanted: in front of which position; which engagements and grants."""

    before: Annotated[int, msgspec.Meta(ge=1, lt=2**53)] | None = None
    engagements: Literal["", "all"] = ""
    ports: Literal["", "all"] = ""


class Numbered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which page of a list."""

    page: Page = 1


class Why(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why something is to end."""

    reason: Reason


class KillForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a workspace is cut off, and its name once more, so that it is the one that was meant."""

    confirm: Short
    reason: Reason


class Portal:
    """What these pages show and do."""

    def __init__(self, web: Web, broker: Broker, jobs: JobPages, agents: AgentPages, ports: PortPages) -> None:
        self._web = web
        self._broker = broker
        self._jobs = jobs
        self._agents = agents
        self._ports = ports

    def workspaces(self, visit: Visit) -> Response:
        """The workspaces that the person sponsors, or all; who has to do with reviews alone begins there."""
        session = visit.session()
        person = session.person
        if not has_workspaces(person):
            return redirect("/reviews")
        wanted = visit.asked(Wanted)
        everything = sees_everything(person)
        sponsor = None if everything else person.name
        found = self._broker.overview.listed(sponsor, wanted.q, wanted.state, wanted.after)
        return self._web.render(
            "workspaces.html", session, everything=everything, wanted=wanted, states=list(State), **found
        )

    def workspace(self, visit: Visit) -> Response:
        """One workspace."""
        session = visit.session()
        person, name = session.person, self._name(visit, session)
        wanted = visit.asked(Place)
        broker = self._broker
        shown = broker.overview.show(name)
        sessions = broker.sessions.list(name)["sessions"]
        engagements, ended = _engagements(broker, name, everything=bool(wanted.engagements))
        choice = Choice(source="broker", workspace=name, kind="3004")
        history = broker.trail.back(wanted.before, STEPS, choice)
        return self._web.render(
            "workspace.html",
            session,
            workspace=shown,
            agents=self._agents.of_workspace(name),
            sessions=sorted(sessions, key=lambda one: one["state"] not in _LIVE)[:SESSIONS],
            more_sessions=len(sessions) > SESSIONS,
            engagements=engagements,
            all_engagements=bool(wanted.engagements),
            ended_engagements=ended,
            most_engagements=ENGAGEMENTS,
            history=list(_steps(history["events"])),
            earlier=history["next"],
            looked_back=wanted.before is not None,
            origin=self._web.sso.settings.origin,
            may_attach=may_attach(person, shown["sponsor"]),
            has_terminal=broker.config.terminal is not None and broker.config.terminal.bastion is not None,
            may_revoke=may_revoke(person, shown["sponsor"]),
            may_kill=may_intervene(person) and shown["state"] not in _NO_KILL,
            lifecycle=self._jobs.of_workspace(visit, session, shown),
            ports=self._ports.of_workspace(session, shown, everything=bool(wanted.ports)),
        )

    def sessions(self, visit: Visit) -> Response:
        """The sessions of a workspace, the newest first."""
        session = visit.session()
        name = self._name(visit, session)
        page = visit.asked(Numbered).page
        every = self._broker.sessions.list(name)["sessions"]
        at = (page - 1) * SESSION_PAGE
        shown = every[at : at + SESSION_PAGE]
        return self._web.render(
            "sessions.html", session, workspace=name, sessions=shown, page=page, more=len(every) > at + SESSION_PAGE
        )

    def session(self, visit: Visit) -> Response:
        """One session, and how its recording is played."""
        session = visit.session()
        found, sponsor = self._found_session(visit, session)
        return self._web.render(
            "session.html",
            session,
            one=found,
            live=found["state"] in _LIVE,
            may_end=may_end(session.person, found["who"]),
            may_replay=may_replay(session.person, sponsor),
            has_player=self._broker.config.terminal is not None,
        )

    def end_session(self, visit: Visit) -> Response:
        """A session is told to end."""
        session = visit.session()
        caller = visit.change(session)
        found, _ = self._found_session(visit, session)
        self._allow(may_end(session.person, found["who"]), caller, "session.end", found["workspace"])
        self._broker.sessions.end(caller, found["id"], EndRequest(visit.filled_in(Why).reason))
        return redirect(f"/sessions/{found['id']}")

    def recording(self, visit: Visit) -> Response:
        """The recording of a session as an asciicast, once all of it is verified. That its key was handed out is audited."""
        session = visit.session()
        caller = visit.change(session)
        found, sponsor = self._found_session(visit, session)
        self._allow(may_replay(session.person, sponsor), caller, "session.replay", found["workspace"])
        identifier = found["id"]
        path = self._broker.recordings.file(identifier)
        given = self._broker.sessions.recording_key(caller, identifier)
        key = SealKey(bytes.fromhex(given["key"]), os.urandom)
        cut = found["reason"] == "recording_failed"
        told = verify(path, identifier, key, digest=given["digest"], unfinished=cut)
        return StreamingResponse(
            lines(told.header, events(path, identifier, key, unfinished=cut)),
            media_type="application/x-asciicast",
            headers={"content-disposition": f'attachment; filename="{identifier}.cast"'},
        )

    def revoke(self, visit: Visit) -> Response:
        """An engagement is taken back, with everything that was made from it."""
        session = visit.session()
        caller = visit.change(session)
        identifier = str(visit.parameters["id"])
        found = self._broker.delegations.show(identifier)
        sponsor = self._broker.overview.sponsor(found["workspace"])
        if not sees_workspace(session.person, sponsor):
            raise unknown_delegation(identifier)
        self._allow(may_revoke(session.person, sponsor), caller, "delegation.revoke", found["workspace"])
        self._broker.delegations.revoke(caller, identifier, Revoke(visit.filled_in(Why).reason))
        return redirect(f"/workspaces/{found['workspace']}")

    def kill(self, visit: Visit) -> Response:
        """A workspace is cut off. The provider is asked first whether the person still has the role."""
        caller = visit.change(visit.session())
        session = visit.session(fresh=True)
        name = self._name(visit, session)
        self._allow(may_intervene(session.person), caller, "workspace.kill", name)
        form = visit.filled_in(KillForm)
        if form.confirm != name:
            raise MalformedError(
                f"{form.confirm!r} was typed, and this is {name}", cure=f"type {name} to confirm", code="not_confirmed"
            )
        self._broker.registry.kill(caller, name, form.reason)
        return redirect(f"/workspaces/{name}")

    def _name(self, visit: Visit, session: Session) -> str:
        """Return the workspace of the path; one that the person may not see does not exist."""
        name = str(visit.parameters["id"])
        if not sees_workspace(session.person, self._broker.overview.sponsor(name)):
            raise unknown_workspace(name)
        return name

    def _found_session(self, visit: Visit, session: Session) -> tuple[dict[str, Any], str]:
        """Return the session of the path and its workspace's sponsor; one of a workspace that is not seen does not exist."""
        identifier = str(visit.parameters["id"])
        found = self._broker.sessions.show(identifier)
        sponsor = self._broker.overview.sponsor(found["workspace"])
        if not sees_workspace(session.person, sponsor):
            raise unknown_session(identifier)
        return found, sponsor

    def _allow(self, allowed: bool, caller: Caller, operation: str, workspace: str) -> None:
        """Raise :class:`ForbiddenError` unless ``allowed``; the attempt is audited."""
        if allowed:
            return
        record_refused(self._broker.services, caller, operation, workspace)
        raise ForbiddenError(
            f"your roles do not allow {operation}", cure="ask somebody who may: see docs/portal.md", code="not_allowed"
        )


def _engagements(broker: Broker, workspace: str, *, everything: bool) -> tuple[list[dict[str, Any]], int]:
    """Return the newest engagements of a workspace, those that count or all, and how many do not count any more."""
    now = broker.services.clock()
    shown = delegation_list.Wanted((workspace,), () if everything else ("active",), limit=ENGAGEMENTS)
    past = delegation_list.Wanted((workspace,), ("ended", "revoked"))
    with broker.services.store.read() as connection:
        ended = delegation_list.count(connection, past, now)
    return broker.delegations.listed(shown)["delegations"], ended


def _steps(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield what the history says of each event of the class Entity Management."""
    for item in events:
        event = item["event"]
        ours = event["unmapped"]["saw"]
        yield {
            "at": stamp(event),
            "what": f"{event['entity']['type']} {event['entity']['uid']}",
            "activity": event["activity_name"],
            "from": ours.get("from", ""),
            "to": ours.get("to", ""),
            "comment": event.get("comment", ""),
            "by": ours.get("principal", ""),
            "failed": event.get("status_id") == 2,
        }


def stamp(event: dict[str, Any]) -> str:
    """Return when an event took place, as the pages write times."""
    return iso(datetime.fromtimestamp(int(event["time"]) / 1000, UTC))
