"""What a reviewer is shown of a call: made from its bytes alone, complete or saying what is left out, escaped.

Nothing that the agent says about its call stands here. The same call gives the same text everywhere, so the digest of the
text can be signed with the decision.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from urllib.parse import unquote_plus

from saw.policy.gitproto import PushUnreadable
from saw.review.escapes import escape, plain
from saw.review.git_push import show_push
from saw.review.git_text import Part, parts
from saw.review.json_text import Unreadable, parse_json, tree
from saw.review.messages import Context, PushContext, ReviewedCall, StateContext
from saw.review.mime_text import mail_in, show_form, show_mail
from saw.review.read_back import PUSH
from saw.review.state_diff import has_state, is_json, show_state

MAX_SHOWN = 256 * 1024
"""Bytes of a body that are shown as text; a longer body is cut and says so."""
MAX_HEX = 16 * 1024
"""Bytes of a body that are shown as a hex dump."""
GIT_PUSH = "Git push"
"""What a push is shown as."""
STATE = "a change of what is there"
"""What a write is shown as whose far end was asked for the state that it would change."""


def render(workspace_id: str, call: ReviewedCall, context: Context | None = None) -> str:
    """Return the text that a reviewer of ``call`` sees; it ends with a newline and has no character that steers a terminal.

    ``context`` is what the far end was asked about the state that the call would change.
    """
    default = {"https": 443, "http": 80}[call.scheme]
    port = "" if call.port == default else f":{call.port}"
    lines = [
        f"workspace  {plain(workspace_id)}",
        f"request    {call.method} {call.scheme}://{plain(call.host)}{port}{plain(call.path)}",
        *(f"header     {plain(name)}: {plain(value)}" for name, value in call.headers),
        f"body       {len(call.body)} bytes, sha256 {hashlib.sha256(call.body).hexdigest()}",
    ]
    if call.body or isinstance(context, StateContext):
        kind, shown = _body(call, context)
        told = [f"shown as   {kind}", "", *shown]
        # Of a change the headers are what matters least.
        first = kind in {GIT_PUSH, STATE}
        lines = [*lines[:2], *told, "", "# headers and body", *lines[2:]] if first else [*lines, *told]
    return "\n".join(lines) + "\n"


def push_parts(rendering: str) -> list[Part]:
    """Return what :func:`render` made of a push by its headings; empty for what was not shown as one."""
    return parts(rendering) if rendering.split("\n", 3)[2:3] == [f"shown as   {GIT_PUSH}"] else []


def is_push(call: ReviewedCall) -> bool:
    """Tell whether ``call`` goes where Git pushes go."""
    return call.path.partition("?")[0].endswith(PUSH)


def context_kind(call: ReviewedCall) -> type[PushContext | StateContext] | None:
    """Return what can be told beside ``call``: the state that it would change, of the kind that it has."""
    if is_push(call):
        return PushContext
    return StateContext if has_state(call) else None


def _body(call: ReviewedCall, context: Context | None) -> tuple[str, list[str]]:
    headers = dict(call.headers)
    media = headers.get("content-type", "").partition(";")[0].strip().lower()
    coding = headers.get("content-encoding", "").strip().lower()
    readers: list[tuple[str, Callable[[], list[str]]]] = []
    if is_push(call):
        push = context if isinstance(context, PushContext) else None
        readers.append((GIT_PUSH, lambda: _push(call.body, coding, push)))
    if isinstance(context, StateContext):
        readers.append((STATE, lambda: _state(call, context)))
    if coding in {"", "identity"}:
        if is_json(media):
            readers.append(("a mail in JSON", lambda: _mail_in_json(call.body)))
            readers.append(("JSON", lambda: _json(call.body)))
        if media == "message/rfc822":
            readers.append(("a mail", lambda: show_mail(call.body)))
        if media == "multipart/form-data":
            readers.append(("form fields and files", lambda: show_form(call.body, headers["content-type"])))
        if media == "application/x-www-form-urlencoded":
            readers.append(("form fields", lambda: _form(call.body)))
        readers.append(("text", lambda: _text(call.body)))
    for kind, reader in readers:
        try:
            return kind, reader()
        except Unreadable:
            continue
    return "hex dump", list(_hex(call.body))


def _decoded(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise Unreadable from error


def _left_out(size: int, shown: int) -> list[str]:
    return [f"… {size - shown} more bytes are NOT shown"] if size > shown else []


def _text(body: bytes) -> list[str]:
    text = _decoded(body)
    if any(character < " " and character not in "\t\r\n" for character in text):
        raise Unreadable
    cut = body[:MAX_SHOWN].decode(errors="ignore")
    return [f"| {escape(line)}" for line in cut.split("\n")] + _left_out(len(body), len(cut.encode()))


def _form(body: bytes) -> list[str]:
    text = _decoded(body)
    if len(body) > MAX_SHOWN or not text.isascii():
        raise Unreadable
    lines = []
    for field in text.split("&"):
        name, equals, value = field.partition("=")
        try:
            pair = [unquote_plus(part, errors="strict") for part in (name, value)]
        except UnicodeDecodeError as error:
            raise Unreadable from error
        lines.append(f"{escape(pair[0])} {equals or '(no value)'} {escape(pair[1])}".rstrip())
    return lines


def _json(body: bytes) -> list[str]:
    if len(body) > MAX_SHOWN:
        raise Unreadable
    return list(tree(parse_json(body)))


def _mail_in_json(body: bytes) -> list[str]:
    found = mail_in(parse_json(body))
    if found is None:
        raise Unreadable
    return [*show_mail(found[0]), "", "# what carries it", *tree(found[1])]


def _state(call: ReviewedCall, context: StateContext) -> list[str]:
    told = show_state(call, context)
    return [*told, "# what would be sent", *_json(call.body)] if call.body else told


def _push(body: bytes, coding: str, context: PushContext | None) -> list[str]:
    try:
        return list(show_push(body, coding, context).lines)
    except PushUnreadable as error:
        raise Unreadable from error


def _hex(body: bytes) -> Iterator[str]:
    for at in range(0, min(len(body), MAX_HEX), 16):
        row = body[at : at + 16]
        letters = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in row)
        yield f"{at:08x}  {row.hex(' '):<47}  |{letters}|"
    yield from _left_out(len(body), MAX_HEX)
