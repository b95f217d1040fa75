"""Which tools of MCP servers over stdio an agent was handed: what the broker says of it, and what the mediators hold it to.

Such tools stay in the workspace, so no ring outside sees their calls. The workspace is told the tools of the delegations that
count, and when each ends; tasks and resources stay where they are.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.policy.delegation import MAX_TOOLS, Tools, ToolScope
from saw.policy.model import Part

MAX_GRANTS = 256
"""Most delegations that are told, those that end last; fewer where :data:`MAX_HANDED` would be passed."""
MAX_HANDED = 8 * 1024 * 1024
"""Longest form that is read (bytes)."""


class HandedInvalid(SawError):
    """What is said of the tools that were handed out cannot be read."""

    code = "handed_tools_invalid"


class Grant(Part, frozen=True):
    """A delegation that counts within a time. Without ``tools`` it says nothing of tools, as :class:`Delegation`."""

    delegation: str
    not_before: datetime
    expires: datetime
    tools: tuple[Tools, ...] | msgspec.UnsetType = msgspec.UNSET


class HandedTools(Part, frozen=True):
    """What an agent was handed. ``bound``: a call that none of ``grants`` covers is refused; else the policy alone counts."""

    bound: bool
    grants: tuple[Grant, ...] = ()


class Handed:
    """What was said, compiled. Immutable."""

    def __init__(self, said: HandedTools) -> None:
        self._bound = said.bound
        self._grants = tuple((one, ToolScope(one.tools)) for one in said.grants)

    def refusal(self, server: str, tool: str, now: datetime) -> str:
        """Return why ``tool`` of ``server`` may not be called at ``now``; an empty text when it may."""
        if not self._bound:
            return ""
        counting = [scope for one, scope in self._grants if one.not_before <= now < one.expires]
        if any(scope.covers(server, tool) for scope in counting):
            return ""
        if not counting:
            return "no delegation of this agent counts now"
        return f"no delegation of this agent covers the tool {tool[:128]} of {server}"


def read_handed(raw: bytes) -> HandedTools:
    """Read what was said strictly; raise :class:`HandedInvalid`, for times without a zone too."""
    try:
        if len(raw) > MAX_HANDED:
            raise ValueError(f"it has {len(raw)} bytes")
        said = jsontext.decode(raw, kind=HandedTools)
        scopes = [ToolScope(one.tools) for one in said.grants]
        if len(scopes) > MAX_GRANTS or any(len(one.tools or ()) > MAX_TOOLS for one in said.grants):
            raise ValueError("it lists too much")
        if any(time.tzinfo is None for one in said.grants for time in (one.not_before, one.expires)):
            raise ValueError("a time has no zone")
    except (msgspec.DecodeError, ValueError) as error:
        raise HandedInvalid(
            f"what was handed out cannot be read: {error}"[:300], cure="ask the broker again"
        ) from error
    return said
