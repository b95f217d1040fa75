"""Both ends of a WebSocket (RFC 6455), byte by byte, so that tests can send what no library would.

As a program it is the client of a test, in whichever namespace it is started: ``PROXY CA URL [HEADER: VALUE ...]``. It prints the
status of the answer, then each piece that arrives in hexadecimal, then ``end``; it sends what it reads, line by line.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable
from urllib.parse import urlsplit

TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10
_MASK = b"\x7f\x33\x05\xc2"
"""The mask of every frame: always the same, so that what was sent can be compared."""
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
VIOLATION = bytes([0x88, 0x82, 0, 0, 0, 0, 0x03, 0xF0])
"""The Close frame with the status 1008 (policy violation) that takes the place of a frame that may not pass."""


def frame(kind: int, payload: bytes, *, final: bool = True, masked: bool = True, reserved: int = 0) -> bytes:
    """Return one frame; ``reserved`` are the reserved bits as they stand in the first byte."""
    head = bytes([(0x80 if final else 0) | reserved | kind])
    mask = 0x80 if masked else 0
    if len(payload) < 126:
        head += bytes([mask | len(payload)])
    elif len(payload) < 65536:
        head += struct.pack(">BH", mask | 126, len(payload))
    else:
        head += struct.pack(">BQ", mask | 127, len(payload))
    if not masked:
        return head + payload
    key = _MASK
    return head + key + bytes(byte ^ key[place % 4] for place, byte in enumerate(payload))


def request(path: str, host: str, *headers: str) -> bytes:
    """Return the request that opens a WebSocket."""
    fields = (
        f"GET {path} HTTP/1.1", f"host: {host}", "connection: Upgrade", "upgrade: websocket", "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==", *headers, "", "",
    )  # fmt: skip
    return "\r\n".join(fields).encode()


def read_head(sock: socket.socket) -> tuple[bytes, bytes]:
    """Return the head of an HTTP message and what came behind it; both empty when the peer is gone."""
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = sock.recv(65536)
        if not piece:
            return b"", b""
        raw += piece
    head, _, rest = raw.partition(b"\r\n\r\n")
    return head, rest


class Stream:
    """One connection at the service: its request, everything that arrived behind it, and whether it has ended."""

    def __init__(self, head: bytes) -> None:
        self.head = head.decode("latin-1")
        self.data = b""
        self.ended = False

    def header(self, name: str) -> str | None:
        """Return a header of the request, or None."""
        for line in self.head.split("\r\n")[1:]:
            field, _, value = line.partition(":")
            if field.lower() == name:
                return value.strip()
        return None


class Service:
    """A service that takes WebSockets on a listening socket, sends a greeting on each, and remembers what arrived.

    Below ``/plain`` it answers 200 in place of 101. A Close frame that ends the data is answered by the end of the connection.
    """

    def __init__(self, listener: socket.socket, context: ssl.SSLContext | None = None) -> None:
        self.streams: list[Stream] = []
        self.greeting: Callable[[Stream], str] = lambda _: "hello"
        self._listener = listener
        self._context = context
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            sock = raw if self._context is None else self._context.wrap_socket(raw, server_side=True)
        except OSError:
            raw.close()
            return
        self._open.add(sock)
        try:
            self._talk(sock)
        except OSError:
            pass
        finally:
            self._open.discard(sock)
            sock.close()

    def _talk(self, sock: socket.socket) -> None:
        head, data = read_head(sock)
        if not head:
            return
        stream = Stream(head)
        stream.data = data
        self.streams.append(stream)
        try:
            if stream.head.split(" ")[1].startswith("/plain"):
                sock.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nplain")
            else:
                key = (stream.header("sec-websocket-key") or "").encode()
                accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest()).decode()
                answer = f"connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: {accept}\r\n\r\n"
                sock.sendall(b"HTTP/1.1 101 Switching Protocols\r\n" + answer.encode())
                sock.sendall(frame(TEXT, self.greeting(stream).encode(), masked=False))
            while piece := sock.recv(65536):
                stream.data += piece
                if stream.data.endswith(VIOLATION):
                    sock.sendall(frame(CLOSE, b"\x03\xf0", masked=False))
                    return
        finally:
            stream.ended = True

    def close(self) -> None:
        """End everything."""
        self._listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def main(proxy: str, authority: str, url: str, *headers: str) -> None:
    """Be the client."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "wss" else 80)
    address = urlsplit(proxy)
    sock = socket.create_connection((address.hostname, address.port), timeout=20)
    sock.sendall(f"CONNECT {parts.hostname}:{port} HTTP/1.1\r\nhost: {parts.hostname}:{port}\r\n\r\n".encode())
    head, _ = read_head(sock)
    if head.split(b" ")[1] == b"200":
        if parts.scheme == "wss":
            context = ssl.create_default_context(cafile=authority)
            sock = context.wrap_socket(sock, server_hostname=parts.hostname)
        sock.sendall(request(parts.path, parts.netloc, *headers))
        head, rest = read_head(sock)
    else:
        rest = b""
    print(head.split(b" ")[1].decode() if head else "none", flush=True)

    def receive() -> None:
        piece = rest
        sock.settimeout(None)
        try:
            while True:
                if piece:
                    print(piece.hex(), flush=True)
                piece = sock.recv(65536)
                if not piece:
                    break
        except OSError:
            pass
        print("end", flush=True)

    threading.Thread(target=receive, daemon=True).start()
    try:
        for line in sys.stdin:
            sock.sendall(bytes.fromhex(line))
    except OSError:
        pass


if __name__ == "__main__":
    main(*sys.argv[1:])
