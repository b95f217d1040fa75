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
HEARD = 2.0
"""How long an opened tunnel is listened to, in seconds."""
ANSWER = 65536


def proxy() -> tuple[str, int]:
    """Return address and port of the proxy."""
    for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        if os.environ.get(name):
            parts = urllib.parse.urlsplit(os.environ[name])
            if parts.hostname and parts.scheme in ("http", ""):
                return parts.hostname, parts.port or 3128
    raise NotPossible("the environment names no HTTP proxy")


def context(alpn: str = "") -> ssl.SSLContext:
    """Return a TLS context that trusts what the environment says."""
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
    reason = layer = ""
    for match in re.finditer(r"\{.*\}", text, re.DOTALL):
        try:
            told: Any = json.loads(match[0])
        except ValueError:
            continue
        if isinstance(told, dict):
            reason, layer = str(told.get("reason") or told.get("error") or ""), str(told.get("layer") or "")
    raise Refused(f"{where}: HTTP {status} {text[:300]}", reason=reason, status=status, layer=layer)


def dial() -> socket.socket:
    """Connect to the proxy."""
    connection = socket.create_connection(proxy(), timeout=PATIENCE)
    connection.settimeout(PATIENCE)
    return connection


def opened(plain: socket.socket, authority: str) -> str:
    """Make the connection a tunnel to ``authority``, and return the answer in short; raise :class:`Refused` without one."""
    try:
        plain.sendall(f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode("latin-1"))
        answer = _receive(plain, tunnel=True)
    except ConnectionError as error:
        raise Refused(f"CONNECT: the connection was closed: {error}", reason="closed") from None
    return judge(answer, "CONNECT")


def ask(authority: str, request: str, sni: str) -> bytes:
    """Return the answer to one request in a tunnel of its own."""
    with dial() as plain:
        opened(plain, authority)
        try:
            with context().wrap_socket(plain, server_hostname=sni or None) as secure:
                secure.sendall(request.encode("latin-1"))
                return _receive(secure)
        except (ConnectionError, ssl.SSLError) as error:
            raise Refused(f"the connection was closed: {error}", reason="closed") from None


@attempt("connect")
def connect(authority: str, mark: str) -> str:
    """Ask the proxy for a tunnel to ``authority``, given as it goes over the wire (latin-1), and send ``mark`` through it."""
    with dial() as connection:
        answer = opened(connection, authority)
        try:
            connection.sendall(f"GET /{mark} HTTP/1.0\r\n\r\n".encode("latin-1"))
            connection.settimeout(HEARD)
            connection.recv(65536)  # an answer says that it arrived; without one the tunnel was open all the same
        except OSError:
            pass
        return answer


@attempt("tunnel")
def tunnel(  # noqa: PLR0917
    authority: str, request: str, sni: str = "", tls: bool = True, alpn: str = "", count: int = 1
) -> str:
    """Open a tunnel, speak TLS in it and send ``request`` as it is; ``count`` answers are read and the last one counts."""
    with dial() as plain:
        opened(plain, authority)
        stream = plain
        if tls:
            try:
                stream = context(alpn).wrap_socket(plain, server_hostname=sni or None)
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
    with dial() as connection:
        try:
            connection.sendall(request.encode("latin-1"))
            return judge(_receive(connection), "answer")
        except ConnectionError as error:
            raise Refused(f"the connection was closed: {error}", reason="closed") from None


@attempt("redirect")
def redirect(authority: str, request: str, sni: str, mark: str) -> str:
    """Ask an allowed service, and follow the redirect that it answers with; ``mark`` goes with the second call."""
    answer = ask(authority, request, sni)
    judge(answer, "first answer")
    found = re.search(rb"(?i)\nlocation: *([^\r\n]+)", answer.partition(b"\r\n\r\n")[0] + b"\r\n")
    if found is None:
        raise NotPossible("the service does not answer with a redirect")
    target = urllib.parse.urlsplit(found[1].decode("latin-1"))
    path, headers = target.path or "/", f"Host: {target.netloc}\r\nX-Probe-Nonce: {mark}\r\nConnection: close\r\n\r\n"
    if target.scheme == "https":
        second = f"GET {path} HTTP/1.1\r\n{headers}"
        return judge(ask(f"{target.hostname}:{target.port or 443}", second, target.hostname or ""), "second answer")
    with dial() as plain:
        plain.sendall(f"GET {target.geturl()} HTTP/1.1\r\n{headers}".encode("latin-1"))
        return judge(_receive(plain), "second answer")


@attempt("slow-headers")
def slow_headers(authority: str, sni: str, begun: str, other: str, patience: float = 60.0) -> str:
    """Begin a request and never end its headers; ``other`` must be answered meanwhile. Held for ``patience`` s is allowed."""
    with dial() as plain:
        opened(plain, authority)
        with context().wrap_socket(plain, server_hostname=sni) as secure:
            secure.sendall(begun.encode("latin-1"))
            try:
                judge(ask(authority, other, sni), "another call")
            except Refused as error:
                raise RuntimeError(f"meanwhile another call was not answered: {error}") from None
            secure.settimeout(patience)
            try:
                answer = _receive(secure)
            except OSError as error:
                if "timed out" in str(error):  # 3.9 has socket.timeout apart
                    return f"still open after {patience} s"
                raise Refused(f"the connection was closed: {error}", reason="closed") from None
            return judge(answer, "answer")
