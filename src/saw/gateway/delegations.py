"""What each workspace's agent was handed, verified here: signature, line of records, and that each lies within the one before.

The broker's word alone grants nothing: a statement counts by its signature, and a record made from another one counts only
while its whole line is there, counts, and narrows from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import lru_cache

import msgspec

from saw.errors import SawError
from saw.gateway.state import WorkspaceEntry
from saw.identity.names import IdentityError
from saw.identity.statement import verify_statement
from saw.policy.actions import reads, units
from saw.policy.delegation import (
    MAX_DEPTH,
    STATEMENT_TYPE,
    Delegation,
    DelegationInvalid,
    Scope,
    ToolScope,
    is_read,
    parse_delegation,
    wider,
)
from saw.policy.mcp_http import CALL_TOOL
from saw.policy.model import Decision, Request


class Handed(msgspec.Struct, frozen=True):
    """A verified record, compiled."""

    record: Delegation
    scope: Scope
    tools: ToolScope


class Line(msgspec.Struct, frozen=True):
    """A record of a workspace's agent and the time in which its whole line counts."""

    record: Delegation
    scope: Scope
    tools: ToolScope
    not_before: datetime
    expires: datetime


class Engagement(msgspec.Struct, frozen=True):
    """What a workspace's agent holds; ``required``: a call that none of it covers is refused."""

    required: bool = False
    lines: tuple[Line, ...] = ()


NONE = Engagement()


class OutsideDelegation(SawError):
    """No delegation covers the call; ``code`` is the reason of the refusal."""

    code = "outside_delegation"

    def __init__(self, code: str, message: str, delegation: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.delegation = delegation


def verify_statements(
    entries: Iterable[WorkspaceEntry], known: Mapping[str, Handed], ca_pem: bytes, now: datetime
) -> tuple[dict[str, Handed], dict[str, str]]:
    """Return the verified records by statement (those of ``known`` are not verified twice), and why others were refused."""
    found: dict[str, Handed] = {}
    refused: dict[str, str] = {}
    for statement in {text for entry in entries for text in entry.delegations}:
        handed = known.get(statement)
        try:
            found[statement] = handed or _verify(statement, ca_pem, now)
        except (IdentityError, DelegationInvalid) as error:
            refused[statement[-16:]] = f"{error.code}: {error.message}"
    return found, refused


def _verify(statement: str, ca_pem: bytes, now: datetime) -> Handed:
    verified = verify_statement(statement, STATEMENT_TYPE, ca_pem, now)
    record = parse_delegation(verified.payload)
    if record.expires > verified.not_after:
        raise IdentityError(f"delegation {record.id} outlives its signer's certificate", cure="issue it again")
    return Handed(record, Scope(record.resources), ToolScope(record.tools))


def engagements(entries: Iterable[WorkspaceEntry], verified: Mapping[str, Handed]) -> dict[str, Engagement]:
    """Return what each workspace holds, out of the statements that are verified."""
    found: dict[str, Engagement] = {}
    for entry in entries:
        handed = {}
        for statement in entry.delegations:
            if statement in verified:
                handed[verified[statement].record.id] = verified[statement]
        lines = [
            line
            for item in handed.values()
            if item.record.workspace == entry.id and item.record.agent == entry.agent
            for line in _line(item, handed)
        ]
        if entry.delegation_required or entry.delegations:
            found[entry.id] = Engagement(required=True, lines=tuple(lines))
    return found


def _line(item: Handed, handed: Mapping[str, Handed]) -> list[Line]:
    """Return the line that ends in ``item``, or nothing when a record of it is missing or wider than the one before."""
    not_before, expires = item.record.not_before, item.record.expires
    at = item.record
    for _ in range(MAX_DEPTH):
        if not at.parent:
            return [Line(item.record, item.scope, item.tools, not_before, expires)]
        before = handed.get(at.parent)
        if before is None or not _narrows(at, before.record):
            return []
        at = before.record
        not_before, expires = max(not_before, at.not_before), min(expires, at.expires)
    return []


@lru_cache(maxsize=4096)
def _compared(child: bytes, parent: bytes) -> bool:
    return not wider(parse_delegation(child), parse_delegation(parent))


def _narrows(child: Delegation, parent: Delegation) -> bool:
    return _compared(msgspec.json.encode(child), msgspec.json.encode(parent))


def reach(engagement: Engagement, host: str, port: int, now: datetime) -> str:
    """Return the id of a delegation that covers some call to ``host`` (lower case) and ``port``; empty where none is needed.

    Raises :class:`OutsideDelegation` where one is needed and there is none.
    """
    if not engagement.required:
        return ""
    for line in engagement.lines:
        if line.not_before <= now < line.expires and line.scope.names(host, port):
            return line.record.id
    raise OutsideDelegation("outside_delegation", f"no delegation of this agent covers anything at {host}")


def shown(engagement: Engagement, request: Request, path: str, server: str, now: datetime) -> Callable[[str], bool]:
    """Return which tools of ``server`` belong into the list that the agent gets at the canonical ``path`` of ``request``."""
    scopes = [
        line.tools
        for line in engagement.lines
        if line.not_before <= now < line.expires and line.scope.covers(request.host.lower(), request.port, "POST", path)
    ]
    return lambda tool: not engagement.required or any(scope.covers(server, tool) for scope in scopes)


def brought(engagement: Engagement, now: datetime) -> tuple[str, ...]:
    """Return the classes of data that everything handed to the agent brings now, whichever of it covers a call."""
    live = (line.record for line in engagement.lines if line.not_before <= now < line.expires)
    return tuple(sorted({name for record in live for name in record.classes}))


def cover(
    engagement: Engagement,
    request: Request,
    decision: Decision,
    *,
    git_host: bool,
    now: datetime,
    approved: bool = False,
    server: str = "",
) -> str:
    """Return the id of the delegation that covers a call which policy allows, or an empty text where none is needed.

    Raises :class:`OutsideDelegation` with ``outside_delegation``, or ``review_required`` where one covers the call but lets
    a person decide on writes; ``approved``: a person has. ``server`` is the MCP server of the policy that the call goes to, empty
    where it goes to none. Every tool that it calls must lie within the one delegation that covers the rest of it.
    """
    if not engagement.required:
        return ""
    path = decision.canonical_path.partition("?")[0]
    host, method = request.host.lower(), request.method.upper()
    counting = [line for line in engagement.lines if line.not_before <= now < line.expires]
    covering = [line for line in counting if line.scope.covers(host, request.port, method, path)]
    if not covering:
        why = "covers it" if counting else "counts now"
        raise OutsideDelegation("outside_delegation", f"no delegation of this agent {why}")
    tools = [asked.name for asked in decision.operations if asked.kind == CALL_TOOL]
    covering = [line for line in covering if all(line.tools.covers(server, tool) for tool in tools)]
    if not covering:
        called = f"{', '.join(tools)[:256]} of {server or 'a server that the policy does not name'}"
        raise OutsideDelegation("outside_delegation", f"no delegation of this agent covers the tool {called}")
    read = is_read(method, path, git_host=git_host, inference=decision.inference is not None)
    if decision.protocol:
        read = all(reads(decision.protocol, unit) for unit in units(decision.protocol, decision.operations))
    if read:
        return covering[0].record.id
    for line in covering:
        if line.record.approval == "policy":
            return line.record.id
    reviewed = [line.record.id for line in covering if line.record.approval == "review"]
    if reviewed and approved:
        return reviewed[0]
    if reviewed:
        raise OutsideDelegation(
            "review_required", f"delegation {reviewed[0]} lets a person decide on every write", reviewed[0]
        )
    raise OutsideDelegation("outside_delegation", f"delegation {covering[0].record.id} is read-only")
