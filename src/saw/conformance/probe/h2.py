"""Attempts over HTTP/2 through the proxy: header lists that HTTP/1.1 cannot say, frame by frame (RFC 9113, RFC 7541)."""

from __future__ import annotations

import socket
import ssl
import struct

from saw.conformance.probe.core import NotPossible, Refused, attempt
from saw.conformance.probe.web import PATIENCE, context, dial, judge, opened

DATA, HEADERS, RESET, SETTINGS, AWAY, CONTINUATION = 0, 1, 3, 4, 7, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
STATUS = {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}
"""``:status`` in HPACK's static table."""
DIGITS = {f"{n:05b}": str(n) for n in range(3)}
DIGITS.update({f"{22 + n:06b}": str(n) for n in range(3, 10)})
"""The digits in HPACK's Huffman code."""


def _number(value: int, bits: int, first: int = 0) -> bytes:
    """Return an integer with a prefix of ``bits`` bits (RFC 7541, 5.1)."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([first | value])
    out, value = bytearray([first | limit]), value - limit
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    out.append(value)
    return bytes(out)


def block(headers: list[str]) -> bytes:
    """Return a header block: names and values as they are, in this order, neither indexed nor compressed."""
    out = b""
    for name, value in zip(headers[::2], headers[1::2]):  # noqa: B905 - Python 3.9
        raw = [text.encode("latin-1") for text in (name, value)]
        out += b"\0" + b"".join(_number(len(text), 7) + text for text in raw)
    return out


def status_of(raw: bytes) -> int:
    """Return the ``:status`` with which a header block begins; 0 when it does not."""
    while raw and raw[0] & 0xE0 == 0x20:  # a new size of the table, in one byte or more
        more = raw[0] & 0x1F == 0x1F
        raw = raw[1:]
        while more and raw:
            more, raw = bool(raw[0] & 0x80), raw[1:]
    if not raw:
        return 0
    if raw[0] & 0x80:
        return STATUS.get(raw[0] & 0x7F, 0)
    index = raw[0] & (0x3F if raw[0] & 0x40 else 0x0F)
    if index not in STATUS or len(raw) < 2:
        return 0
    text = raw[2 : 2 + (raw[1] & 0x7F)]
    if not raw[1] & 0x80:
        return int(text) if text.isdigit() else 0
    bits, digits, code = "".join(f"{byte:08b}" for byte in text), "", ""
    for bit in bits:
        code += bit
        if code in DIGITS:
            digits, code = digits + DIGITS[code], ""
    return int(digits or 0)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """Return one frame."""
    return struct.pack("!I", len(payload))[1:] + bytes([kind, flags]) + struct.pack("!I", stream) + payload


def _read(stream: socket.socket, length: int) -> bytes:
    raw = b""
    while len(raw) < length:
        piece = stream.recv(length - len(raw))
        if not piece:
            raise Refused("the connection was closed", reason="closed")
        raw += piece
    return raw


def _answer(stream: socket.socket) -> tuple[int, bytes]:
    """Return status and body of the answer on stream 1; raise :class:`Refused` when it, or the connection, is ended."""
    status, body = 0, b""
    while True:
        head = _read(stream, 9)
        length, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        payload = _read(stream, length)
        if kind == SETTINGS and not flags & ACK:
            stream.sendall(frame(SETTINGS, ACK, 0))
        elif kind == AWAY:
            raise Refused(f"the connection was ended (code {int.from_bytes(payload[4:8], 'big')})", reason="closed")
        elif int.from_bytes(head[5:9], "big") != 1:
            continue
        elif kind == RESET:
            if status:
                return status, body
            raise Refused(f"the request was reset (code {int.from_bytes(payload, 'big')})", reason="closed")
        elif kind == HEADERS and not status:
            status = status_of(payload)
        elif kind == DATA:
            body += payload
        if kind in (HEADERS, DATA) and flags & END_STREAM:
            return status, body


@attempt("http2")
def http2(authority: str, sni: str, headers: list[str], body: str = "", ended: bool = True) -> str:
    """Open a tunnel, agree on HTTP/2 in it and send one request; ``headers`` are names and values in turn, as they stand.

    A ``body`` makes the headers end without ending the request; with ``ended`` the body ends it.
    """
    with dial() as plain:
        opened(plain, authority)
        try:
            secure = context("h2").wrap_socket(plain, server_hostname=sni or None)
        except (ssl.SSLError, ConnectionError) as error:
            raise Refused(f"TLS: {error}", reason="tls") from None
        with secure:
            secure.settimeout(PATIENCE)
            if secure.selected_alpn_protocol() != "h2":
                raise NotPossible("the proxy speaks no HTTP/2 in a tunnel")
            request = frame(HEADERS, END_HEADERS | (0 if body else END_STREAM), 1, block(headers))
            if body:
                request += frame(DATA, END_STREAM if ended else 0, 1, body.encode("latin-1"))
            try:
                secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0) + request)
                status, answer = _answer(secure)
            except (ConnectionError, ssl.SSLError) as error:
                raise Refused(f"the connection was closed: {error}", reason="closed") from None
    if not status:
        raise OSError("the answer's status could not be read")
    return judge(f"HTTP/1.1 {status} -\r\n\r\n".encode() + answer, "answer")
