"""``saw-postgres HOST[:PORT] [COMMAND…]``: run a client of PostgreSQL (psql by default) with a way to a server of the policy.

The command finds a Unix socket by ``PGHOST`` and ``PGPORT``, as every client of libpq does. Each connection there becomes a
request to ring 1 that switches to the protocol of PostgreSQL (RFC 9110, section 7.8); both rings decide on it, and ring 2
signs in. No password is asked for, and none is known here. Runs under ``python -I -S``: standard library only; it decides
nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading

USAGE = "usage: saw-postgres HOST[:PORT] [COMMAND…]"
PROXY = "http://10.200.0.1:3128"
USUAL_PORT = 5432
_CHUNK = 65536
_MOST_HEAD = 65536
_WAITING = 64
_PLACE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,252})(?::([0-9]{1,5}))?\Z")
_PROXY = re.compile(r"http://([^/:@]+):([0-9]{1,5})/?\Z")


def parse_place(text: str) -> tuple[str, int] | None:
    """Return host and port of ``HOST[:PORT]``, or None when it is something else."""
    found = _PLACE.match(text)
    port = int(found[2] or USUAL_PORT) if found else 0
    return (found[1], port) if found and 0 < port < 65536 else None


def fatal(body: bytes) -> bytes:
    """Return a ring's refusal (JSON) as the ErrorResponse that a client of PostgreSQL shows."""
    told: dict[str, object] = {}
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(body)
        told = found if isinstance(found, dict) else {}
    layer, reason = told.get("layer", "the way out"), told.get("reason", "no answer")
    text = f"refused by {layer}: {reason}: {told.get('detail', '')}"[:1000]
    steps = told.get("next_steps")
    hint = str(steps[0])[:500] if isinstance(steps, list) and steps else ""
    fields = {"S": "FATAL", "V": "FATAL", "C": "28000", "M": text, **({"H": hint} if hint else {})}
    content = (
        b"".join(f"{key}{value}".replace("\0", " ").encode(errors="replace") + b"\0" for key, value in fields.items())
        + b"\0"
    )
    return b"E" + struct.pack("!i", len(content) + 4) + content


def opened(proxy: tuple[str, int], host: str, port: int) -> tuple[socket.socket, bytes, bytes]:
    """Ask ring 1 for a session; return the connection, the status and what came behind the answer's head."""
    far = socket.create_connection(proxy, timeout=60)
    place = f"{host}:{port}"
    words = f"GET http://{place}/ HTTP/1.1\r\nhost: {place}\r\nconnection: upgrade\r\nupgrade: postgres\r\n\r\n"
    far.sendall(words.encode())
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _MOST_HEAD:
        data = far.recv(_CHUNK)
        if not data:
            break
        head += data
    answer, _, rest = head.partition(b"\r\n\r\n")
    far.settimeout(None)
    return far, answer.partition(b" ")[2][:3], rest


def serve(client: socket.socket, proxy: tuple[str, int], host: str, port: int) -> None:
    """Carry one connection of the client until either side ends."""
    with client, contextlib.suppress(OSError):
        far, status, rest = opened(proxy, host, port)
        with far:
            if status != b"101":
                far.settimeout(5)
                with contextlib.suppress(OSError):
                    while len(rest) < _MOST_HEAD and not rest.endswith(b"}") and (data := far.recv(_CHUNK)):
                        rest += data
                client.recv(_CHUNK)
                client.sendall(fatal(rest))
                return
            client.sendall(rest)
            back = threading.Thread(target=_pump, args=(far, client), daemon=True)
            back.start()
            _pump(client, far)
            back.join()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _bridge(listener: socket.socket, proxy: tuple[str, int], host: str, port: int) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=serve, args=(client, proxy, host, port), daemon=True).start()


def main(argv: list[str]) -> int:
    """Run the command beside the way to its server; return only where it cannot be started.

    This process becomes the command, and a child of it keeps the way open: rules that name the command's executable cover the
    child, whose parent it is. A pipe tells the child when the command has ended.
    """
    place = parse_place(argv[0]) if argv else None
    told = _PROXY.match(os.environ.get("http_proxy", PROXY))
    if place is None or told is None:
        print(USAGE if place is None else "saw-postgres: http_proxy names no proxy", file=sys.stderr)
        return 2
    (host, port), command = place, argv[1:] or ["psql"]
    directory = tempfile.mkdtemp(prefix="saw-postgres-")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(f"{directory}/.s.PGSQL.{port}")
    listener.listen(_WAITING)
    lasts, held = os.pipe()
    if os.fork() == 0:
        # Interrupts are for the command: psql asks for a statement to be cancelled by a connection of its own.
        os.setsid()
        os.close(held)
        silent = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(silent, number)
        threading.Thread(target=_bridge, args=(listener, (told[1], int(told[2])), host, port), daemon=True).start()
        with contextlib.suppress(OSError):
            os.read(lasts, 1)
        shutil.rmtree(directory, ignore_errors=True)
        os._exit(0)
    os.set_inheritable(held, True)
    os.environ.update({"PGHOST": directory, "PGPORT": str(port), "PGSSLMODE": "disable"})
    try:
        os.execvp(command[0], command)  # noqa: S606 - the caller's own command, as the caller
    except OSError as error:
        print(f"saw-postgres: {command[0]}: {error.strerror}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
