"""Attempts that need a far end which plays a part: one that shows what it got, and one that takes WebSockets (RFC 6455)."""

from __future__ import annotations

import base64
import gzip
import os
import re
import ssl
import struct
import time
import zlib
from typing import Any

from saw.conformance.probe.core import NotPossible, Refused, attempt
from saw.conformance.probe.web import PATIENCE, ask, context, dial, judge, opened

CLOSE = 8
_MASK = b"\x7f\x33\x05\xc2"


def _placeholder(variable: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise NotPossible(f"the environment has no {variable}")
    return value


def _filled(request: str, value: str) -> str:
    """Return ``request`` with a placeholder in its places: whole, in pieces, and encoded."""
    raw, cut = value.encode(), len(value) // 3
    forms = {
        "whole": value,
        "percent": "".join(f"%{byte:02x}" for byte in raw),
        "basic": base64.b64encode(b"agent:" + raw).decode(),
        "first": value[:cut],
        "rest": value[cut:],
    }
    return re.sub(r"<(\w+)>", lambda found: forms[found[1]], request)


@attempt("placeholder")
def placeholder(authority: str, request: str, sni: str, variable: str) -> str:
    """Send what stands for a credential; ``request`` says where, ``<whole>``, ``<percent>`` or ``<basic>``."""
    return judge(ask(authority, _filled(request, _placeholder(variable)), sni), "answer")


def _joined(body: bytes) -> bytes:
    """Return what the chunks of ``body`` hold (RFC 9112, 7.1); raise ``ValueError`` where they do not come to their end."""
    pieces = b""
    while True:
        found = re.match(rb"([0-9a-fA-F]+)[^\r\n]*\r\n", body)
        size = int(found[1], 16) if found else -1
        if found is None or len(body) < found.end() + size:
            raise ValueError("the chunks do not come to their end")
        if size == 0:
            return pieces
        pieces += body[found.end() : found.end() + size]
        body = body[found.end() + size + 2 :]


def _shown(answer: bytes) -> str:
    """Return the body of an answer, unpacked; raise :class:`Refused` for a refusal, :class:`NotPossible` for one cut off."""
    judge(answer, "answer")
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        if re.search(rb"(?i)\ntransfer-encoding: *chunked", head):
            body = _joined(body)
        if re.search(rb"(?i)\ncontent-encoding: *gzip", head):
            body = gzip.decompress(body)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise NotPossible(f"the answer cannot be read: {error}") from None
    return body.decode("utf-8", "replace")


@attempt("pieces")
def pieces(authority: str, request: str, sni: str, variable: str) -> str:
    """Send a placeholder in pieces, which nobody may put together: the far end must see both as they were sent."""
    value = _placeholder(variable)
    shown = _shown(ask(authority, _filled(request, value), sni))
    cut = len(value) // 3
    if value[:cut] in shown and value[cut:] in shown:
        raise Refused("both pieces arrived as they were sent", reason="as_sent")
    return f"the far end saw something else: {shown[:200]}"


@attempt("reflected")
def reflected(authority: str, request: str, sni: str) -> str:
    """Have the service show the ``Authorization`` that it got, in which a credential was put on the way."""
    shown = _shown(ask(authority, request, sni))
    found = re.search(r'(?i)"?authorization"?[ =:\["]+([^"\r\n]+)', shown)
    if found is None:
        raise NotPossible("the service shows no Authorization, so that no credential was put in")
    value = found[1].strip().rpartition(" ")[2]
    if value and not value.strip("*"):
        raise Refused("the value came back as stars", reason="redacted")
    return "the value came back"


@attempt("one-header")
def one_header(authority: str, request: str, sni: str, name: str) -> str:
    """Send a value in which a line end hides; the far end must see no header ``name``."""
    shown = _shown(ask(authority, request, sni))
    if re.search(rf'(?im)(^|"){re.escape(name)}"?[ =:]', shown):
        return f"the far end saw a header {name}"
    if not re.search(rf'(?im)(^|")host"?[ =:\["]+{re.escape(sni)}', shown):
        raise NotPossible("the service does not show the Host that it got, so that no header's absence says anything")
    raise Refused(f"the far end saw no header {name}", reason="as_sent")


def frame(kind: int, payload: bytes, first: int, masked: bool) -> bytes:
    """Return one frame; ``first`` are the upper four bits of its first byte (the last frame of a message, reserved bits)."""
    head = bytes([first << 4 | kind])
    mark = 0x80 if masked else 0
    head += bytes([mark | len(payload)]) if len(payload) < 126 else struct.pack(">BH", mark | 126, len(payload))
    if not masked:
        return head + payload
    return head + _MASK + bytes(byte ^ _MASK[place % 4] for place, byte in enumerate(payload))


def closed(raw: bytes) -> str:
    """Return ``close:STATUS`` when one of the frames in ``raw``, which come from a service, is a Close frame."""
    while len(raw) >= 2:
        length, start = raw[1] & 0x7F, 2
        if length == 126:
            length, start = int.from_bytes(raw[2:4], "big"), 4
        elif length == 127:
            length, start = int.from_bytes(raw[2:10], "big"), 10
        if raw[0] & 0x0F == CLOSE:
            return f"close:{int.from_bytes(raw[start : start + 2], 'big')}"
        raw = raw[start + length :]
    return ""


@attempt("websocket")
def websocket(  # noqa: PLR0917
    authority: str, request: str, sni: str, frames: list[Any], text: str, patience: float = PATIENCE
) -> str:
    """Open a WebSocket and send ``frames``: kind, upper four bits, whether masked, and the payload. Still open is allowed.

    An empty kind means the payload as it is. The last payload is followed by ``text``.
    """
    sent = b""
    for number, (kind, first, masked, payload) in enumerate(frames):
        raw = (payload + (text if number == len(frames) - 1 else "")).encode("latin-1")
        sent += raw if kind is None else frame(kind, raw, first, masked)
    with dial() as plain:
        opened(plain, authority)
        try:
            with context().wrap_socket(plain, server_hostname=sni) as secure:
                secure.sendall(request.encode("latin-1"))
                answer = b""
                while b"\r\n\r\n" not in answer:
                    piece = secure.recv(65536)
                    if not piece:
                        break
                    answer += piece
                if not answer.startswith(b"HTTP/1.1 101"):
                    judge(answer, "answer")
                    raise NotPossible("the service opens no WebSocket")
                got, end = answer.partition(b"\r\n\r\n")[2], time.monotonic() + patience
                secure.sendall(sent)
                while not closed(got):
                    left = end - time.monotonic()
                    if left <= 0:
                        return f"still open after {patience} s"
                    secure.settimeout(left)
                    try:
                        piece = secure.recv(65536)
                    except OSError as error:
                        if "timed out" in str(error):  # 3.9 has socket.timeout apart
                            return f"still open after {patience} s"
                        raise
                    if not piece:
                        raise Refused("the connection was closed", reason="closed")
                    got += piece
                raise Refused("the WebSocket was closed", reason=closed(got))
        except (ConnectionError, ssl.SSLError) as error:
            raise Refused(f"the connection was closed: {error}", reason="closed") from None
