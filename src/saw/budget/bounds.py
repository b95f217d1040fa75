"""How much a call of a model service uses at most, out of its body. What cannot be told is refused.

The shapes are those of OpenAI (chat completions, completions, embeddings, responses) and Anthropic (messages). No tokenizer makes
more tokens of a text than the text has bytes in UTF-8, and a text in JSON is never shorter, so the bytes of the body bound the
input, with an allowance for what the service adds. Where that does not hold (images, files, what the service has stored) the
route's own bound counts.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from saw.budget.errors import Unbounded

ALLOWANCE = 1024
"""Tokens that a service may add to the input of a call: roles, separators, its own words about tools."""
MOST_TOKENS = 10**9

_CEILINGS = {
    "/v1/chat/completions": ("max_completion_tokens", "max_tokens"),
    "/v1/completions": ("max_tokens",),
    "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",),
}
_COPIES = {"/v1/chat/completions": ("n",), "/v1/completions": ("n", "best_of")}
_EMBEDDINGS = "/v1/embeddings"
_INPUT = ("messages", "input", "prompt", "system")
_TEXT = frozenset(
    {
        "text", "input_text", "output_text", "refusal", "message", "tool_use", "tool_result", "thinking", "redacted_thinking",
        "reasoning", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output",
    }
)  # fmt: skip
"""Kinds of parts whose tokens their bytes bound."""
_STORED = ("previous_response_id", "conversation", "container")
"""Fields that add what the service has stored."""
_PRICED_APART = ("mcp_servers", "web_search_options", "audio", "prediction")
"""Fields whose cost is not a matter of tokens of this call."""
_TIERS = ("auto", "default", "standard", "standard_only", "flex")
_OWN_TOOLS = ("function", "custom", "bash_", "text_editor_", "computer_", "memory_")
"""Kinds of tools that the client runs by itself, or what they begin with."""
_FIELDS = frozenset(
    {
        *(name for names in (*_CEILINGS.values(), *_COPIES.values()) for name in names),
        *_INPUT, *_STORED, *_PRICED_APART, "service_tier", "speed", "modalities", "tools", "stream", "stream_options",
    }
)  # fmt: skip


class Bound(msgspec.Struct, frozen=True):
    """The most that a call uses: tokens of input and output; ``caches``: it has input written to the service's cache."""

    input: int
    output: int
    caches: bool = False


def bound(
    path: str, body: Mapping[str, object], size: int, *, max_input: int | None = None, max_output: int | None = None
) -> Bound:
    """Return the bound of a POST to ``path`` with the parsed ``body`` of ``size`` bytes.

    ``max_input`` and ``max_output`` are what the service takes and gives at most, where that is known. Raises
    :class:`Unbounded` that names the field and the cure.
    """
    for name in body:
        if name not in _FIELDS and name.casefold() in _FIELDS:
            raise Unbounded(f"the field {name[:40]!r} is spelled as no service does", cure=f"write {name.casefold()}")
    _only_tokens(body)
    caches = _mentions(body, "cache_control")
    tokens = size + ALLOWANCE
    if _opaque(body):
        if max_input is None:
            raise Unbounded(
                "the call has images, files, or what the service has stored, and the route has no max_input_tokens",
                cure="send text alone, or ask the policy's owner for max_input_tokens",
            )
        tokens = max_input
    elif max_input is not None and path not in {_EMBEDDINGS, "/v1/completions"}:
        tokens = min(tokens, max_input)
    if path == _EMBEDDINGS:
        return Bound(tokens, 0, caches)
    return Bound(tokens, _output(path, body, max_output) * _copies(path, body), caches)


def _output(path: str, body: Mapping[str, object], most: int | None) -> int:
    fields = _CEILINGS.get(path)
    if fields is None:
        raise Unbounded(f"what a call of {path} costs is not known", cure="use another call")
    stated = [_number(body[name], name, least=0) for name in fields if body.get(name) is not None]
    if stated:
        return max(stated)
    if most is None:
        raise Unbounded(
            "the call does not say how long the answer may be, and the route has no max_output_tokens",
            cure=f"set {fields[0]}",
        )
    return most


def _copies(path: str, body: Mapping[str, object]) -> int:
    stated = [_number(body[name], name, least=1) for name in _COPIES.get(path, ()) if body.get(name) is not None]
    prompts = body.get("prompt") if path == "/v1/completions" else None
    several = isinstance(prompts, list) and not all(isinstance(one, int) for one in prompts)
    return max([1, *stated]) * (max(1, len(prompts)) if several and isinstance(prompts, list) else 1)


def _number(value: object, name: str, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MOST_TOKENS:
        raise Unbounded(f"{name} is not a whole number from {least} to {MOST_TOKENS}", cure="correct it")
    return value


def _only_tokens(body: Mapping[str, object]) -> None:
    """Refuse what costs something that no price of tokens pays for."""
    for name in _PRICED_APART:
        if body.get(name) is not None:
            raise Unbounded(f"the field {name} costs more than its tokens", cure="remove it")
    if body.get("service_tier") not in (None, *_TIERS):
        raise Unbounded("this service_tier has prices of its own", cure="remove service_tier")
    if body.get("speed") not in (None, "standard"):
        raise Unbounded("this speed has prices of its own", cure="remove speed")
    if body.get("modalities") not in (None, ["text"]):
        raise Unbounded("answers other than text have prices of their own", cure="remove modalities")
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        kind = tool.get("type", "custom") if isinstance(tool, dict) else None
        if not isinstance(kind, str) or not kind.startswith(_OWN_TOOLS):
            raise Unbounded(f"the tool {str(kind)[:40]!r} is run, and charged, by the service", cure="remove it")


def _opaque(body: Mapping[str, object]) -> bool:
    """Return whether the input is more than the text in the body."""
    if any(body.get(name) is not None for name in _STORED):
        return True
    return not all(_plain(body[name]) for name in _INPUT if body.get(name) is not None)


def _plain(value: object) -> bool:
    if value is None or isinstance(value, (str, int)):
        return True
    if isinstance(value, list):
        return all(_plain(one) for one in value)
    if not isinstance(value, dict):
        return False
    kind = value.get("type")
    if kind is None:
        # A message has a role. An object without one, such as a stored prompt, is not looked into.
        if not isinstance(value.get("role"), str):
            return False
    elif not isinstance(kind, str) or kind not in _TEXT:
        return False
    if value.get("audio") is not None:
        return False
    return _plain(value.get("content")) and _plain(value.get("output"))


def _mentions(value: object, name: str) -> bool:
    """Return whether an object anywhere in ``value`` has the field ``name``."""
    waiting: list[object] = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            if name in one:
                return True
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
    return False
