"""``saw-mcp-connect SERVER``: the sandbox's end of a mediated MCP server, to be named as a stdio server's command.

Copies standard input to the mediator's socket and back until either side ends. Runs under ``python -I -S``: standard
library only; it decides nothing.
"""

from __future__ import annotations

import os
import re
import select
import socket
import sys

DIRECTORY = "/run/saw/mcp"


def relay(connection: socket.socket) -> None:
    """Copy between descriptors 0/1 and ``connection``; the end of input is passed on, the end of the mediator ends it."""
    sources = [0, connection.fileno()]
    while connection.fileno() in sources:
        for source in select.select(sources, [], [])[0]:
            data = os.read(source, 65536)
            if source == 0:
                if data:
                    connection.sendall(data)
                else:
                    sources.remove(0)
                    connection.shutdown(socket.SHUT_WR)
            elif data:
                view = memoryview(data)
                while view:
                    view = view[os.write(1, view) :]
            else:
                sources.remove(source)


def main(argv: list[str]) -> int:
    """Connect and relay; return 0, or 1 with a reason on stderr."""
    directory = DIRECTORY
    if argv[:1] == ["--directory"] and len(argv) > 1:
        directory, argv = argv[1], argv[2:]
    if len(argv) != 1 or not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", argv[0]):
        print("usage: saw-mcp-connect SERVER", file=sys.stderr)
        return 2
    path = f"{directory}/{argv[0]}.sock"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            relay(connection)
    except OSError as error:
        print(
            f"saw-mcp-connect: {path}: {error.strerror}: is {argv[0]!r} in the policy's mcp.servers?", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
