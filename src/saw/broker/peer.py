"""Who is at the other end of a connection: peer credentials of the operator socket, peer certificate of the TLS port.

uvicorn does not hand either to the application, so its HTTP protocol is extended to put a :class:`Peer` into the ASGI
scope under ``saw.peer``. It is read from the kernel and from the TLS session, never from the request.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import pwd
import socket
import struct
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SCOPE_KEY = "saw.peer"
#: Linux: supplementary groups of the peer at connect time (socket(7) on newer manuals; include/uapi/asm-generic/socket.h).
_SO_PEERGROUPS = 59
_CREDENTIALS = struct.Struct("3i")
_MAX_GROUPS = 256


class Peer(msgspec.Struct, frozen=True):
    """``uid``/``gids`` for a Unix socket, ``certificate`` (DER, verified against our CA by TLS) for TLS; else None."""

    uid: int | None = None
    gids: frozenset[int] = frozenset()
    certificate: bytes | None = None
    address: str = ""

    @property
    def user(self) -> str:
        """The peer's user name, or its number."""
        if self.uid is None:
            return ""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)


class PeerProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 protocol that knows its peer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Read the peer once for each connection."""
        super().connection_made(transport)
        self._peer = read_peer(transport)

    def on_message_begin(self) -> None:
        """Give every request of the connection its peer."""
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[SCOPE_KEY] = self._peer


def read_peer(transport: asyncio.BaseTransport) -> Peer:
    """Return who is at the other end of ``transport``."""
    tls = transport.get_extra_info("ssl_object")
    if tls is not None:
        address = transport.get_extra_info("peername")
        return Peer(certificate=tls.getpeercert(binary_form=True), address=str(address[0]) if address else "")
    handle = transport.get_extra_info("socket")
    if handle is None or handle.family != socket.AF_UNIX:
        return Peer()
    with socket.socket(fileno=os.dup(handle.fileno())) as own:
        _, uid, gid = _CREDENTIALS.unpack(own.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        groups = array.array("I")
        # With more groups than one read holds, only the primary group counts, which can only refuse more.
        with contextlib.suppress(OSError):
            groups.frombytes(own.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 4 * _MAX_GROUPS))
    return Peer(uid=uid, gids=frozenset({gid, *groups}), address="operator-socket")
