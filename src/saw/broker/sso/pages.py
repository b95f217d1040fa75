"""The pages: sign in, reviews, one review with its decision, my passkeys; and the command line's sign-in. See also portal."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saw.broker.bastion_sessions import SessionRequest
from saw.broker.break_glass import OWED
from saw.broker.context import Caller
from saw.broker.core import Broker
from saw.broker.errors import ConflictError, ForbiddenError, NotFoundError
from saw.broker.people import Person
from saw.broker.registry import unknown_workspace
from saw.broker.review_states import OPEN, UNENDED, unknown_review
from saw.broker.signed_in import OPERATOR_PREFIX
from saw.broker.sso.access import is_sponsor, sees_everything, sees_workspace
from saw.broker.sso.agent_pages import AgentPages
from saw.broker.sso.fleet_pages import FleetPages
from saw.broker.sso.job_pages import JobPages
from saw.broker.sso.operate import operate_app
from saw.broker.sso.passkeys import Answered, NewCredential
from saw.broker.sso.policy_request_pages import PolicyRequestPages
from saw.broker.sso.port_pages import PortPages
from saw.broker.sso.portal import Portal
from saw.broker.sso.rechecks import NotSignedIn
from saw.broker.sso.service import SingleSignOn
from saw.broker.sso.sessions import Session
from saw.broker.sso.signin import LOGIN_FOR
from saw.broker.sso.terminal import Terminal
from saw.broker.sso.trail_pages import TrailPages
from saw.broker.sso.web import HEADERS, LOGIN_COOKIE, SESSION_COOKIE, Visit, Web, json, redirect, set_cookie
from saw.broker.step_up import LETS_THROUGH, StepUp
from saw.review.messages import SPONSORS, Digest
from saw.review.render import push_parts
from saw.review.statement import MAX_COMMENT, Decision

_REVIEW = "/reviews/"
REVIEW_PAGE = 50
"""Reviews in one page of the list."""
_STATES: dict[str, tuple[str | None, ...]] = {
    "mine": ("pending",), "after": (None,), "open": tuple(sorted(UNENDED)), "decided": (None,), "all": (None,),
}  # fmt: skip
"""What is read for each list, 1000 reviews of each at most: many that have ended never push one that is open out."""


class Listing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which reviews: those that wait for the person, that owe an after-review, that are open, that have ended, or all."""

    show: Literal["mine", "after", "open", "decided", "all"] = "mine"
    workspace: Annotated[str, msgspec.Meta(max_length=64)] = ""
    page: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 1


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What somebody is about to decide, and the digest of what the page showed."""

    decision: Decision
    render_digest: Digest
    comment: Annotated[str, msgspec.Meta(max_length=MAX_COMMENT)] = ""


class Handle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The handle of a sign-in with the command line."""

    handle: Annotated[str, msgspec.Meta(max_length=64)]


class Pages:
    """What each page shows and does."""

    def __init__(self, sso: SingleSignOn, broker: Broker) -> None:
        self._sso = sso
        self._sessions = broker.sessions
        self._decisions = broker.decisions
        self._break_glass = broker.services.config.break_glass
        self._overview = broker.overview
        self._now = broker.services.clock
        self.web = Web(sso)
        self.terminal = Terminal(self.web, broker)

    def sign_in(self, visit: Visit) -> Response:
        """The page of whoever is not signed in."""
        return self.web.render("sign_in.html", None, to=visit.query.get("to", "/"), out="out" in visit.query)

    def login(self, visit: Visit) -> Response:
        """Send the browser to the provider; with ``step_up`` for a sign-in that a decision about the review ``to`` wants."""
        to, decision = visit.query.get("to", "/"), visit.query.get("step_up", "")
        wanted = self._step_up_for(visit, to, decision) if decision else None
        fresh = wanted is not None or visit.query.get("fresh") == "1"
        begun = self._sso.signin.begin(to, fresh=fresh, acr=wanted.acr if wanted else ())
        response = redirect(begun.url)
        set_cookie(response, LOGIN_COOKIE, begun.browser, max_age=int(LOGIN_FOR.total_seconds()))
        return response

    def callback(self, visit: Visit) -> Response:
        """Take the browser back from the provider. The session's secret is new, whatever the browser had before."""
        old = visit.cookies.get(SESSION_COOKIE, "")
        session, page = self._sso.signin.finish(visit.caller, visit.query, visit.cookies.get(LOGIN_COOKIE, ""), old=old)
        response = redirect(page, clear=LOGIN_COOKIE)
        set_cookie(response, SESSION_COOKIE, session.secret, max_age=self._sso.settings.session.absolute_s)
        return response

    def sign_out(self, visit: Visit) -> Response:
        """End the session."""
        session = visit.session()
        self._sso.sessions.sign_out(visit.change(session), session.secret)
        return redirect("/sign-in?out", clear=SESSION_COOKIE)

    def provider_logout(self, visit: Visit) -> Response:
        """The provider says that somebody has signed out there."""
        self._sso.signin.logout_by_provider(visit.caller, visit.form().get("logout_token", ""))
        return Response(status_code=200)

    def reviews(self, visit: Visit) -> Response:
        """Reviews that wait for the person, or what else the person may see of them."""
        session = visit.session()
        wanted = visit.asked(Listing)
        if wanted.workspace and not sees_workspace(session.person, self._overview.sponsor(wanted.workspace)):
            raise unknown_workspace(wanted.workspace)
        rows = [
            row
            for state in _STATES[wanted.show]
            for row in self._decisions.listed(state, wanted.workspace or None, owed=wanted.show == "after")["reviews"]
        ]
        rows.sort(key=lambda row: str(row["opened_at"]), reverse=True)
        holds = self._holds_keys(session.person)
        shown = [
            row
            for row in rows
            if _visible(session.person, row, holds=holds) and _is_wanted(session.person, row, wanted.show)
        ]
        at = (wanted.page - 1) * REVIEW_PAGE
        page, more = shown[at : at + REVIEW_PAGE], len(shown) > at + REVIEW_PAGE
        return self.web.render("reviews.html", session, reviews=page, wanted=wanted, more=more)

    def review(self, visit: Visit) -> Response:
        """One review: what is asked for first, then the decision, then digests."""
        session = visit.session()
        found = self._decisions.show(self._identifier(visit, session))
        name = session.person.name
        sponsor = is_sponsor(session.person, str(found["sponsor"])) and found["group"] != SPONSORS
        return self.web.render(
            "review.html",
            session,
            review=found,
            parts=push_parts(found["rendering"] or ""),
            may_decide=_in_group(session.person, found) and found["state"] in {"pending", "approved"},
            may_approve=not sponsor and name not in found["approved_by"] and found["state"] == "pending",
            sponsor=sponsor,
            may_break=self._may_break(session.person, found),
            may_look_after=_may_look_after(session.person, found),
            weak={one for one in LETS_THROUGH if self._too_weak(session, found, one)},
            passkeys=len(self._sso.passkeys.mine(name)),
            max_comment=MAX_COMMENT,
        )

    def request(self, visit: Visit) -> Response:
        """The statement of a decision, for the person's authenticator."""
        session = visit.session()
        visit.change(session)
        wanted = visit.data(Wanted)
        identifier = self._identifier(visit, session)
        if weak := self._too_weak(session, self._decisions.brief(identifier), wanted.decision):
            raise weak
        given = self._decisions.nonce_for(identifier, session.person.name, passkey=True)
        shown = self._decisions.show(identifier)
        if shown["render_digest"] != wanted.render_digest:
            raise ConflictError("the page shows something else", cure="load it again", code="statement_mismatch")
        return json(self._sso.passkeys.request(shown, given, session, wanted.decision, wanted.comment.strip()))

    def decide(self, visit: Visit) -> Response:
        """A decision. The provider is asked first whether the person is still in the group."""
        caller = visit.change(visit.session())
        session = visit.session(fresh=True)
        body = self._sso.passkeys.evidence(session, visit.data(Answered))
        # Not hidden from who has left the group since: the attempt is refused and audited as one.
        found = self._decisions.decide(caller, str(visit.parameters["id"]), body)
        return json({"id": found["id"], "state": found["state"]})

    def passkeys(self, visit: Visit) -> Response:
        """The person's passkeys."""
        session = visit.session()
        mine = self._sso.passkeys.mine(session.person.name)
        return self.web.render("passkeys.html", session, passkeys=mine, fresh=self._sso.passkeys.is_fresh(session))

    def passkey_options(self, visit: Visit) -> Response:
        """What the browser needs to make a passkey."""
        session = visit.session()
        visit.change(session)
        return json(self._sso.passkeys.options(session))

    def passkey_add(self, visit: Visit) -> Response:
        """A new passkey."""
        session = visit.session(fresh=True)
        caller = visit.change(session)
        return json(self._sso.passkeys.register(caller, session, visit.data(NewCredential)))

    def passkey_remove(self, visit: Visit) -> Response:
        """A passkey is taken out of use."""
        session = visit.session()
        self._sso.passkeys.remove(visit.change(session), session, str(visit.parameters["id"]))
        return redirect("/passkeys")

    def device(self, _visit: Visit) -> Response:
        """Begin a sign-in with the command line."""
        return json(self._sso.signin.device_begin())

    def device_poll(self, visit: Visit) -> Response:
        """Tell the command line how its sign-in stands."""
        found = self._sso.signin.device_poll(visit.caller, visit.data(Handle).handle)
        if isinstance(found, Session):
            return json({"pending": False, "token": found.secret, **_told(found)})
        return json(found)

    def whoami(self, visit: Visit) -> Response:
        """Who the session of a command line belongs to."""
        return json(_told(visit.command_session()))

    def command_logout(self, visit: Visit) -> Response:
        """End the session of a command line."""
        session = visit.command_session()
        caller = Caller(session.principal, visit.address, visit.request_id)
        self._sso.sessions.sign_out(caller, session.secret)
        return json({"signed_out": session.person.name})

    def open_session(self, visit: Visit) -> Response:
        """A certificate for one session with a workspace of the person's own."""
        session = visit.command_session()
        caller = Caller(session.principal, visit.address, visit.request_id)
        wanted = visit.data(SessionRequest)
        return json(self._sessions.request(caller, wanted, person=session.person.name, sign_in=session.id))

    def nothing(self, visit: Visit) -> Response:
        """There is no such page."""
        raise NotFoundError(f"there is no page {visit.path[:256]}", cure="begin at the first page", code="no_such_page")

    def _identifier(self, visit: Visit, session: Session) -> str:
        """Return the id of the review of the path; one that the person may not see does not exist."""
        identifier = str(visit.parameters["id"])
        found = self._decisions.brief(identifier)
        if not _visible(session.person, found, holds=self._holds_keys(session.person)):
            raise unknown_review(identifier)
        return identifier

    def _too_weak(self, session: Session, review: dict[str, Any], decision: str) -> ForbiddenError | None:
        """Return why a decision takes another sign-in than that of ``session``, None where it does not."""
        signed_in = session.acr, session.auth_time
        return self._sso.settings.step_up.refusal(decision, str(review["group"]), signed_in, self._now())

    def _step_up_for(self, visit: Visit, to: str, decision: str) -> StepUp | None:
        """Return which sign-in ``decision`` wants about the review whose page is ``to``; None for what the person may not see."""
        try:
            session = visit.session(used=False)
            found = self._decisions.brief(to.removeprefix(_REVIEW))
        except (NotSignedIn, NotFoundError):
            return None
        if not to.startswith(_REVIEW) or not _visible(session.person, found, holds=self._holds_keys(session.person)):
            return None
        return self._sso.settings.step_up.wanted(decision, str(found["group"]))

    def _holds_keys(self, person: Person) -> bool:
        """Tell whether the person is one of those who can break the glass."""
        return self._break_glass is not None and "approver" in person.roles and self._break_glass.group in person.groups

    def _may_break(self, person: Person, review: dict[str, Any]) -> bool:
        """Tell whether the person may sign to break the glass of a review that waits."""
        others = person.name not in review["break_glass_by"] and not is_sponsor(person, str(review["sponsor"]))
        return self._holds_keys(person) and review["state"] == "pending" and others


def pages_app(sso: SingleSignOn, broker: Broker) -> ASGIApp:
    """Return the pages as an application; every answer of it has :data:`saw.broker.sso.web.HEADERS`."""
    pages = Pages(sso, broker)

    async def missing(request: Request, _error: Exception) -> Response:
        return await pages.web.page(pages.nothing)(request)

    mounts: list[BaseRoute] = [Mount("/static", StaticFiles(directory=Path(__file__).with_name("static")))]
    if broker.config.terminal is not None:
        mounts.append(Mount("/emulator", StaticFiles(directory=broker.config.terminal.files_dir, check_dir=False)))
    if pages.terminal.is_on:
        pages.terminal.prepare()
        mounts.append(WebSocketRoute("/workspaces/{id}/terminal/connection", pages.terminal.socket))
    if sso.settings.operate:
        mounts.append(Mount(OPERATOR_PREFIX, operate_app(pages.web, broker)))
    app = Starlette(routes=[*page_routes(pages, broker), *mounts], exception_handlers={404: missing, 405: missing})
    return _with_headers(app)


def page_routes(pages: Pages, broker: Broker) -> list[Route]:
    """Return every page and every call that a page or a command line makes."""
    web = pages.web
    jobs = JobPages(web, broker)
    agents = AgentPages(web, broker)
    ports, asked = PortPages(web, broker), PolicyRequestPages(web, broker)
    fleet = FleetPages(web, broker)
    portal, trail, terminal = Portal(web, broker, jobs, agents, ports), TrailPages(web, broker), pages.terminal

    def page(path: str, handle: Any, method: str = "GET", *, limited: bool = False) -> Route:
        return Route(path, web.page(handle, limited=limited), methods=[method])

    def data(path: str, handle: Any, method: str = "POST", *, limited: bool = False) -> Route:
        return Route(path, web.data(handle, limited=limited), methods=[method])

    return [
        page("/", portal.workspaces),
        page("/workspaces/{id}", portal.workspace),
        page("/workspaces/{id}/sessions", portal.sessions),
        page("/workspaces/{id}/kill", portal.kill, "POST"),
        page("/workspaces/{id}/ports", ports.grant, "POST"),
        page("/workspaces/{id}/terminal", terminal.page),
        data("/workspaces/{id}/terminal", terminal.ticket),
        page("/workspaces/{id}/jobs/{kind}", jobs.confirm),
        page("/workspaces/{id}/jobs/{kind}", jobs.ask, "POST"),
        page("/agents", agents.agents),
        page("/agents/{id}/retire", agents.retire, "POST"),
        page("/policy-requests", asked.requests),
        page("/policy-requests/{id}", asked.request),
        page("/policy-requests/{id}/answer", asked.answer, "POST"),
        page("/fleet", fleet.overview),
        page("/fleet/perimeters", fleet.perimeters),
        page("/fleet/images", fleet.images),
        page("/fleet/gates", fleet.gates),
        page("/fleet/people", fleet.people),
        page("/fleet/holds", fleet.holds),
        page("/fleet/break-glass", fleet.break_glass),
        page("/jobs", jobs.listed),
        page("/jobs/{id}", jobs.job),
        data("/jobs/{id}/now", jobs.now, "GET"),
        page("/jobs/{id}/cancel", jobs.cancel, "POST"),
        page("/jobs/{id}/resume", jobs.resume, "POST"),
        page("/sessions/{id}", portal.session),
        page("/sessions/{id}/end", portal.end_session, "POST"),
        page("/sessions/{id}/recording", portal.recording, "POST"),
        page("/delegations/{id}/revoke", portal.revoke, "POST"),
        page("/forwards/{id}/revoke", ports.revoke, "POST"),
        page("/audit", trail.audit),
        page("/audit/download", trail.download, limited=True),
        page("/reviews", pages.reviews),
        page("/sign-in", pages.sign_in),
        page("/login", pages.login, limited=True),
        page("/callback", pages.callback, limited=True),
        page("/sign-out", pages.sign_out, "POST"),
        data("/logout/backchannel", pages.provider_logout, limited=True),
        page("/reviews/{id}", pages.review),
        data("/reviews/{id}/request", pages.request),
        data("/reviews/{id}/decide", pages.decide),
        page("/passkeys", pages.passkeys),
        data("/passkeys/options", pages.passkey_options),
        data("/passkeys", pages.passkey_add),
        page("/passkeys/{id}/remove", pages.passkey_remove, "POST"),
        data("/v1/sso/device", pages.device, limited=True),
        data("/v1/sso/device/poll", pages.device_poll, limited=True),
        data("/v1/sso/whoami", pages.whoami, "GET"),
        data("/v1/sso/logout", pages.command_logout),
        data("/v1/sso/sessions", pages.open_session),
    ]


def _with_headers(app: ASGIApp) -> ASGIApp:
    extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        async def out(message: Message) -> None:
            if message["type"] in {"http.response.start", "websocket.http.response.start"}:
                own = {name for name, _ in extra}
                kept = [item for item in message.get("headers", []) if item[0].lower() not in own]
                message["headers"] = [*kept, *extra]
            await send(message)

        await app(scope, receive, out)

    return wrapped


def _told(session: Session) -> dict[str, Any]:
    person = session.person
    return {
        "name": person.name,
        "roles": list(person.roles),
        "groups": list(person.groups),
        "expires_at": session.expires_at,
    }


def _in_group(person: Person, review: dict[str, Any]) -> bool:
    return "approver" in person.roles and review["group"] in person.groups


def _visible(person: Person, review: dict[str, Any], *, holds: bool) -> bool:
    """The people who decide, the workspace's sponsor, and those whose work it is to look see a review.

    Those who can break the glass see what waits, and what was broken.
    """
    may_break = holds and (review["state"] in OPEN or review["broken_at"] is not None)
    return (
        is_sponsor(person, str(review["sponsor"])) or _in_group(person, review) or sees_everything(person) or may_break
    )


def _may_look_after(person: Person, review: dict[str, Any]) -> bool:
    """Tell whether the person is one of those who decide afterwards whether breaking the glass was right."""
    broke = {one["approver"] for one in review["decisions"] if one["decision"] == "break_glass"}
    return review["after_state"] in OWED and _in_group(person, review) and person.name not in broke


def _is_wanted(person: Person, review: dict[str, Any], show: str) -> bool:
    if show == "after":
        return True
    if show == "mine":
        return _waits_for(person, review)
    return show == "all" or (review["state"] in UNENDED) == (show == "open")


def _waits_for(person: Person, review: dict[str, Any]) -> bool:
    return _in_group(person, review) and person.name not in review["approved_by"]
