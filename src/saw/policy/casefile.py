"""Test cases of a policy: calls and tool calls with the decision they must lead to.

The format (schema 1) serves ``saw policy test`` (``tests.yaml`` next to a policy) and the conformance vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from saw.policy.decode import Checks, Decoder
from saw.policy.errors import PolicyError, Problem
from saw.policy.governance import Governance
from saw.policy.matcher import Matcher
from saw.policy.mcp import decide_tool
from saw.policy.model import Decision, Part, Request
from saw.policy.yamltree import parse

_ZERO = "0" * 40
_DEFAULT_PORTS = {"https": 443, "http": 80}


class Push(Part, frozen=True):
    """One ref of a push, turned into the body that Git would send."""

    ref: str
    operation: Literal["create", "update", "delete"] = "update"


class Call(Part, frozen=True):
    """A request: its URL as the client would write it, and what the rings know about it."""

    url: str
    method: str = "GET"
    binary: str | None = None
    ancestors: tuple[str, ...] = ()
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    body: str | None = None
    body_complete: bool = True
    push: tuple[Push, ...] = ()


class ToolCall(Part, frozen=True):
    """A call of an MCP tool."""

    server: str
    tool: str
    arguments: dict[str, Any] = msgspec.field(default_factory=dict)


class Expected(Part, frozen=True):
    """What the decision must be; fields that are not written are not compared."""

    verdict: Literal["allow", "deny"]
    reason: str | None = None
    policy: str | None = None
    rule: str | None = None
    action_class: str | None = None
    credential: str | None = None
    inference: str | None = None
    canonical_path: str | None = None


class Case(Part, frozen=True):
    """One named case with either ``request`` or ``tool``."""

    name: str
    expect: Expected
    request: Call | None = None
    tool: ToolCall | None = None


class CaseFile(Part, frozen=True):
    """A file of cases; vectors bring ``policy`` and ``governance`` as text, a policy's own tests do not."""

    schema: Literal[1]
    cases: tuple[Case, ...]
    policy: str | None = None
    governance: str | None = None


class Outcome(msgspec.Struct, frozen=True):
    """A case and how it went; ``fault`` is empty when the decision was as expected."""

    name: str
    fault: str
    decision: Decision


def _one_subject(case: Case, report: Any) -> None:
    if (case.request is None) == (case.tool is None):
        report("", "a case has either a request or a tool", "write one of the two")


_CHECKS = Checks(fields={}, structures={Case: _one_subject}, unsupported={}, keys={})


def load_cases(raw: bytes, name: str) -> CaseFile:
    """Return the cases in ``raw``; raise :class:`PolicyError` with all problems."""
    root, problems = parse(raw, name)
    decoder = Decoder(name, _CHECKS)
    value = decoder.structure(root, CaseFile, "")
    problems += decoder.problems
    if problems or not isinstance(value, CaseFile):
        raise PolicyError(problems or [Problem(name, 1, 1, "", "no cases", "write cases")])
    return value


def push_body(refs: tuple[Push, ...]) -> bytes:
    """Return the start of a ``git-receive-pack`` request that changes ``refs`` (gitprotocol-pack)."""
    body = b""
    for index, push in enumerate(refs):
        old = _ZERO if push.operation == "create" else "a" * 40
        new = _ZERO if push.operation == "delete" else "b" * 40
        line = f"{old} {new} {push.ref}".encode() + (b"\x00 report-status side-band-64k" if index == 0 else b"")
        body += f"{len(line) + 4:04x}".encode() + line
    return body + b"0000PACK"


def split_url(url: str) -> tuple[str, str, int, str]:
    """Return scheme, host, port and target of ``url``; the target keeps its exact spelling."""
    parts = urlsplit(url)
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{url!r} is not an http or https URL")
    target = url.split("://", 1)[1]
    cut = min((index for index in (target.find(mark) for mark in "/?#") if index >= 0), default=len(target))
    path = target[cut:]
    return parts.scheme, parts.hostname, parts.port or _DEFAULT_PORTS[parts.scheme], path or "/"


def as_request(call: Call) -> Request:
    """Return ``call`` as the request that a ring would decide on."""
    scheme, host, port, path = split_url(call.url)
    body = call.body.encode() if call.body is not None else None
    if call.push:
        body = push_body(call.push)
    return Request(
        scheme=scheme,
        host=host,
        port=port,
        method=call.method,
        path=path,
        binary=call.binary,
        ancestors=call.ancestors,
        headers={name.lower(): value for name, value in call.headers.items()},
        body=body,
        body_complete=call.body_complete and not call.push,
    )


def _fault(expected: Expected, decision: Decision) -> str:
    wanted: Mapping[str, object] = msgspec.to_builtins(expected)
    differences = [
        f"{field} is {getattr(decision, field)!r} instead of {value!r}"
        for field, value in wanted.items()
        if value is not None and getattr(decision, field) != value
    ]
    return "; ".join(differences) + (f" ({decision.detail})" if differences and decision.detail else "")


def run_case(case: Case, matcher: Matcher, governance: Governance) -> Outcome:
    """Decide ``case`` and compare."""
    if case.tool is not None:
        decision = decide_tool(governance, case.tool.server, case.tool.tool, case.tool.arguments)
    else:
        assert case.request is not None  # noqa: S101 - load_cases saw to it
        decision = matcher.decide(as_request(case.request))
    return Outcome(case.name, _fault(case.expect, decision), decision)
