"""Attempts through the proxy that the environment names: real requests, byte by byte."""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import urllib.parse
from typing import Any

from saw.conformance.probe.core import NotPossible, Refused, attempt

PATIENCE = 8.0
ANSWER = 65536


def proxy() -> tuple[str, int]:
    """Return address and port of the proxy."""
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        if os.environ.get(name):
            parts = urllib.parse.urlsplit(os.environ[name])
            if parts.hostname and parts.scheme in ("http", ""):
                return parts.hostname, parts.port or 3128
    raise NotPossible("the environment names no HTTP proxy")


def _context(alpn: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE"))
    context.check_hostname = False  # what the proxy shows is judged by its authority; the name is the attack
    if alpn:
        context.set_alpn_protocols([alpn])
    return context


def _receive(stream: socket.socket, *, tunnel: bool = False) -> bytes:
    """Read an answer: its head, and the body as far as its length says or it comes. An opened ``tunnel`` has no body."""
    answer = b""
    try:
        while len(answer) < ANSWER:
            piece = stream.recv(65536)
            if not piece:
                break
            answer += piece
            head, found, body = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)\ncontent-length: *(\d+)", head)
            if found and tunnel and re.match(rb"HTTP/1\.[01] 2", head):
                break
            if found and (length is None or len(body) >= int(length[1])):
                if length is not None or body.endswith(b"0\r\n\r\n") or re.search(rb" (1\d\d|204|304)", head[:24]):
                    break
    except OSError:
        if not answer:
            raise
    return answer


def judge(answer: bytes, where: str) -> str:
    """Return the answer in short when it is a success; raise :class:`Refused` with its status and reason otherwise."""
    head, _, body = answer.partition(b"\r\n\r\n")
    found = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    if found is None:
        raise Refused(f"{where}: no HTTP answer ({answer[:60]!r})", reason="closed")
    status = int(found[1])
    text = body.decode("utf-8", "replace")
    if status < 400:
        return f"{where}: HTTP {status} {text[:120]}"
    reason = ""
    for match in re.finditer(r"\{.*\}", text, re.DOTALL):
        try:
            told: Any = json.loads(match[0])
        except ValueError:
            continue
        if isinstance(told, dict):
            reason = str(told.get("reason") or told.get("error") or "")
    raise Refused(f"{where}: HTTP {status} {text[:300]}", reason=reason, status=status)


def _dial() -> socket.socket:
    connection = socket.create_connection(proxy(), timeout=PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


@attempt("connect")
def connect(authority: str, host: str | None = None) -> str:
    """Ask the proxy for a tunnel to ``authority``, given as it goes over the wire (latin-1)."""
    with _dial() as connection:
        header = authority if host is None else host
        connection.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {header}\r\n\r\n".encode("latin-1"))
        return judge(_receive(connection, tunnel=True), "CONNECT")


@attempt("tunnel")
def tunnel(  # noqa: PLR0917
    authority: str, request: str, sni: str = "", tls: bool = True, alpn: str = "", count: int = 1
) -> str:
    """Open a tunnel, speak TLS in it and send ``request`` as it is; ``count`` answers are read and the last one counts."""
    with _dial() as plain:
        plain.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode("latin-1"))
        judge(_receive(plain, tunnel=True), "CONNECT")
        stream = plain
        if tls:
            try:
                stream = _context(alpn).wrap_socket(plain, server_hostname=sni or None)
            except (ssl.SSLError, ConnectionError) as error:
                raise Refused(f"TLS: {error}", reason="tls") from None
        try:
            stream.sendall(request.encode("latin-1"))
            answer = _receive(stream)
        except (ConnectionError, ssl.SSLError) as error:
            raise Refused(f"the connection was closed: {error}", reason="closed") from None
        if count > 1:
            judge(answer, "first answer")
            first, _, rest = answer.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", first)
            rest = rest[int(length[1]) :] if length else rest
            try:
                answer = rest if rest.startswith(b"HTTP/") else _receive(stream)
            except OSError as error:
                raise Refused(f"no second answer: {error}", reason="closed") from None
        return judge(answer, "answer")


@attempt("absolute")
def absolute(request: str) -> str:
    """Send the proxy a request in absolute form, as it is."""
    with _dial() as connection:
        try:
            connection.sendall(request.encode("latin-1"))
            return judge(_receive(connection), "answer")
        except ConnectionError as error:
            raise Refused(f"the connection was closed: {error}", reason="closed") from None
