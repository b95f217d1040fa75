"""Which executable opened a connection of the sandbox: from the source address to the process, through ``/proc``.

This is attribution, not a boundary: preloading, interpreter flags and ``ld.so`` let a process act under another name. What
cannot be attributed without doubt is reported as unknown, and a policy rule with binaries then refuses.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import NamedTuple

import msgspec

_MAX_ANCESTORS = 16
_CACHE_LIMIT = 4096
_NUMBER_OF_STARTTIME = 19
_ESTABLISHED_OR_CLOSING = frozenset({"01", "04", "05", "08"})


class Caller(msgspec.Struct, frozen=True):
    """The process behind a connection: its resolved executable and those of its parents, nearest first."""

    pid: int
    binary: str
    ancestors: tuple[str, ...]


class _Known(NamedTuple):
    """A caller, its process's start time, and the socket by which it was found with the descriptor that holds it."""

    caller: Caller
    started: str
    link: str
    descriptor: str


class Attribution:
    """Finds the caller behind a source address in the sandbox's network namespace.

    ``netns`` is the namespace file (``/run/netns/…``). A found caller is remembered for its address as long as the same
    process with the same executable keeps the same socket open: while that lasts, no other socket can hold the address
    pair, unless the process itself gives it away, and then it could as well pass the bytes on. Reading the kernel's socket
    table for each request instead costs milliseconds (docs/performance.md).
    """

    def __init__(self, netns: Path, proc: Path = Path("/proc")) -> None:
        self._netns = netns
        self._proc = proc
        self._known: dict[str, _Known] = {}
        self._member: int | None = None

    def caller(self, source: str) -> Caller | None:
        """Return the caller for ``source`` (``address:port``), or None when no single executable holds the socket."""
        try:
            namespace = self._netns.stat().st_ino
        except OSError:
            return None
        known = self._known.get(source)
        if known is not None and self._still(known, namespace):
            return known.caller
        self._known.pop(source, None)
        inode = self._inode(source, namespace)
        found = None if inode is None else self._find(inode, namespace)
        if found is None:
            return None
        if len(self._known) >= _CACHE_LIMIT:
            self._known.clear()
        self._known[source] = found
        return found.caller

    def _still(self, known: _Known, namespace: int) -> bool:
        try:
            link = os.readlink(known.descriptor)  # noqa: PTH115 - for every request
        except OSError:
            return False
        pid = known.caller.pid
        return (
            link == known.link
            and self._namespace(pid) == namespace
            and self._started(pid) == known.started
            and self._executable(pid) == known.caller.binary
        )

    def _inode(self, source: str, namespace: int) -> str | None:
        wanted = _table_addresses(source)
        if not wanted:
            return None
        member = self._member
        if member is None or self._namespace(member) != namespace:
            member = self._member = next((pid for pid in self._pids() if self._namespace(pid) == namespace), None)
        if member is None:
            return None
        for table in ("tcp", "tcp6"):
            try:
                rows = (self._proc / str(member) / "net" / table).read_text().splitlines()[1:]
            except OSError:
                continue
            for row in rows:
                fields = row.split()
                if fields[1] in wanted and fields[3] in _ESTABLISHED_OR_CLOSING and fields[9] != "0":
                    return fields[9]
        return None

    def _find(self, inode: str, namespace: int) -> _Known | None:
        link = f"socket:[{inode}]"
        holders = {
            pid: descriptor
            for pid in self._pids()
            if self._namespace(pid) == namespace and (descriptor := self._descriptor(pid, link))
        }
        binaries = {self._executable(pid) for pid in holders}
        if len(binaries) != 1:
            return None
        binary = binaries.pop()
        pid = min(holders)
        started = self._started(pid)
        if binary is None or started is None:
            return None
        return _Known(Caller(pid, binary, self._ancestors(pid, namespace)), started, link, holders[pid])

    def _pids(self) -> list[int]:
        return [int(name) for name in os.listdir(self._proc) if name.isdigit()]  # noqa: PTH208 - many entries, names only

    def _namespace(self, pid: int) -> int | None:
        try:
            return os.stat(f"{self._proc}/{pid}/ns/net").st_ino  # noqa: PTH116 - for every process
        except OSError:
            return None

    def _descriptor(self, pid: int, link: str) -> str | None:
        directory = f"{self._proc}/{pid}/fd"
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    try:
                        if os.readlink(entry.path) == link:  # noqa: PTH115 - for every descriptor
                            return entry.path
                    except OSError:
                        continue
        except OSError:
            return None
        return None

    def _executable(self, pid: int) -> str | None:
        try:
            path = os.readlink(f"{self._proc}/{pid}/exe")  # noqa: PTH115 - for every request
        except OSError:
            return None
        # A replaced or memory-only executable has no name that a policy could mean.
        return path if path.startswith("/") and not path.endswith(" (deleted)") else None

    def _stat(self, pid: int) -> list[str] | None:
        try:
            text = Path(f"{self._proc}/{pid}/stat").read_text()
        except OSError:
            return None
        return text.rpartition(")")[2].split()

    def _started(self, pid: int) -> str | None:
        fields = self._stat(pid)
        return None if fields is None else fields[_NUMBER_OF_STARTTIME]

    def _opened_sandbox(self, pid: int) -> bool:
        """Tell whether ``pid`` is the first process of a PID namespace of its own (proc(5), NSpid)."""
        try:
            status = Path(f"{self._proc}/{pid}/status").read_text(encoding="ascii", errors="replace")
        except OSError:
            return True
        numbers = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
        return len(numbers) > 1 and numbers[-1] == "1"

    def _ancestors(self, pid: int, namespace: int) -> tuple[str, ...]:
        """Executables of the parents inside the sandbox, nearest first, without the sandbox's first process.

        That one is our own command daemon: a rule for Python must not grant its network to whatever it starts.
        """
        found: list[str] = []
        for _ in range(_MAX_ANCESTORS):
            fields = self._stat(pid)
            if fields is None:
                break
            pid = int(fields[1])
            if pid <= 1 or self._namespace(pid) != namespace or self._opened_sandbox(pid):
                break
            binary = self._executable(pid)
            if binary is not None:
                found.append(binary)
        return tuple(found)


def _table_addresses(source: str) -> frozenset[str]:
    """Return ``address:port`` in the forms of ``/proc/net/tcp`` and, v4-mapped, ``tcp6`` (host byte order words)."""
    host, _, port = source.rpartition(":")
    try:
        packed = socket.inet_aton(host) if host.count(".") == 3 else None
        number = int(port)
    except (OSError, ValueError):
        return frozenset()
    if packed is None or not 0 < number < 65536:
        return frozenset()
    word = f"{struct.unpack('=I', packed)[0]:08X}"
    mapped = f"{struct.unpack('=I', socket.inet_aton('0.0.255.255'))[0]:08X}"
    return frozenset({f"{word}:{number:04X}", f"{'0' * 16}{mapped}{word}:{number:04X}"})
