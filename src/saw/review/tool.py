"""A call of an MCP tool over stdio that waits for people: what is asked, its digest, and how it is shown.

The server of such a tool runs inside the workspace, so nobody outside can make the call. The workspace's mediator asks, waits,
claims with the same bytes, and writes them to the server: once. The broker takes the server's command, the pinned definition and
the reviewers from its own copy of the policy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

import msgspec

from saw.errors import SawError
from saw.policy import strict_json
from saw.review.escapes import plain
from saw.review.json_text import Members, Unreadable, parse_json, tree
from saw.review.messages import Digest, Message, Name, ReviewId, ReviewState, Secret

MAX_PARAMS = 256 * 1024
"""Longest ``params`` of a call that can wait for a review (bytes): all of it is shown."""
_DOMAIN = b"saw-reviewed-tool/1"
_MEMBERS = frozenset({"name", "arguments"})

WorkspaceId = Annotated[str, msgspec.Meta(max_length=64)]
Server = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Params = Annotated[bytes, msgspec.Meta(max_length=MAX_PARAMS)]
MaybeDigest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]


class ToolRefused(SawError):
    """The parameters of a call are not what can be reviewed."""

    code = "tool_call_refused"


class ReviewedTool(Message, frozen=True, kw_only=True):
    """What is kept and shown. ``params`` are the exact bytes that the server gets as ``params`` of ``tools/call`` (base64 in
    JSON); ``command`` and ``definition`` (empty: not pinned) are the policy's."""

    server: Server
    command: tuple[str, ...]
    tool: Name
    definition: str = ""
    params: Params


class AskTool(Message, frozen=True, kw_only=True):
    """``POST /v1/workspace/reviews``: ask people about a call; the same one that waits already is answered with its review."""

    workspace_id: WorkspaceId
    policy_digest: Digest
    server: Server
    params: Params


class ClaimTool(AskTool, frozen=True, kw_only=True):
    """``POST /v1/workspace/reviews/{id}/claim``: begin. ``claim`` is a secret of this one attempt; the same one has the same
    answer."""

    claim: Secret


class EndTool(Message, frozen=True, kw_only=True):
    """``POST /v1/workspace/reviews/{id}/result``: how the one attempt ended, in the workspace's words.

    ``done`` needs ``answer_sha256``, the SHA-256 of the message that the agent got; ``failed``: nothing was written to the
    server.
    """

    workspace_id: WorkspaceId
    claim: Secret
    outcome: Literal["done", "failed", "unknown"]
    answer_sha256: MaybeDigest = ""
    detail: Annotated[str, msgspec.Meta(max_length=512)] = ""


class ToolView(Message, frozen=True, kw_only=True):
    """A review as its workspace may see it: ``GET /v1/workspace/reviews/{id}?workspace_id=…&wait=SECONDS`` (while it is pending,
    at most 30)."""

    id: ReviewId
    state: ReviewState
    request_digest: Digest
    opened_at: str
    expires_at: str
    approvals: int = 0
    quorum: int = 1
    detail: str = ""
    claim_ends_at: str | None = None


def params_of(tool: str, arguments: Mapping[str, object]) -> bytes:
    """Return ``params`` of a call in the one form that is reviewed: ASCII JSON, members sorted by name, without ``_meta``."""
    found = {"arguments": arguments, "name": tool}
    return json.dumps(found, ensure_ascii=True, allow_nan=False, sort_keys=True, separators=(",", ":")).encode()


def read_params(params: bytes) -> tuple[str, dict[str, object]]:
    """Return tool and arguments; raise :class:`ToolRefused` unless ``params`` are in the form of :func:`params_of`."""
    try:
        value = strict_json.loads(params, limit=MAX_PARAMS)
    except strict_json.NotStrict as error:
        raise ToolRefused(f"the parameters are not JSON: {error}", cure="send them as tools/call has them") from error
    tool = value.get("name") if isinstance(value, dict) else None
    arguments = value.get("arguments") if isinstance(value, dict) else None
    if not isinstance(value, dict) or not isinstance(tool, str) or not isinstance(arguments, dict):
        raise ToolRefused("the parameters have no name and arguments", cure="send them as tools/call has them")
    if not tool or len(tool) > 255:
        raise ToolRefused("the name of the tool is empty or too long", cure="use a name with at most 255 characters")
    if value.keys() != _MEMBERS or params_of(tool, arguments) != params:
        raise ToolRefused(
            "the parameters are not in the form that is reviewed",
            cure="write name and arguments alone, sorted, in ASCII",
        )
    try:
        parse_json(params)
    except Unreadable as error:
        raise ToolRefused(f"people could not be shown the arguments: {error}", cure="send flatter ones") from error
    return tool, arguments


def tool_digest(workspace_id: str, call: ReviewedTool) -> str:
    """Return the SHA-256 (lower-case hex) of ``call`` as asked by ``workspace_id``.

    Hashed are the name of this form, workspace, server, number of words of the command, each word, tool, definition and
    ``params``. Each is preceded by its length in bytes (8 bytes, big-endian). Texts count in UTF-8, numbers in decimal.
    """
    digest = hashlib.sha256()
    for part in _parts(workspace_id, call):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()


def _parts(workspace_id: str, call: ReviewedTool) -> Iterator[bytes]:
    yield _DOMAIN
    texts = (workspace_id, call.server, str(len(call.command)), *call.command, call.tool, call.definition)
    for text in texts:
        yield text.encode("utf-8", "surrogatepass")
    yield call.params


def render_tool(workspace_id: str, call: ReviewedTool) -> str:
    """Return the text that a reviewer sees; it ends with a newline and has no character that steers a terminal."""
    lines = [
        f"workspace   {plain(workspace_id)}",
        f"tool        {plain(call.tool)} of the MCP server {plain(call.server)}",
        f"runs        in the workspace: {' '.join(plain(word) for word in call.command)}",
        f"definition  {plain(call.definition) or 'not pinned: the server may have told the agent something else of this tool'}",
        f"parameters  {len(call.params)} bytes, sha256 {hashlib.sha256(call.params).hexdigest()}",
        "",
        "# arguments, written by the agent",
        *_arguments(call.params),
    ]
    return "\n".join(lines) + "\n"


def _arguments(params: bytes) -> list[str]:
    """Return the arguments of what :func:`read_params` has read as lines; anything else is shown whole."""
    value = parse_json(params)
    named = value.named() if isinstance(value, Members) else None
    return list(tree(value if named is None else named.get("arguments", value)))


__all__ = [
    "MAX_PARAMS",
    "AskTool",
    "ClaimTool",
    "EndTool",
    "ReviewedTool",
    "ToolRefused",
    "ToolView",
    "params_of",
    "read_params",
    "render_tool",
    "tool_digest",
]
