"""The HTTP side of ext_authz: reads what Envoy sends, has it judged and recorded, answers 200, 403, or 429 where waiting helps.

A call is allowed only after its audit row is on disk. Whatever goes wrong here is a refusal.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any
from urllib.parse import unquote

from saw.audit.events import EventFactory
from saw.errors import SawError
from saw.gateway.edit_filter import edit_value
from saw.gateway.envoy_parts import (
    EDIT_HEADER,
    HEALTH_PATH,
    METER_HEADER,
    METER_SEAT,
    RECORD_HEADER,
    RECORD_SEAT,
    SEND_SEAT,
    SEND_TICKET,
)
from saw.gateway.errors import SpoolError
from saw.gateway.events import event_of
from saw.gateway.judge import Call, Dial, Judge, Verdict
from saw.gateway.metering import Meter, Told, read_told
from saw.gateway.recording import Recorder
from saw.gateway.recording import read_told as read_piece
from saw.gateway.redaction import WORDS_HEADER, words_value
from saw.gateway.spool import Spool
from saw.gateway.tickets import Tickets
from saw.gateway.usage_filter import BETWEEN, TOLD_HEADERS
from saw.policy.seen_body import CUT_HEADER, LONGEST, is_whole
from saw.policy.websocket import FRAMES_HEADER

LOG = logging.getLogger("saw.gateway")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Answer = tuple[int, list[tuple[bytes, bytes]], bytes]

LATEST_S = 7.0
"""A call that is allowed later than this after it came is refused (seconds): Envoy may have given it up (``AUTHZ_TIMEOUT``)."""
_CONTROL = frozenset({"x-forwarded-client-cert", CUT_HEADER})
_UNAVAILABLE = "the gatekeeper could not decide or record this call, so it is refused"
LOOKS = 20
"""How often the event loop looks at its sockets before a connection counts as open; two or three looks find its end."""
_UNRECORDED = "the gatekeeper cannot write its audit record, so it allows nothing until it can"
_NEXT_STEPS = {
    "no_identity": "attest again; if it lasts, the workspace is not registered on this network",
    "lease_expired": "wait for the next attestation",
    "workspace_not_active": "the workspace was stopped or cut off; ask its sponsor or the security team",
    "agent_retired": "nothing more is done in the name of this agent; its sponsor has it succeeded by another one",
    "digest_mismatch": "wait for the workspace to attest the policy it loaded",
    "not_released": "wait for the workspace to load the current release",
    "gatekeeper_stale": "the perimeter has lost the broker; try again later",
    "gatekeeper_unavailable": "try again shortly; if it lasts, ask the platform team about saw-gatekeeper",
    "credential_unavailable": "ask the platform team to place the credential on the perimeter host",
    "placeholder_unbound": "leave the credential out of this call, or ask the policy's owner to bind one to it",
    "record_unavailable": "ask the platform team for a perimeter that keeps calls, and has room for them",
    "resolution_failed": "check the host name",
    "destination_blocked": "this destination can never be reached from a workspace",
    "budget_unenforced": "ask the platform team for a perimeter that meters, or the policy's owner for a route without budget",
    "outside_delegation": "stay within the task that was handed to this agent, or ask the sponsor for a delegation of this call; "
    "in a sandbox, POST http://policy.local/v1/requests asks people (a request, never a grant)",
    "not_canonical": "send the path and authority in canonical form",
}


def read_call(headers: list[tuple[bytes, bytes]], body: bytes) -> Call:
    """Return the call that Envoy's check request describes. Absent control headers become empty texts.

    Executables arrive percent-encoded, ancestors as a comma-separated list. A control header that is there twice is
    worth nothing: its value becomes unusable, which ends in a refusal.
    """
    values: dict[str, str] = {}
    for raw_name, raw_value in headers:
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        values[name] = f"{values[name]},{value}" if name in values else value
    return Call(
        listener=values.get("x-saw-listener", ""),
        peer=values.get("x-forwarded-client-cert", ""),
        scheme=values.get("x-saw-scheme", "https"),
        authority=values.get("host", ""),
        port=values.get("x-saw-port", ""),
        method=values.get("x-saw-method", ""),
        target=values.get("x-saw-target", ""),
        binary=unquote(values.get("x-saw-binary", "")),
        ancestors=tuple(unquote(path) for path in values.get("x-saw-ancestors", "").split(",") if path),
        request_id=values.get("x-request-id", ""),
        headers={k: v for k, v in values.items() if k not in _CONTROL and not k.startswith("x-saw-")},
        body=body,
        body_complete=is_whole(values, body),
        send_ticket=values.get(SEND_TICKET, ""),
        upgrade=values.get("x-saw-upgrade", ""),
    )


def refusal_body(verdict: Verdict) -> dict[str, object]:
    """Return the JSON that the agent gets for a refused call (see ``docs/architecture.md``)."""
    call, decision = verdict.call, verdict.decision
    hints = decision.next_steps if decision and not decision.allowed else ()
    own = _NEXT_STEPS.get(verdict.reason)
    return {
        "error": "policy_denied",
        "layer": "ring2",
        "protocol": (decision.protocol if decision else "") or call.scheme,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "policy_digest": verdict.policy_digest,
        "policy": decision.policy if decision else "",
        "rule": decision.rule if decision else "",
        "host": verdict.host,
        "port": verdict.port,
        "method": call.method,
        "path": call.target,
        "binary": call.binary,
        **({"upgrade": call.upgrade} if call.upgrade else {}),
        "rule_missing": decision.rule_missing if decision else None,
        **({"budget": dict(verdict.budget)} if verdict.budget is not None else {}),
        **({"limit": dict(verdict.limit)} if verdict.limit is not None else {}),
        "next_steps": list(hints) or [step for step in (verdict.cure or own,) if step],
        "request_id": call.request_id,
    }


class NobodyWaits(SawError):
    """The call was given up by the one who asked, so it is not sent and must not be recorded as allowed."""

    code = "gatekeeper_unavailable"


class AuthorizationApp:
    """An ASGI application; every request to it is one check.

    ``waiting`` are the tickets for calls that the review service takes in, None where there is none; ``relayed`` those for calls
    whose answers are looked at; ``sessions`` those for sessions of PostgreSQL; ``sending`` those that such a call, or
    an approved one, brings back, which was judged and recorded just before. ``services`` says how the service of a transport is
    named in Envoy's files. ``health`` says how this gatekeeper is, with what is in doubt under ``doubt``. ``monotonic``: seconds.
    ``stood_still``: a call may have waited for so long that Envoy has given it up, and one that is never sent is neither charged
    nor recorded as allowed.
    """

    def __init__(
        self,
        judge: Judge,
        spool: Spool,
        factory: EventFactory,
        *,
        waiting: Tickets[Verdict] | None = None,
        sending: Tickets[Verdict] | None = None,
        relayed: Tickets[Verdict] | None = None,
        sessions: Tickets[Verdict] | None = None,
        meter: Meter | None = None,
        recorder: Recorder | None = None,
        services: Callable[[str], str] = str,
        health: Callable[[], Mapping[str, object]] = dict,
        monotonic: Callable[[], float] = time.monotonic,
        stood_still: Callable[[], bool] = lambda: False,
    ) -> None:
        self._recorder = recorder
        self._services = services
        self._health = health
        self._monotonic = monotonic
        self._decided = 0
        self._judge = judge
        self._stood_still = stood_still
        self._spool = spool
        self._factory = factory
        self._waiting = waiting
        self._sending = sending
        self._relayed = relayed
        self._sessions = sessions
        self._meter = meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one check."""
        if scope["type"] != "http":
            return
        body = await _read_body(receive)
        if body is None:
            return
        if (b"x-saw-listener", METER_SEAT.encode()) in scope["headers"]:
            status, headers, content = await self._settle(read_told(scope["headers"], body, TOLD_HEADERS, BETWEEN))
        elif (b"x-saw-listener", RECORD_SEAT.encode()) in scope["headers"]:
            status, headers, content = await self._take(scope["headers"], body)
        elif scope["path"] == HEALTH_PATH and all(name != b"x-saw-listener" for name, _ in scope["headers"]):
            status, headers, content = self._well()
        else:
            left = asyncio.create_task(gone(receive))
            try:
                if self._stood_still() and await _soon(left):
                    return
                status, headers, content = await self.answer(read_call(scope["headers"], body), left.done)
            finally:
                left.cancel()
        headers.append((b"content-length", str(len(content)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    def _well(self) -> Answer:
        """Say how this gatekeeper is: 503 while it would refuse every call, so that another one is asked where there is one."""
        told = {**self._health(), "decided": self._decided}
        return 503 if told.get("doubt") else 200, [(b"content-type", b"application/json")], json.dumps(told).encode()

    async def answer(self, call: Call, gone: Callable[[], bool] = lambda: False) -> Answer:
        """Judge and record one call; return status, headers and body. ``gone``: whether the one who asked has left."""
        came = self._monotonic()
        if call.listener == SEND_SEAT:
            return self._approved(call)
        bound = (call.method, call.authority, call.target)
        try:
            verdict = await self._judge.decide(call)
            try:
                if verdict.allowed and (gone() or self._monotonic() - came > LATEST_S):
                    raise NobodyWaits("nobody waits for the decision any more", cure="make the call again")
                await self._spool.record(event_of(verdict, self._factory))
                self._decided += 1
            except BaseException:
                await self._judge.give_back(verdict, "the call could not be recorded")
                raise
            if self._waiting is not None and (verdict.held or verdict.poll):
                return _to_service(call, self._waiting.issue(bound, verdict), self._services("review"))
            if verdict.dial is not None and verdict.dial.login is not None and self._sessions is not None:
                return _to_service(call, self._sessions.issue(bound, verdict), self._services("postgres"))
            if verdict.server and self._relayed is not None:
                return _to_service(call, self._relayed.issue(bound, verdict), self._services("mcp"))
        except asyncio.CancelledError:
            raise
        except SawError as error:
            LOG.critical("call %s is refused: %s", call.request_id, error.message)
            return _unavailable(call, _UNRECORDED if isinstance(error, SpoolError) else _UNAVAILABLE)
        except Exception as error:  # noqa: BLE001 - any fault of ours must end as a refusal, without its text
            LOG.critical("call %s is refused: internal fault %s", call.request_id, type(error).__name__)
            return _unavailable(call)
        if verdict.dial is None:
            return _refuse(refusal_body(verdict), (verdict.limit or {}).get("retry_after_s"))
        # An answer that nobody looks at is never let through.
        return _unavailable(call) if verdict.server or verdict.dial.login is not None else _onward(verdict.dial)

    async def _settle(self, told: Told) -> Answer:
        """End the charge of a call. Only Envoy's filter says who it is in this way; a call's own header never arrives here."""
        if self._meter is None:
            return 404, [], b""
        try:
            await self._meter.settle(told)
        except SawError as error:
            LOG.critical("the end of charge %s is not in the ledger: %s", told.charge[:64], error.message)
            return 503, [], b""
        return 200, [], b""

    async def _take(self, headers: list[tuple[bytes, bytes]], body: bytes) -> Answer:
        """Keep a piece of an answer, or note its end. Only Envoy's filter speaks in this way, as with charges."""
        if self._recorder is None:
            return 404, [], b""
        told = read_piece(headers, body)
        try:
            kept = await self._recorder.take(told)
        except SawError as error:
            LOG.critical("the answer of record %s is not kept whole: %s", told.record[:64], error.message)
            return 503, [], b""
        return 200 if kept else 409, [], b""

    def _approved(self, call: Call) -> Answer:
        """Let an approved call go where its ticket says; without a good one nothing passes here."""
        bound = (call.method, call.authority, call.target)
        verdict = self._sending.redeem(call.send_ticket, bound) if self._sending is not None else None
        if verdict is None or verdict.dial is None:
            LOG.critical("a call without a good ticket came to the socket for approved calls")
            return _unavailable(call)
        return _onward(verdict.dial)


def _onward(dial: Dial) -> Answer:
    headers = [
        (b"x-saw-upstream", dial.address.encode("latin-1")),
        (b"x-saw-authority", dial.authority.encode("latin-1")),
        (b"x-saw-transport", dial.transport.encode("latin-1")),
        (b"x-saw-path", dial.path.partition("?")[0].encode("latin-1")),
    ]
    if dial.charge:
        headers.append((METER_HEADER.encode(), dial.charge.encode("latin-1")))
    if dial.record:
        headers.append((RECORD_HEADER.encode(), dial.record.encode("latin-1")))
    if dial.edit is not None:
        headers.append((EDIT_HEADER.encode(), edit_value(dial.edit).encode("latin-1")))
    if dial.frames:
        headers.append((FRAMES_HEADER.encode(), dial.frames.encode("latin-1")))
    if dial.inject is not None:
        headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in dial.inject.headers]
        if dial.inject.reflections:
            headers.append((WORDS_HEADER.encode(), words_value(dial.inject.reflections).encode("latin-1")))
    if dial.remove:
        headers.append((b"x-envoy-auth-headers-to-remove", ",".join(dial.remove).encode("latin-1")))
    return 200, headers, b""


def _to_service(call: Call, ticket: str, service: str) -> Answer:
    """Return the answer that has Envoy bring the call to a service of the gatekeeper as it is."""
    headers = [
        (b"x-saw-authority", call.authority.encode("latin-1")),
        (b"x-saw-transport", service.encode()),
        (b"x-saw-path", call.target.partition("?")[0].encode("latin-1")),
        (b"x-saw-ticket", ticket.encode("latin-1")),
    ]
    return 200, headers, b""


def _refuse(body: dict[str, object], retry_after: object = None) -> Answer:
    """Return a refusal; ``retry_after``: the seconds after which the same call may pass, which clients wait for by themselves."""
    headers = [(b"content-type", b"application/json")]
    if retry_after is not None:
        headers.append((b"retry-after", str(retry_after).encode()))
    return 403 if retry_after is None else 429, headers, json.dumps(body).encode()


def _unavailable(call: Call, detail: str = _UNAVAILABLE) -> Answer:
    return _refuse(
        {
            "error": "policy_denied",
            "layer": "ring2",
            "reason": "gatekeeper_unavailable",
            "detail": detail,
            "host": call.authority,
            "method": call.method,
            "path": call.target,
            "next_steps": [_NEXT_STEPS["gatekeeper_unavailable"]],
            "request_id": call.request_id,
        }
    )


async def gone(receive: Receive) -> None:
    """Wait until whoever asked has closed the connection; Envoy does so when it gives a check up."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _soon(left: asyncio.Task[None]) -> bool:
    """Return whether the connection is closed already; the event loop hears of that when it looks at its sockets."""
    for _ in range(LOOKS):
        await asyncio.sleep(0)
        if left.done():
            return True
    return False


async def _read_body(receive: Receive) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > 2 * LONGEST:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)
