"""The decision service of ring 1: Envoy asks it about every CONNECT and every request of the sandbox.

It answers with the same matcher that ring 2 uses, and adds what only the workspace can see: which process asks. Its answer
carries the headers ring 2 expects; ring 2 then decides again.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import msgspec

from saw.policy.matcher import Matcher
from saw.policy.model import Decision, Request
from saw.policy.review_poll import NOT_REACHED, may_poll, poll_of
from saw.policy.seen_body import is_whole
from saw.policy.websocket import FRAMES_HEADER
from saw.runtime import ring1_settings as facts
from saw.runtime.attribution import Attribution, Caller
from saw.runtime.decide_counts import Counts
from saw.runtime.decide_state import Generations, Heartbeat, Lease
from saw.runtime.generation import Loaded
from saw.runtime.policy_local import PolicyLocal
from saw.runtime.request_desk import SOCKET

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.%]+\]|[^\s\[\]:@/\\?#%\x00-\x20\x7f-\U0010ffff]+)(?::([0-9]{1,5}))?")
_REVIEW = "review_required"
_LOCAL_PORTS = frozenset({80, 443})
_ASKABLE = frozenset(
    {
        "host_not_allowed",
        "binary_not_allowed",
        "method_or_path_not_allowed",
        "deny_rule",
        "operation_not_allowed",
        "action_denied",
    }
)
ASK = (
    f"read the policy at http://{facts.POLICY_HOST}/, or ask people for this call with POST "
    f"http://{facts.POLICY_HOST}/v1/requests (a request, never a grant)"
)
"""The step that a refusal names which another policy could turn into a yes."""
_REMEMBERED, _MOST_SHOWN = 20, 400
"""How many refusals the sandbox can read again, and how much of each text (characters); a list has no more parts than that."""


class DecideConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/decide.json``; every value has the default of the architecture page."""

    socket: str = "/run/saw/decide/authz.sock"
    generations: str = "/run/saw/generations"
    lease: str = "/run/saw/svid/lease.json"
    heartbeat: str = "/run/saw/policy/heartbeat"
    heartbeat_limit_s: float = 15.0
    ask_socket: str = SOCKET
    netns: str = "/run/netns/saw-sandbox"


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One question of Envoy, with the facts that Envoy itself stated."""

    stage: str
    method: str
    authority: str
    path: str
    source: str = ""
    connect: str = ""
    server_name: str = ""
    upgrade: str = ""
    request_id: str = ""
    headers: Mapping[str, str] = {}
    body: bytes | None = None
    body_complete: bool = True


class Answer(msgspec.Struct, frozen=True):
    """The answer: 200 with the headers for ring 2, or 403 with the reason as JSON, which ``refusal`` is before encoding."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    log: dict[str, object]
    refusal: dict[str, object] = {}


class Target(msgspec.Struct, frozen=True):
    """Where a request goes: scheme, host in lower case, port."""

    scheme: str
    host: str
    port: int


class Refused(Exception):
    """A refusal that was decided before the matcher was asked."""

    def __init__(self, reason: str, detail: str, *steps: str) -> None:
        super().__init__(detail)
        self.decision = Decision(verdict="deny", reason=reason, detail=detail, next_steps=steps)


class Decider:
    """Decides with one immutable generation per question."""

    def __init__(
        self,
        generations: Generations,
        lease: Lease,
        heartbeat: Heartbeat,
        attribution: Attribution,
        counts: Counts,
    ) -> None:
        self.counts = counts
        self._generations = generations
        self._lease = lease
        self._heartbeat = heartbeat
        self._attribution = attribution
        self._refused: deque[dict[str, object]] = deque(maxlen=_REMEMBERED)

    def status(self) -> dict[str, object]:
        """Return what is loaded, for policyd's read-back."""
        loaded = self._generations.get()
        return {
            "policy_digest": loaded.digest if loaded else "",
            "revision": loaded.revision if loaded else 0,
            "problem": self._generations.problem,
        }

    def decide(self, asked: Asked) -> Answer:
        """Return the answer to one question; never raises for what a client sent."""
        loaded = self._generations.get()
        caller: Caller | None = None
        target: Target | None = None
        granted: str | None = None
        try:
            target = target_of(asked)
            if asked.stage == "connect" and target.host == facts.POLICY_HOST and target.port in _LOCAL_PORTS:
                # It ends in this process again, whatever the policy says and whether or not there is a lease.
                return _answer(asked, target, None, Decision(verdict="allow", policy=facts.POLICY_HOST), loaded)
            if loaded is None:
                raise Refused(
                    "not_released",
                    self._generations.problem or "no verified policy is loaded in this workspace yet",
                    "wait for the workspace to receive its policy, or ask the platform team",
                )
            for refusal in (self._lease.refusal(), self._heartbeat.refusal()):
                if refusal:
                    raise Refused("lease_expired", refusal, "wait for the workspace to attest again")
            caller = self._attribution.caller(asked.source)
            decision, granted = self._match(loaded, asked, target, caller)
        except Refused as refused:
            decision = refused.decision
        self.counts.add(loaded.digest if loaded else "", decision, tunnel=asked.stage == "connect")
        answer = _answer(asked, target, granted or (caller.binary if caller else None), decision, loaded)
        if answer.refusal:
            kept = {name: _cut(value) for name, value in answer.refusal.items()}
            self._refused.appendleft({"time": datetime.now(UTC).isoformat(timespec="seconds"), **kept})
        return answer

    def current(self) -> Loaded | None:
        """Return the generation in force, None when there is none."""
        return self._generations.get()

    def caller(self, source: str) -> Caller | None:
        """Return which program opened the connection from ``source``, as far as it can be told."""
        return self._attribution.caller(source)

    def refusals(self) -> list[dict[str, object]]:
        """Return the last refusals, newest first: the bodies of the answers with the time of each, long texts cut."""
        return list(self._refused)

    def _match(
        self, loaded: Loaded, asked: Asked, target: Target, caller: Caller | None
    ) -> tuple[Decision, str | None]:
        """Return the decision and, when allowed, the executable that the policy grants it to."""
        request = Request(
            scheme=target.scheme,
            host=target.host,
            port=target.port,
            method=asked.method,
            path=asked.path,
            binary=caller.binary if caller else None,
            ancestors=caller.ancestors if caller else (),
            headers=asked.headers,
            body=asked.body,
            body_complete=asked.body_complete,
            upgrade=asked.upgrade,
        )
        if asked.stage == "connect" and asked.upgrade:
            raise Refused(
                "method_or_path_not_allowed", "a tunnel is opened without an upgrade", "open the tunnel first"
            )
        if asked.stage == "connect":
            return _tunnel(loaded.matcher, request), request.binary
        decision = _inner(loaded.matcher, request)
        if not decision.allowed and decision.reason != _REVIEW:
            return decision, request.binary
        # Ring 2 knows one executable only: name the one that is granted the call, be it the caller or a parent of it.
        for binary in (request.binary, *request.ancestors):
            alone = _inner(loaded.matcher, msgspec.structs.replace(request, binary=binary, ancestors=()))
            if (alone.verdict, alone.reason) == (decision.verdict, decision.reason):
                return decision, binary
        return decision, request.binary


def _cut(value: object) -> object:
    if isinstance(value, str):
        return value[:_MOST_SHOWN]
    if isinstance(value, Mapping):
        return {name: _cut(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_cut(inner) for inner in value[:_REMEMBERED]]
    return value


def _inner(matcher: Matcher, request: Request) -> Decision:
    """Decide on a request to a host: by the rules, or, when it asks for a review, by whether the host is reached at all."""
    asks = not request.upgrade and poll_of(request.method, request.path)
    return may_poll(matcher, request) if asks else matcher.decide(request)


def _tunnel(matcher: Matcher, request: Request) -> Decision:
    """Decide on a CONNECT: it may be opened to every destination of the policy; what is asked inside is decided there."""
    decision = Decision(verdict="deny", reason="host_not_allowed")
    for scheme in ("https", "http"):
        inner = msgspec.structs.replace(request, scheme=scheme, method="GET", path="/", body=None)
        decision = matcher.decide(inner)
        if decision.reason not in NOT_REACHED:
            return Decision(verdict="allow", policy=decision.policy)
        if decision.reason != "host_not_allowed":
            break
    missing = {**decision.rule_missing, "method": "CONNECT"} if decision.rule_missing else None
    return msgspec.structs.replace(decision, rule_missing=missing)


def target_of(asked: Asked) -> Target:
    """Return where ``asked`` goes, or raise :class:`Refused` when its several statements of that disagree.

    CONNECT authority, server name and Host must name one host and port (``3-policy``: CONNECT = SNI = Host).
    """
    host, port = _parse_authority(asked.authority)
    if asked.stage == "connect":
        if port is None:
            raise Refused("not_canonical", "a CONNECT request must name a port", "use host:port")
        return Target("https", host, port)
    if asked.stage == "plain":
        return Target("http", host, port or 80)
    scheme = "https" if asked.stage == "tls" else "http"
    tunnel_host, tunnel_port = _parse_authority(asked.connect)
    stated = {"CONNECT": tunnel_host, "Host": host}
    if scheme == "https":
        stated["SNI"] = asked.server_name.lower()
    if len(set(stated.values())) != 1 or tunnel_port is None or port not in {None, tunnel_port}:
        names = ", ".join(f"{key} {value or 'none'}" for key, value in stated.items())
        raise Refused(
            "host_not_allowed",
            f"one connection must name one destination, but it named: {names}",
            "send the same host in CONNECT, TLS server name and Host",
        )
    return Target(scheme, tunnel_host, tunnel_port)


def _parse_authority(text: str) -> tuple[str, int | None]:
    match = _AUTHORITY.fullmatch(text)
    port = int(match[2]) if match and match[2] else None
    if match is None or (port is not None and not 0 < port < 65536):
        raise Refused("not_canonical", f"the destination {text!r} is not a host name with an optional port")
    return match[1].lower(), port


def _answer(
    asked: Asked, target: Target | None, binary: str | None, decision: Decision, loaded: Loaded | None
) -> Answer:
    shown = {
        "policy_digest": loaded.digest if loaded else "",
        "policy": decision.policy,
        "rule": decision.rule,
        "host": target.host if target else asked.authority,
        "port": target.port if target else None,
        "method": "CONNECT" if asked.stage == "connect" else asked.method,
        "path": "" if asked.stage == "connect" else asked.path.partition("?")[0],
        "binary": binary,
        "request_id": asked.request_id,
    }
    if asked.upgrade:
        shown["upgrade"] = asked.upgrade
    # What only a person may decide goes on: ring 2 decides again, and it alone can let the call wait.
    review = decision.reason == _REVIEW and asked.stage != "connect"
    log: dict[str, object] = {
        "event": "ring1_decision",
        "verdict": "review" if review else decision.verdict,
        "reason": decision.reason,
        **shown,
    }
    if (decision.verdict == "allow" or review) and target is not None:
        headers = [("x-saw-ring1", "review" if review else "allow")]
        if asked.stage != "connect":
            headers += [
                ("x-saw-scheme", target.scheme),
                ("x-saw-port", str(target.port)),
                (facts.ANSWER_AUTHORITY, target.host),
                (facts.ANSWER_PATH, decision.canonical_path),
            ]
            if decision.frames:
                headers.append((FRAMES_HEADER, decision.frames))
            if binary is not None:
                # An agent may name its executables as it likes; nothing of that may become header syntax.
                headers.append(("x-saw-binary", quote(binary, safe="/-_.+@:,=")))
        return Answer(200, tuple(headers), b"", log)
    body: dict[str, object] = {
        "error": "policy_denied",
        "layer": "ring1",
        "protocol": decision.protocol or (target.scheme if target else ""),
        "reason": decision.reason or "host_not_allowed",
        "detail": decision.detail,
        **shown,
        "rule_missing": decision.rule_missing,
        "next_steps": [*decision.next_steps, *([ASK] if decision.reason in _ASKABLE else [])],
    }
    return Answer(403, (("content-type", "application/json"),), json.dumps(body).encode() + b"\n", log, body)


class DecideService:
    """ASGI application on the Unix socket.

    ``/decide`` for Envoy, ``/status`` and ``/counts`` for policyd; ``/refusals`` and what is under ``/policy.local`` for the
    sandbox, which Envoy lets through.
    """

    def __init__(
        self, decider: Decider, log: Callable[[dict[str, object]], None], local: PolicyLocal | None = None
    ) -> None:
        self._decider = decider
        self._log = log
        self._local = local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request (ASGI)."""
        if scope["type"] != "http":
            return
        if scope["path"] == facts.REFUSALS_PATH:  # from the sandbox itself, whose body nobody wants
            body = json.dumps({"refusals": self._decider.refusals()}, indent=1).encode() + b"\n"
            await _respond(send, 200, (("content-type", "application/json"),), body)
            return
        if scope["path"].startswith(f"{facts.POLICY_PREFIX}/"):
            if (found := (404, (), b"") if self._local is None else await self._local.told(scope, receive)) is not None:
                await _respond(send, *found)
            return
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        if scope["path"] == "/decide":
            answer = self._decider.decide(_asked(scope, b"".join(chunks)))
            try:
                self._log(answer.log)
            except OSError:
                answer = _unwritten(answer)
            await _respond(send, answer.status, answer.headers, answer.body)
        elif scope["path"] == "/status":
            body = json.dumps(self._decider.status()).encode()
            await _respond(send, 200, (("content-type", "application/json"),), body)
        elif scope["path"] == "/counts":
            totals = msgspec.json.encode(self._decider.counts.totals())
            await _respond(send, 200, (("content-type", "application/json"),), totals)
        else:
            await _respond(send, 404, (), b"")


def _asked(scope: Scope, body: bytes) -> Asked:
    headers: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        # A header that is there twice is worth what both say together, here as in ring 2.
        name, value = raw_name.decode("latin-1"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return Asked(
        stage=headers.get(facts.FACT_STAGE, ""),
        method=scope["method"],
        authority=headers.get("host", ""),
        path=headers.get(facts.FACT_PATH, ""),
        source=headers.get(facts.FACT_SOURCE, ""),
        connect=headers.get(facts.FACT_CONNECT, ""),
        server_name=headers.get(facts.FACT_SNI, ""),
        upgrade=headers.get(facts.FACT_UPGRADE, ""),
        request_id=headers.get("x-request-id", ""),
        headers={name: headers[name] for name in facts.POLICY_HEADERS if name in headers},
        body=body or None,
        body_complete=is_whole(headers, body),
    )


def _unwritten(answer: Answer) -> Answer:
    """Return the refusal that takes the place of a decision that the log does not take (a full disk)."""
    shown = {name: value for name, value in answer.log.items() if name not in {"event", "verdict", "reason"}}
    body: dict[str, object] = {
        "error": "policy_denied",
        "layer": "ring1",
        "reason": "gatekeeper_stale",
        "detail": "the decision cannot be written down, so nothing is allowed: the workspace's disk takes no more",
        **shown,
        "next_steps": ["free space on the workspace's disk, or ask its sponsor to"],
    }
    return Answer(403, (("content-type", "application/json"),), json.dumps(body).encode() + b"\n", answer.log, body)


async def _respond(send: Send, status: int, headers: tuple[tuple[str, str], ...], body: bytes) -> None:
    encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
    encoded.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
