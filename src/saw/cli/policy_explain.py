"""``saw policy explain``: which rule decided on a call, and what would have allowed it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from saw.cli.answers import Add, Answer, read_file
from saw.errors import ConfigError
from saw.policy.bundle import read_content
from saw.policy.casefile import Call, Push, ToolCall, as_request, tool_request
from saw.policy.explain import Explanation, explain_call, explain_tool
from saw.policy.loader import Bundle, load_bundle_folder
from saw.policy.matcher import Matcher
from saw.policy.model import Request
from saw.policy.strict_json import NotStrict, loads

_RECEIVE_PACK = "/git-receive-pack"


def _bundle(path: str) -> Bundle:
    """Return the bundle in a folder or a signed bundle file; signatures are not the question here."""
    return load_bundle_folder(path) if Path(path).is_dir() else read_content(read_file(path))


def _push(text: str) -> Push:
    ref, colon, operation = text.rpartition(":")
    try:
        return msgspec.convert({"ref": ref, "operation": operation} if colon else {"ref": text}, Push)
    except msgspec.ValidationError as error:
        reason = f"{text!r} is not a change of a ref"
        raise ConfigError(reason, cure="write refs/heads/x, or refs/heads/x:create (update, delete)") from error


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ConfigError(f"{text!r} is not a header", cure="write for example 'Accept: text/event-stream'")
    return name.strip().lower(), value.strip()


def _request(options: argparse.Namespace) -> Request:
    method, url = options.method, options.url
    if method and url is None and "://" in method:
        method, url = "", method
    if not url:
        raise ConfigError("no call is named", cure="give METHOD URL, URL with --push or --model, or --tool")
    body = read_file(options.body_file).decode("utf-8", "surrogateescape") if options.body_file else None
    if options.model is not None:
        body = json.dumps({"model": options.model})
        scheme, _, rest = url.partition("://")
        url = url if rest.rstrip("/").partition("/")[1] else f"{scheme}://{rest.rstrip('/')}/v1/chat/completions"
    pushed = tuple(_push(text) for text in options.push)
    if pushed and not url.endswith(_RECEIVE_PACK):
        url = url.rstrip("/") + _RECEIVE_PACK
    method = method or ("POST" if pushed or body is not None else "GET")
    headers = {"content-type": "application/json"} if body is not None else {}
    headers |= dict(_header(text) for text in options.header)
    try:
        call = Call(
            url=url,
            method=method,
            binary=options.binary,
            headers=headers,
            body=body,
            push=pushed,
            message=options.message,
        )
        request = as_request(call)
    except (ValueError, UnicodeEncodeError) as error:
        raise ConfigError(f"the call cannot be built: {error}", cure="give an absolute URL") from error
    if request.message and not request.upgrade:
        raise ConfigError("only a WebSocket carries messages", cure="give a URL that begins with wss: or ws:")
    return request


def _tool(options: argparse.Namespace, bundle: Bundle) -> Explanation:
    server, tool = options.server, options.tool
    if server is None:
        names = [name for name, known in bundle.governance.mcp.servers.items() if tool in known.tools]
        names = names or list(bundle.governance.mcp.servers)
        if len(names) != 1:
            raise ConfigError(f"the server of {tool} is not named", cure="give --server")
        server = names[0]
    try:
        arguments = loads(options.args.encode(), limit=1024 * 1024)
    except NotStrict as error:
        raise ConfigError(f"--args is not JSON: {error}", cure="write one JSON object") from error
    if not isinstance(arguments, dict):
        raise ConfigError("--args is not a JSON object", cure='write for example \'{"path": "/workspace"}\'')
    over_http = Matcher.compile(bundle.policy, bundle.governance).mcp_server_named(server)
    if over_http is not None:
        call = ToolCall(server=server, tool=tool, arguments=arguments, binary=options.binary)
        return explain_call(bundle, tool_request(over_http, call))
    return explain_tool(bundle, server, tool, arguments)


def _lines(found: Explanation, where: str) -> Iterator[str]:
    decision = found.decision
    yield f"{decision.verdict}: {decision.reason}" if decision.reason else decision.verdict
    for name in ("detail", "policy", "rule", "action_class", "credential", "inference", "canonical_path", "frames"):
        value = getattr(decision, name)
        if value:
            yield f"{name}: {value}"
    for asked in decision.operations:
        yield f"asks for: {asked.text()}"
    for place in found.rules:
        yield f"decided at: {where}{place}"
    if not decision.allowed and not found.rules:
        yield "decided at: nothing in the bundle is about this call"
    if found.impossible:
        yield f"no rule would allow it: {found.impossible}"
    elif found.changes:
        yield "what would have allowed it:"
        for change in found.changes:
            yield from (f"  {line}" for line in change.text().splitlines())
    for note in found.notes:
        yield f"note: {note}"
    for step in () if found.changes else decision.next_steps:
        yield f"next: {step}"


def _builtins(found: Explanation) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(found)
    for change, plain in zip(found.changes, value["changes"], strict=True):
        plain["yaml"] = change.text()
    return value


def explain(options: argparse.Namespace) -> Answer:
    """Say what would be decided on one call, which rule decides, and what would have allowed it.

    A call is METHOD URL; with --push, URL is the repository; with --model, URL is an inference route; with --tool, none.
    """
    bundle = _bundle(options.path)
    found = _tool(options, bundle) if options.tool else explain_call(bundle, _request(options))
    where = f"{options.path.rstrip('/')}/" if Path(options.path).is_dir() else f"{options.path}: "
    text = "\n".join(_lines(found, where))
    return {"ok": found.decision.allowed, **_builtins(found)}, text, 0 if found.decision.allowed else 1


def register(add: Add) -> None:
    """Add the command to the group ``saw policy``."""
    sub = add("explain", explain, "say what would be decided on a call, why, and what would have allowed it")
    sub.add_argument("path", help="bundle folder, or signed bundle file")
    sub.add_argument("method", nargs="?", help="HTTP method; may be left out with --push and --model")
    sub.add_argument("url", nargs="?")
    sub.add_argument("--binary", help="resolved path of the calling program")
    sub.add_argument(
        "--body-file", help="file with the request body; sent as application/json unless --header says else"
    )
    sub.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="a header; may be repeated")
    sub.add_argument(
        "--push", action="append", default=[], metavar="REF[:OPERATION]", help="a ref that is pushed; may be repeated"
    )
    sub.add_argument(
        "--message",
        choices=("text", "binary"),
        default="",
        help="ask whether such a message may be sent on a WebSocket",
    )
    sub.add_argument("--model", help="the model that an inference call names")
    sub.add_argument("--tool", help="a tool of an MCP server")
    sub.add_argument("--server", help="its server (default: the only one that has it)")
    sub.add_argument("--args", default="{}", metavar="JSON", help="its arguments")
