"""Listening: a port or socket that is taken is an error that names who holds it and what frees it."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from saw.errors import SawError

LISTEN = "0A"
"""State of a listening socket in /proc/net/tcp (proc(5), include/net/tcp_states.h)."""


class TakenError(SawError):
    """Something else listens where a service of ours must."""

    code = "port_taken"


@dataclass(frozen=True)
class Holder:
    """Who listens: ``pid`` is 0 where this user may not see the process; ``command`` is its command line."""

    address: str
    port: int
    pid: int = 0
    name: str = ""
    command: tuple[str, ...] = ()
    uid: int = -1

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})" if self.pid else "a process that this user cannot see"


def listen_tcp(what: str, host: str, port: int, *, backlog: int, setting: str) -> socket.socket:
    """Listen on TCP ``host``:``port``; raise :class:`TakenError` or, for another reason, :class:`SawError`, with a cure.

    ``what`` is the service in the message, ``setting`` the variable that moves it elsewhere.
    """
    try:
        listener = socket.create_server((host, port), backlog=backlog)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise taken(what, listening_on(host, port), f"{host}:{port}", setting) from error
        cure = f"give {setting} an address of this host" if error.errno == errno.EADDRNOTAVAIL else f"correct {setting}"
        raise SawError(f"{what} cannot listen on {host}:{port}: {error.strerror}", cure=cure) from error
    listener.setblocking(False)
    return listener


def taken(what: str, holders: Iterable[Holder], place: str, setting: str) -> TakenError:
    """Return the error for a TCP port that ``holders`` have."""
    found = sorted({str(holder) for holder in holders}) or ["a process that this user cannot see"]
    port = place.rpartition(":")[2]
    return TakenError(
        f"{what} cannot listen on {place}: {' and '.join(found)} listens there",
        cure=f"stop that (as root, `ss -ltnp sport = :{port}` names it), or give {setting} another value",
        details={"place": place, "holders": list(found)},
    )


def require_own_socket(what: str, path: Path, setting: str) -> None:
    """Raise :class:`TakenError` when a process listens on the Unix socket ``path``; a dead one's socket is not in the way."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError:
            return
        # Linux keeps who called listen(2) (unix(7), SO_PEERCRED)
        pid, uid, _ = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    holder = Holder(str(path), 0, pid, _name(pid), uid=uid)
    raise TakenError(
        f"{what} cannot listen on {path}: {holder} listens there",
        cure=f"stop that one first, or give {setting} another value",
        details={"place": str(path), "holders": [str(holder)]},
    )


def listening_on(host: str, port: int) -> list[Holder]:
    """Return who listens on ``port`` at ``host`` or at all addresses; at any address when ``host`` is "all addresses"."""
    found = listening(lambda number: number == port)
    try:
        wanted = ipaddress.ip_address(host)
    except ValueError:  # a name: whoever has the port may be in the way
        return found
    if wanted.is_unspecified:
        return found
    places = {holder: ipaddress.ip_address(holder.address) for holder in found}
    return [holder for holder, address in places.items() if address.is_unspecified or address == wanted]


def listening(want: Callable[[int], bool]) -> list[Holder]:
    """Return who listens on TCP ports that ``want`` names, in this network namespace."""
    places: dict[str, tuple[str, int]] = {}
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", name).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].partition(":")
                if fields[3] == LISTEN and want(int(port, 16)):
                    places[fields[9]] = (_address(address), int(port, 16))
    owners = dict(_owners(frozenset(places))) if places else {}
    return [Holder(*place, *owners.get(inode, ())) for inode, place in places.items()]


def _address(text: str) -> str:
    """Read an address as /proc/net/tcp writes it: 32-bit words in the machine's order."""
    raw = b"".join(struct.pack("=I", int(text[at : at + 8], 16)) for at in range(0, len(text), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _owners(inodes: frozenset[str]) -> Iterator[tuple[str, tuple[int, str, tuple[str, ...], int]]]:
    """Yield socket inode and ``(pid, name, command, uid)`` for the processes that this user may look into."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inode = str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]")
                    if inode in inodes:
                        pid, raw = int(process.name), (process / "cmdline").read_bytes()
                        command = tuple(raw.decode("utf-8", "replace").split("\0"))
                        yield inode, (pid, _name(pid), command, process.stat().st_uid)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return "a process"
