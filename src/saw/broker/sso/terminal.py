"""The terminal of a workspace in the browser: its page, the ticket, and the WebSocket between xterm.js and ssh (control ID-02).

What is typed and shown goes through the bastion as with ``saw ssh``: the same certificate, the same recorder, the same reasons to
end. Messages from the page: binary, what was typed; text, :class:`Said`. To the page: binary, what is shown; text, JSON with
``opened``, ``refused`` or ``ended``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from pathlib import Path
from typing import Annotated, Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from saw.broker.bastion_sessions import SessionRequest
from saw.broker.context import Caller, new_request_id
from saw.broker.core import Broker
from saw.broker.errors import ConflictError, ForbiddenError, MalformedError
from saw.broker.http import decode, refusal
from saw.broker.registry import unknown_workspace
from saw.broker.sso.access import may_attach, sees_workspace
from saw.broker.sso.refused import record_refused
from saw.broker.sso.sessions import Session, new_secret
from saw.broker.sso.web import SESSION_COOKIE, Visit, Web, json, require_session
from saw.broker.terminal.client import Client, Key, Size, Way, prepare, way_to
from saw.broker.terminal.settings import TerminalBastion, TerminalSettings
from saw.broker.terminal.tickets import Places, Ticket, Tickets
from saw.errors import SawError

PROTOCOL = "saw-terminal"
"""The subprotocol of the WebSocket. The page offers it together with its ticket, which so is in no address and in no log."""
WINDOW = 256 * 1024
"""Most bytes that were sent to the page and that it has not shown yet; then ssh waits."""
CONNECT_S = 60
"""How long the certificate of a terminal may take to log in, seconds."""
FIRST_WORD_S = 20.0
"""How long the page has to say how large its terminal is; until then nothing is opened."""
LAST_WORDS_S = 10.0
"""How long ssh has to end when its output has."""

_ENDS = {
    "closed": "The shell has ended.",
    "client_gone": "The connection to the bastion has ended.",
    "connection_lost": "The connection to the bastion was lost, or never came about; the terminal says why.",
    "ended_by_operator": "It was ended from outside: its session's page says by whom and why.",
    "sign_in_ended": "Your sign-in has ended. Sign in and open it again.",
    "not_entitled": "The role or the workspace was taken from you.",
    "max_duration": "It lasted as long as a session may. Open it again: what runs in the workspace goes on.",
    "broker_unreachable": "The bastion did not reach the broker for too long.",
    "recording_failed": "It could not be recorded any more. Tell the platform team.",
    "recording_full": "Its recording is as large as one may be. Open it again.",
}

logger = logging.getLogger("saw.broker")


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How large the page's terminal is, in characters."""

    columns: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    rows: Annotated[int, msgspec.Meta(ge=1, le=1000)]


class Said(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the page tells: its new size, or how many further bytes it has shown."""

    size: Window | None = None
    shown: Annotated[int, msgspec.Meta(ge=0, le=WINDOW)] = 0


class Terminal:
    """All terminals of this broker."""

    def __init__(self, web: Web, broker: Broker) -> None:
        self._web = web
        self._broker = broker
        settings = broker.config.terminal
        self._settings = settings if settings is not None else TerminalSettings(files_dir="/nonexistent")
        self._tickets = Tickets(time.monotonic, lambda: new_secret(broker.services))
        self._places = Places(self._settings.per_person, self._settings.in_all)

    @property
    def is_on(self) -> bool:
        """Whether terminals are opened here."""
        return self._settings.bastion is not None

    def prepare(self) -> None:
        """Make the folder of the keys, and end what is left of an earlier broker."""
        prepare(Path(self._settings.runtime_dir))

    def page(self, visit: Visit) -> Response:
        """The page on which the terminal is."""
        session = visit.session()
        name, sponsor = self._seen(str(visit.parameters["id"]), session)
        if not may_attach(session.person, sponsor):
            caller = Caller(session.principal, visit.address, visit.request_id)
            record_refused(self._broker.services, caller, "session.terminal", name)
            raise ForbiddenError(
                f"sessions with {name} are opened by its sponsor, with the role user",
                cure=f"ask {sponsor}",
                code="not_your_workspace",
            )
        self._require_bastion()
        return self._web.render(
            "terminal.html", session, workspace=name, origin=self._web.sso.settings.origin, protocol=PROTOCOL
        )

    def ticket(self, visit: Visit) -> Response:
        """A ticket for the connection, to whom a certificate would be issued now; everybody else reads why not."""
        session = visit.session()
        caller = visit.change(session)
        name, _ = self._seen(str(visit.parameters["id"]), session)
        self._require_bastion()
        self._broker.sessions.admit(caller, name, person=session.person.name, sign_in=session.id)
        self._places.look(session.person.name)
        return json({"ticket": self._tickets.issue(Ticket(session.id, name))})

    async def socket(self, websocket: WebSocket) -> None:
        """The connection: refused before it is accepted unless a page of ours, of this sign-in, asked for it."""
        request_id = new_request_id()
        client = websocket.client
        caller = Caller("anonymous:", client.host if client else "", request_id)
        name = str(websocket.path_params["id"])
        try:
            session = await run_in_threadpool(self._admit, websocket, caller, name)
            person = session.person.name
            self._places.take(person)
        except SawError as error:
            await websocket.send_denial_response(refusal(error, request_id))
            return
        try:
            await websocket.accept(subprotocol=PROTOCOL)
            await self._serve(websocket, Caller(session.principal, caller.address, request_id), session, name)
        except (WebSocketDisconnect, TimeoutError):
            pass
        except Exception:
            logger.exception("terminal %s failed", request_id)
        finally:
            self._places.give_back(person)
            if websocket.application_state is WebSocketState.CONNECTED:
                with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                    await websocket.close()

    def _admit(self, websocket: WebSocket, caller: Caller, name: str) -> Session:
        """Return the sign-in behind the connection. Raises the refusals of pages, and :class:`ForbiddenError`."""
        self._web.require_page(websocket.headers)
        session = require_session(self._web, caller, websocket.cookies.get(SESSION_COOKIE, ""))
        offered = websocket.scope.get("subprotocols", [])
        secret = offered[1] if len(offered) == 2 and offered[0] == PROTOCOL else ""
        self._tickets.take(secret, Ticket(session.id, name))
        return session

    async def _serve(self, websocket: WebSocket, caller: Caller, session: Session, name: str) -> None:
        """Open the session and pass bytes on, until the page or ssh ends."""
        try:
            first = decode((await asyncio.wait_for(_text(websocket), FIRST_WORD_S)).encode(), Said)
            if first.size is None:
                raise MalformedError("the page did not say how large its terminal is", cure="load the page again")
            bastion = self._require_bastion()
            way = await run_in_threadpool(
                way_to, bastion.host, bastion.port, bastion.user, self._settings.source_address
            )
            key = await run_in_threadpool(Key, Path(self._settings.runtime_dir))
        except SawError as error:
            await _tell(websocket, refused=error.as_dict())
            return
        client: Client | None = None
        try:
            identifier, host_name = await run_in_threadpool(self._certify, caller, session, name, key, way)
            # In this thread, not in one of the pool: ssh is ended with the thread that started it.
            client = Client.start(key, way, host_name, _size(first.size))
            await _tell(websocket, opened={"session": identifier})
            if await _pass_on(websocket, client):
                code = await run_in_threadpool(client.stop, LAST_WORDS_S)
                await _tell(websocket, ended=await run_in_threadpool(self._end_of, identifier, code))
        except SawError as error:
            await _tell(websocket, refused=error.as_dict())
        finally:
            if client is not None:
                client.stop()
            key.remove()

    def _certify(self, caller: Caller, session: Session, name: str, key: Key, way: Way) -> tuple[str, str]:
        """Have the key certified for one session; return the session's id, and whose host certificate to look for."""
        wanted = SessionRequest(name, key.public, ttl_s=CONNECT_S)
        given = self._broker.sessions.request(
            caller, wanted, person=session.person.name, sign_in=session.id, from_here=way.source
        )
        key.certified(given["certificate"], given["host_ca"])
        return str(given["session_id"]), str(given["host_name"])

    def _end_of(self, identifier: str, code: int) -> dict[str, Any]:
        """Say why the session has ended: the broker's reason before what ssh's exit code means."""
        reason = self._broker.sessions.show(identifier)["reason"]
        reason = reason or ("connection_lost" if code == 255 else "closed")
        says = _ENDS.get(reason, "The workspace is in a state in which nobody has a session.")
        return {"session": identifier, "reason": reason, "message": says, "exit_code": code}

    def _seen(self, name: str, session: Session) -> tuple[str, str]:
        """Return name and sponsor of a workspace; one that the person may not see does not exist."""
        sponsor = self._broker.overview.sponsor(name)
        if not sees_workspace(session.person, sponsor):
            raise unknown_workspace(name)
        return name, sponsor

    def _require_bastion(self) -> TerminalBastion:
        if self._settings.bastion is None:
            raise ConflictError(
                "no terminal is opened here: the broker is told of no bastion for it",
                cure="use saw ssh; the platform team sets broker_terminal (docs/portal.md)",
                code="no_bastion",
            )
        return self._settings.bastion


async def _pass_on(websocket: WebSocket, client: Client) -> bool:
    """Move bytes both ways, none faster than they are taken; return True when ssh ended, False when the page did."""
    shown = _Shown()

    async def outwards() -> None:
        while piece := await client.read():
            await websocket.send_bytes(piece)
            await shown.sent(len(piece))

    async def inwards() -> None:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if (typed := message.get("bytes")) is not None:
                await client.write(typed)
                continue
            said = decode(str(message.get("text")).encode(), Said)
            shown.confirm(said.shown)
            if said.size is not None:
                client.resize(_size(said.size))

    tasks = [asyncio.create_task(outwards()), asyncio.create_task(inwards())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        ended = tasks[0].done() and not tasks[1].done()
        for task in tasks:
            if task.done():
                task.result()
        return ended
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Shown:
    """How many bytes are on their way to somebody's eyes; more than :data:`WINDOW` are not sent."""

    def __init__(self) -> None:
        self._under_way = 0
        self._room = asyncio.Event()
        self._room.set()

    async def sent(self, size: int) -> None:
        """Count bytes, and wait until there is room for more."""
        self._under_way += size
        if self._under_way >= WINDOW:
            self._room.clear()
            await self._room.wait()

    def confirm(self, size: int) -> None:
        """The page has shown ``size`` bytes."""
        self._under_way = max(0, self._under_way - size)
        if self._under_way < WINDOW:
            self._room.set()


async def _text(websocket: WebSocket) -> str:
    message = await websocket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1005))
    return str(message.get("text") or "")


async def _tell(websocket: WebSocket, **told: dict[str, Any]) -> None:
    await websocket.send_text(msgspec.json.encode(told).decode())


def _size(window: Window) -> Size:
    return Size(window.columns, window.rows)
