"""Ports of the sandbox for people with a grant: ``saw sandbox forward``, and ``saw sandbox forward-serve`` in its network.

The first is all that the account ``saw-forward`` runs; it names the port and relays. The second is started for each of its
connections, as a unit in the sandbox's network namespace and outside of the agent's confinement, because Landlock lets nothing in
the sandbox connect to a local port. It connects to the loopback address of that network and to nothing else.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Mapping

from saw.errors import SawError
from saw.mux import Mux, read_port
from saw.runtime.mcp_connect import relay

SOCKET = "/run/saw/forward.sock"
LOOPBACK = "127.0.0.1"
EXIT_REFUSED = 77
"""Nothing was forwarded (EX_NOPERM of sysexits.h)."""
_FIRST_LINE = len("65535\n")


def enter(environ: Mapping[str, str], path: str = SOCKET) -> int:
    """Relay standard input and output to the service for the port in ``SSH_ORIGINAL_COMMAND``; return an exit code."""
    port = read_port(environ.get("SSH_ORIGINAL_COMMAND", ""))
    if port is None:
        print("saw: that is no port that may be forwarded", file=sys.stderr)
        return EXIT_REFUSED
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            connection.sendall(b"%d\n" % port)
            relay(connection)
    except OSError as error:
        print(f"saw: ports of this workspace cannot be reached: {path}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def serve() -> int:
    """Carry the connections of descriptor 0, a socket, to the port that its first line names; return an exit code."""
    with socket.socket(fileno=os.dup(0)) as connection:
        try:
            asyncio.run(_carry(connection))
        except SawError as error:
            print(f"saw: {error}", file=sys.stderr)
            return 1
    return 0


async def _carry(connection: socket.socket) -> None:
    reader, writer = await asyncio.open_connection(sock=connection)
    try:
        line = (await reader.readuntil(b"\n")).decode("ascii", "replace")
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        line = ""
    port = read_port(line.removesuffix("\n")) if len(line) <= _FIRST_LINE else None
    if port is None:
        raise SawError("the first line is no port that may be forwarded", cure="connect by saw sandbox forward")
    await Mux(reader, writer, lambda: asyncio.open_connection(LOOPBACK, port)).run()
