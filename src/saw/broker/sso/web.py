"""Between the browser and the pages: who calls, whether a change was meant, headers on every answer, errors in words."""

from __future__ import annotations

import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qsl, quote, urlsplit

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from saw.broker.context import Caller, new_request_id
from saw.broker.errors import BrokerError, ForbiddenError, MalformedError
from saw.broker.http import DEFAULT_LIMIT, answer, decode, read_body
from saw.broker.limits import RateLimit
from saw.broker.peer import SCOPE_KEY, Peer
from saw.broker.sso.rechecks import NotSignedIn
from saw.broker.sso.service import SingleSignOn
from saw.broker.sso.sessions import Session
from saw.budget.ledger import money
from saw.errors import SawError
from saw.review.escapes import escape

T = TypeVar("T")
SESSION_COOKIE = "__Host-saw-session"
LOGIN_COOKIE = "__Host-saw-login"
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "publickey-credentials-get=(self), publickey-credentials-create=(self)",
    "referrer-policy": "same-origin",
    "strict-transport-security": "max-age=31536000",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}
"""Headers of every answer: own files only, in no frame, kept by nobody."""

logger = logging.getLogger("saw.broker")
Handle = Callable[["Visit"], Response]


class Visit:
    """One request: query and body are read and bounded; who is behind it is looked up when it is asked for."""

    def __init__(self, web: Web, request: Request, body: bytes) -> None:
        self._web = web
        self._body = body
        self.request_id = new_request_id()
        self.query = dict(parse_qsl(request.url.query, keep_blank_values=True, max_num_fields=32))
        self.path = request.url.path
        self.method = request.method
        self.parameters = request.path_params
        self.cookies = request.cookies
        self.headers = request.headers
        peer: Peer = request.scope.get(SCOPE_KEY, Peer())
        self.address = peer.address

    @property
    def caller(self) -> Caller:
        """Whoever calls, as long as nobody is known."""
        return Caller("anonymous:", self.address, self.request_id)

    def session(self, *, fresh: bool = False, used: bool = True) -> Session:
        """Return the session of the browser; raise :class:`NotSignedIn`. ``fresh`` asks the provider now.

        What a page asks by itself is no use of the session (``used``): it ends as if nobody had asked.
        """
        return require_session(self._web, self.caller, self.cookies.get(SESSION_COOKIE, ""), fresh=fresh, used=used)

    def command_session(self) -> Session:
        """Return the session of a command line, which has its secret in ``Authorization: Bearer``."""
        kind, _, secret = self.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise NotSignedIn("nobody is signed in", cure="saw login")
        session = self._web.sso.sessions.current(self.caller, secret)
        if session.kind != "cli":
            raise NotSignedIn("this is no session of a command line", cure="saw login")
        self._web.sso.sessions.seen(session.secret)
        return session

    def change(self, session: Session) -> Caller:
        """Return the caller of a change; raise :class:`ForbiddenError` unless a page of this session asked for it."""
        given = self.headers.get("x-csrf-token") or self.form().get("csrf", "")
        if not hmac.compare_digest(given.encode(), session.csrf.encode()):
            raise ForbiddenError(
                "this change was not asked for by a page of your session", cure="load the page again", code="csrf"
            )
        return Caller(session.principal, self.address, self.request_id)

    def form(self) -> dict[str, str]:
        """Return the fields of a form; empty for another kind of body."""
        if not self.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return {}
        try:
            return dict(parse_qsl(self._body.decode("ascii"), keep_blank_values=True, max_num_fields=32))
        except ValueError as error:
            raise MalformedError("the form cannot be read", cure="load the page again") from error

    def asked(self, kind: type[T]) -> T:
        """Return the query as ``kind``, empty fields left out; raise :class:`MalformedError` that names the field."""
        return _fields(self.query, kind)

    def filled_in(self, kind: type[T]) -> T:
        """Return the fields of a form as ``kind``; raise :class:`MalformedError` that names the field."""
        return _fields({name: value for name, value in self.form().items() if name != "csrf"}, kind)

    def data(self, kind: type[T]) -> T:
        """Return the JSON body; raise :class:`MalformedError` that names the field."""
        if self.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise MalformedError("the body is not JSON", cure="send application/json")
        return decode(self._body, kind)


class Web:
    """Makes endpoints. The person behind a page is in the template's ``session``."""

    def __init__(self, sso: SingleSignOn) -> None:
        self.sso = sso
        origin = urlsplit(sso.settings.origin)
        self._host = origin.netloc
        self._limit = RateLimit(120, 10.0, time.monotonic)
        self._templates = Environment(
            loader=PackageLoader("saw.broker.sso"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["money"] = money
        self._templates.filters["visible"] = escape

    def page(self, handle: Handle, *, limited: bool = False) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint whose refusals are pages; who is not signed in is sent there."""
        return self._endpoint(handle, self._error_page, limited=limited)

    def data(self, handle: Handle, *, limited: bool = False) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint whose refusals are JSON."""
        return self._endpoint(handle, _error_data, limited=limited)

    def render(self, name: str, session: Session | None, status: int = 200, **values: Any) -> Response:
        """Return the page ``name``; every text in it is escaped."""
        text = self._templates.get_template(name).render(
            session=session, csrf=session.csrf if session else "", **values
        )
        return HTMLResponse(text, status_code=status)

    def _endpoint(
        self, handle: Handle, failed: Callable[[Visit, SawError], Response], *, limited: bool
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            visit = Visit(self, request, b"")
            try:
                visit = Visit(self, request, await read_body(request, DEFAULT_LIMIT))
                self.require_ours(request)
                if limited:
                    self._limit.take(visit.address)
                response = await run_in_threadpool(handle, visit)
            except ClientDisconnect:
                return Response(status_code=400)
            except SawError as error:
                response = failed(visit, error)
            except Exception:
                logger.exception("request %s failed", visit.request_id)
                response = failed(visit, _Internal("the broker failed", cure="see its log for the request id"))
            response.headers["x-request-id"] = visit.request_id
            return response

        return endpoint

    def require_ours(self, request: Request) -> None:
        """Another name in ``Host`` (DNS rebinding) or another origin behind a change is refused."""
        self._require_host(request.headers)
        origin = request.headers.get("origin")
        if request.method != "GET" and origin is not None and origin != self.sso.settings.origin:
            raise ForbiddenError("another site asks for this", cure="use our own pages", code="csrf")

    def require_page(self, headers: Mapping[str, str]) -> None:
        """Refuse a WebSocket that no page of ours opened: a browser says whose page it was (RFC 6455, section 10.2)."""
        self._require_host(headers)
        if headers.get("origin", "") != self.sso.settings.origin:
            raise ForbiddenError("another site asks for this", cure="use our own pages", code="wrong_origin")

    def _require_host(self, headers: Mapping[str, str]) -> None:
        if headers.get("host", "") != self._host:
            raise ForbiddenError(f"this is {self._host}", cure=f"open {self.sso.settings.origin}", code="wrong_host")

    def _error_page(self, visit: Visit, error: SawError) -> Response:
        if isinstance(error, NotSignedIn):
            return redirect(f"/sign-in?to={quote(self._page_of(visit), safe='/')}", clear=SESSION_COOKIE)
        again = f"/login?fresh=1&to={quote(self._page_of(visit), safe='/')}" if error.code == "sign_in_again" else ""
        return self.render("error.html", None, _status(error), error=error, request_id=visit.request_id, again=again)

    def _page_of(self, visit: Visit) -> str:
        """Return the page to come back to: the one that was asked for, or from which a change was."""
        page = visit.path
        if visit.method != "GET":
            referer = visit.headers.get("referer", "")
            page = urlsplit(referer).path if referer.startswith(f"{self.sso.settings.origin}/") else "/"
        return page if page not in {"/callback", "/sign-in"} else "/"


def require_session(web: Web, caller: Caller, secret: str, *, fresh: bool = False, used: bool = True) -> Session:
    """Return the session of a browser whose cookie is ``secret``; raise :class:`NotSignedIn`. ``fresh`` asks the provider now.

    With ``used`` its idle time begins anew.
    """
    session = web.sso.sessions.current(caller, secret, fresh=fresh)
    if session.kind != "browser":
        raise NotSignedIn("this is no session of a browser", cure="sign in")
    if used:
        web.sso.sessions.seen(session.secret)
    return session


def redirect(to: str, *, clear: str = "") -> Response:
    """Send a browser to one of our own pages, or to the provider."""
    response = RedirectResponse(to, status_code=303)
    if clear:
        set_cookie(response, clear, "", max_age=0)
    return response


def set_cookie(response: Response, name: str, value: str, *, max_age: int) -> None:
    """Give the browser a cookie for this host alone, over TLS alone, out of reach of scripts (RFC 6265bis, ``__Host-``)."""
    response.set_cookie(name, value, max_age=max_age, path="/", secure=True, httponly=True, samesite="lax")


def _fields(given: Mapping[str, str], kind: type[T]) -> T:
    try:
        return msgspec.convert(
            {name: value.strip() for name, value in given.items() if value.strip()}, kind, strict=False
        )
    except msgspec.ValidationError as error:
        raise MalformedError(f"a field is not valid: {error}", cure="correct the named field") from error


def json(value: Mapping[str, Any]) -> Response:
    """Return ``value`` as JSON."""
    return answer(value)


class _Internal(BrokerError):
    code = "internal"
    status = 500


def _error_data(visit: Visit, error: SawError) -> Response:
    return answer({"error": error.code, **error.as_dict(), "request_id": visit.request_id}, _status(error))


def _status(error: SawError) -> int:
    return error.status if isinstance(error, BrokerError) else 403
