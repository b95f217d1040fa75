"""What an MCP server may say: which of its answers, requests and notifications reach the agent, and what is taken out of them.

The mediator of servers over stdio and ring 2, for servers over HTTP, decide by these functions. Messages were parsed by
:mod:`saw.policy.mcp_messages` before. Forms: Model Context Protocol, revisions 2024-11-05 to 2025-11-25.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from saw.policy.mcp_messages import POLICY_DENIED, Json, error_message
from saw.policy.tool_rules import McpServer, Tool

INITIALIZE, LIST_TOOLS = "initialize", "tools/list"
SERVER_NOTIFICATIONS = frozenset(
    {"notifications/message", "notifications/progress", "notifications/cancelled", "notifications/tools/list_changed"}
)
"""What a server may tell without being asked."""
READING_NOTIFICATIONS = frozenset(
    {"notifications/resources/updated", "notifications/resources/list_changed", "notifications/prompts/list_changed"}
)
"""What it may tell besides where resources and prompts can be read."""
SERVER_CAPABILITIES = frozenset({"tools", "logging"})
READING_CAPABILITIES = frozenset({"resources", "prompts", "completions"})
ELICITATION_REQUIRED = -32042
"""The error by which a server has the client show an address to its user (revision 2025-11-25)."""
_UNPINNED = "_meta"


def definition_digest(tool: Mapping[str, object]) -> str:
    """Return ``sha256:`` and the hash of a tool's definition as ``tools/list`` gives it, without its ``_meta``.

    Hashed are the bytes of JSON in ASCII with sorted keys and no spaces.
    """
    said = {name: value for name, value in tool.items() if name != _UNPINNED}
    text = json.dumps(said, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


class Listed(NamedTuple):
    """What became of one list of tools: how many were ``offered`` and ``allowed``, which have the definition that was
    ``pinned``, and which a ``changed`` one, with the hash of it."""

    offered: int
    allowed: int
    pinned: frozenset[str]
    changed: Mapping[str, str]


class ServerTools(NamedTuple):
    """The tools of a server: those that a caller may call now, and the names of all that its rules have."""

    usable: Mapping[str, Tool]
    names: Collection[str]


class Definitions:
    """Which tools of one server were last listed with another definition than the pinned one, until they are pinned anew."""

    def __init__(self) -> None:
        self._failed: dict[str, str] = {}

    def note(self, listed: Listed, tools: Mapping[str, Tool], names: Collection[str] | None = None) -> None:
        """Take in one list of the server's, judged by the pins of ``tools``.

        ``names`` are those of all tools that the server's rules have; None where ``tools`` are all of them.
        """
        self._failed = after(self._failed, listed, tools, names)

    def changed(self, name: str, rule: Tool | None) -> bool:
        """Return whether the server's definition of ``name`` is not the one that ``rule`` pins."""
        return rule is not None and rule.definition is not None and self._failed.get(name) == rule.definition


def after(
    failed: Mapping[str, str], listed: Listed, tools: Mapping[str, Tool], names: Collection[str] | None = None
) -> dict[str, str]:
    """Return which tools were last listed with another definition than the pinned one, each with that pin, after one more list.

    ``failed`` are those before it, ``tools`` and ``names`` as in :meth:`Definitions.note`. Only what the list has as it is
    pinned is forgotten, and what is no tool of the server any more: what one caller may not call, another one may.
    """
    changed = {name: tools[name].definition or "" for name in listed.changed}
    kept = {name: pin for name, pin in failed.items() if name not in listed.pinned}
    return {name: pin for name, pin in {**kept, **changed}.items() if name in (tools if names is None else names)}


class Answered(NamedTuple):
    """An answer as it is passed on; ``listed`` where it was a list of tools, ``withheld`` where something was taken out."""

    message: Json
    listed: Listed | None = None
    withheld: str = ""


def judge_answer(
    method: str,
    message: Json,
    tools: Mapping[str, Tool],
    *,
    layer: str,
    capabilities: frozenset[str] = SERVER_CAPABILITIES,
    shows: Callable[[str], bool] = lambda _: True,
) -> Answered:
    """Return what of a server's answer to a request of ``method`` reaches the agent.

    ``tools`` are those that the agent may call (:func:`usable`). A list keeps these alone, and of those with a pinned definition
    the ones that have it; ``shows`` may leave out more of them, about which is learned all the same what the server says.
    ``initialize`` keeps ``capabilities``. A result that is no object, a list of tools that is none, and
    an error that stands for a request to the user become an error that says so, from ``layer``.
    """
    if "error" in message:
        return _error(message, layer)
    result = message.get("result")
    if not isinstance(result, dict):
        return _refused(message, layer, "the result is not an object")
    if method == INITIALIZE:
        return _initialized(message, result, capabilities)
    if method == LIST_TOOLS:
        return _listed(message, result, tools, layer, shows)
    return Answered(message)


def usable(server: McpServer) -> dict[str, Tool]:
    """Return the tools of ``server`` that may be called at all."""
    return {name: tool for name, tool in server.tools.items() if tool.class_ != "deny"}


def _refused(message: Json, layer: str, why: str) -> Answered:
    return Answered(refusal(message["id"], layer, "answer_unreadable", why), withheld=why)


def refusal(identifier: object, layer: str, reason: str, why: str) -> Json:
    """Return the error that takes the place of an answer which is not passed on."""
    data: Json = {
        "error": "policy_denied",
        "layer": layer,
        "reason": reason,
        "detail": why,
        "next_steps": ["go on without this answer, and tell the server's owner what detail says"],
    }
    return error_message(identifier, POLICY_DENIED, f"the server's answer is not passed on: {why}", data)


def _error(message: Json, layer: str) -> Answered:
    error = message["error"]
    if not isinstance(error, dict) or type(error.get("code")) is not int or not isinstance(error.get("message"), str):
        return _refused(message, layer, "the error has no code and message")
    if error["code"] == ELICITATION_REQUIRED:
        why = "the server asks for something to be shown to the user, which is not offered here"
        return Answered(refusal(message["id"], layer, "not_offered", why), withheld=why)
    return Answered(message)


def _initialized(message: Json, result: Json, capabilities: frozenset[str]) -> Answered:
    offered = result.get("capabilities")
    if not isinstance(offered, dict):
        return Answered(message)
    kept = {name: value for name, value in offered.items() if name in capabilities}
    return Answered({**message, "result": {**result, "capabilities": kept}})


def _listed(
    message: Json, result: Json, tools: Mapping[str, Tool], layer: str, shows: Callable[[str], bool]
) -> Answered:
    offered = result.get("tools")
    if not isinstance(offered, list):
        return _refused(message, layer, "the list of tools is not a list")
    named = [tool for tool in offered if isinstance(tool, dict) and isinstance(tool.get("name"), str)]
    often = Counter(tool["name"] for tool in named)
    kept: list[Json] = []
    pinned: set[str] = set()
    changed: dict[str, str] = {}
    for tool in named:
        name = tool["name"]
        rule = tools.get(name)
        if rule is None:
            continue
        if rule.definition is not None and (digest := definition_digest(tool)) != rule.definition:
            changed[name] = digest
        # Which of two definitions a client takes for a name, no one can tell.
        elif often[name] == 1 and rule.definition is None:
            kept.append(tool)
        elif often[name] == 1:
            kept.append({key: value for key, value in tool.items() if key != _UNPINNED})
            pinned.add(name)
    kept = [tool for tool in kept if shows(str(tool["name"]))]
    listed = Listed(len(offered), len(kept), frozenset(pinned), changed)
    return Answered({**message, "result": {**result, "tools": kept}}, listed)


def without_client_capabilities(message: Json) -> Json:
    """Return ``initialize`` without what the client offers: sampling and elicitation let a server ask for more, and roots let
    the client move a server's directories."""
    params = message.get("params")
    return {**message, "params": {**params, "capabilities": {}}} if isinstance(params, dict) else message
