"""Cases of the suite ``http`` about MCP: a policy that allows one tool with one argument must not be talked into another call.

``${mcp_host}`` and ``${mcp_path}`` are where the policy allows the tool ``note`` with a ``text`` of at most 20 characters,
and no other tool and argument.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

from saw.conformance.case import Case

TWIN = "twin.http.mcp"
TOOL = ("tool_not_allowed", "operation_not_allowed")
ARGUMENT = ("argument_not_allowed",)
UNREADABLE = ("body_unreadable", "status:400")
_JSON = "application/json"
_LONG = "x" * 21


def _call(name: str = "note", identifier: int | None = 1, **arguments: Any) -> dict[str, Any]:
    value = {"jsonrpc": "2.0", "method": "tools/call", "params": {"name": name, "arguments": arguments}}
    return value if identifier is None else {**value, "id": identifier}


_GOOD = _call(text="hello")


def _arguments(body: Any, kind: str = _JSON, *headers: str, target: str = "${mcp_path}") -> dict[str, Any]:
    text = body if isinstance(body, str) else json.dumps(body)
    lines = [
        f"POST {target} HTTP/1.1",
        "Host: ${mcp_host}",
        "X-Probe-Nonce: ${nonce}",
        f"Content-Type: {kind}",
        "Accept: application/json, text/event-stream",
        *headers,
        f"Content-Length: {len(text.encode('latin-1'))}",
        "Connection: close",
    ]
    request = "\r\n".join([*lines, "", text])
    return {"authority": "${mcp_authority}", "request": request, "sni": "${mcp_host}"}


def _case(name: str, title: str, arguments: dict[str, Any], expected: tuple[str, ...]) -> Case:
    return Case(
        f"http.mcp.{name}", "RUN-05", "http", title, "tunnel", arguments, "ring 1: body", expected, TWIN,
        needs=("http_proxy",), seconds=25.0,
    )  # fmt: skip


def _tools() -> list[Case]:
    def asked(name: str, title: str, body: Any, expected: tuple[str, ...] = ARGUMENT) -> Case:
        return _case(name, title, _arguments(body), expected)

    return [
        asked("tool", "a tool that is not allowed", _call("erase"), TOOL),
        asked("tool-case", "the tool in capitals", _call("NOTE", text="hello"), TOOL),
        asked("tool-space", "the tool with a space", _call("note ", text="hello"), (*TOOL, *UNREADABLE)),
        asked("long", "a longer text", _call(text=_LONG)),
        asked("number", "a number in place of the text", _call(text=1)),
        asked("list", "a list of texts", _call(text=["hello"])),
        asked("null", "nothing in place of the text", _call(text=None)),
        asked("object", "an object in place of the text", _call(text={"text": "hello"})),
        asked("more", "one more argument", _call(text="hello", path="/etc/passwd")),
        asked("case", "the argument in capitals", _call(Text="hello")),
        asked("batch", "a batch with one longer text", [_GOOD, _call(identifier=2, text=_LONG)]),
        asked("notification", "a longer text that asks for no answer", _call(identifier=None, text=_LONG)),
        asked("wrapped", "arguments as a text",
              {**_GOOD, "params": {"name": "note", "arguments": '{"text": "hello"}'}}, UNREADABLE),
    ]  # fmt: skip


def _forms() -> list[Case]:
    good, bad = json.dumps(_GOOD), json.dumps(_call(text=_LONG))

    def form(name: str, title: str, *arguments: Any, expected: tuple[str, ...] = UNREADABLE, **more: Any) -> Case:
        return _case(name, title, _arguments(*arguments, **more), expected)

    def twice(key: str, value: object, spelled: str = "") -> str:
        return good.replace(f'"{key}":', f'"{spelled or key}": {json.dumps(value)}, "{key}":')

    return [
        form("text-twice", "the argument twice", twice("text", _LONG)),
        form("text-escaped", "the argument twice, once escaped", twice("text", _LONG, "\\u0074ext")),
        form("name-twice", "the tool twice", twice("name", "erase")),
        form("arguments-twice", "the arguments twice", twice("arguments", {"text": _LONG})),
        form("arguments-case", "the arguments twice, once in capitals", twice("arguments", {"text": _LONG}, "ARGUMENTS")),
        form("header", "another tool in a header", good, _JSON, "Mcp-Method: tools/call", "Mcp-Name: erase"),
        form("url", "a query in the URL", good, target="${mcp_path}?name=erase"),
        form("type", "a call that says it is text", good, "text/plain"),
        form("compressed", "a compressed body", gzip.compress(bad.encode(), mtime=0).decode("latin-1"), _JSON,
             "Content-Encoding: gzip"),
        form("large", "a body beyond what is read", good + " " * 600_000, expected=("body_too_large",)),
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""
    return [
        Case(TWIN, "RUN-05", "http", "an allowed call of a tool", "tunnel", _arguments(_GOOD), is_twin=True, recorded=True,
             needs=("http_proxy",), seconds=25.0)
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks."""
    return [*_tools(), *_forms()]
