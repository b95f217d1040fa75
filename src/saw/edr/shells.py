"""Reverse shells: a shell whose standard input or output is a network socket (proc(5)).

Sockets are told apart by the tables of every network namespace, since a process keeps a socket that it opened, or was given, in
another namespace than its own. A socket of a family without a table (vsock, SCTP, MPTCP) is no local one either, and counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

from saw.edr.detection import Detection

_SOCKET = re.compile(r"socket:\[([0-9]+)\]")
_NETWORK = ("tcp", "tcp6", "udp", "udp6", "udplite", "udplite6", "raw", "raw6")
_INODE = 9
_LOCAL_INODE = 6


class _Candidate(msgspec.Struct, frozen=True):
    pid: int
    program: str
    sockets: dict[int, str]


class Tables(msgspec.Struct, frozen=True):
    """Inodes of sockets of all network namespaces: network ones with their peer's address, and Unix sockets."""

    network: dict[str, str]
    local: frozenset[str]


def find_shells(proc: Path, shells: frozenset[str]) -> list[Detection]:
    """Return the reverse shells that run now. What ends during the look is left out."""
    candidates = [one for pid in _pids(proc) if (one := _candidate(proc, pid, shells))]
    if not candidates:
        return []
    tables = read_tables(proc)
    return [found for one in candidates if (found := _judge(proc, one, tables))]


def read_tables(proc: Path) -> Tables:
    """Read the socket tables, once for each network namespace."""
    network: dict[str, str] = {}
    local: set[str] = set()
    seen: set[str] = set()
    for pid in _pids(proc):
        try:
            namespace = str((proc / str(pid) / "ns/net").readlink())
        except OSError:
            continue
        if namespace in seen:
            continue
        folder = proc / str(pid) / "net"
        try:
            local.update(row[_LOCAL_INODE] for row in _table(folder / "unix", _LOCAL_INODE))
        except OSError:
            continue
        seen.add(namespace)
        for name in _NETWORK:
            try:
                network.update({row[_INODE]: f"{name} {_address(row[2])}" for row in _table(folder / name, _INODE)})
            except OSError:
                continue
    return Tables(network, frozenset(local))


def _candidate(proc: Path, pid: int, shells: frozenset[str]) -> _Candidate | None:
    folder = proc / str(pid)
    try:
        program = str((folder / "exe").readlink()).removesuffix(" (deleted)")
    except OSError:
        return None
    if Path(program).name not in shells:
        return None
    sockets = {number: inode for number in (0, 1) if (inode := _socket(folder, number))}
    return _Candidate(pid, program, sockets) if sockets else None


def _judge(proc: Path, one: _Candidate, tables: Tables) -> Detection | None:
    folder = proc / str(one.pid)
    for number, inode in one.sockets.items():
        if inode in tables.local or _socket(folder, number) != inode:
            continue  # a local one, or one that was closed meanwhile: then a table that lacks it says nothing
        peer = tables.network.get(inode, "")
        told = _about(folder)
        if told is None:
            return None
        started, parent, user = told
        return Detection(
            "reverse_shell",
            one.program,
            "A shell is driven over a network socket",
            f"reverse_shell|{one.pid}|{started}",
            "critical",
            {
                "pid": one.pid,
                "parent_pid": parent,
                "parent": _program(proc, parent),
                "user_id": user,
                "descriptor": number,
                "peer": peer or "of a family without a table",
            },
        )
    return None


def _pids(proc: Path) -> Iterator[int]:
    for entry in os.scandir(proc):
        if entry.name.isdecimal():
            yield int(entry.name)


def _socket(folder: Path, number: int) -> str:
    try:
        found = _SOCKET.fullmatch(str((folder / f"fd/{number}").readlink()))
    except OSError:
        return ""
    return found[1] if found else ""


def _about(folder: Path) -> tuple[str, int, int] | None:
    """Return start time (ticks since boot), parent and user of a process, None when it is gone."""
    try:
        after = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return after[19], int(after[1]), folder.stat().st_uid
    except (OSError, IndexError, ValueError):
        return None


def _program(proc: Path, pid: int) -> str:
    try:
        return str((proc / str(pid) / "exe").readlink())
    except OSError:
        return ""


def _table(path: Path, least: int) -> list[list[str]]:
    rows = (line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[1:])
    return [row for row in rows if len(row) > least]


def _address(field: str) -> str:
    """Return ``address:port`` of the kernel's hexadecimal words, which are in the machine's byte order."""
    words, _, port = field.partition(":")
    try:
        raw = b"".join(bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8))
        number = int(port, 16)
    except ValueError:
        return field
    if len(raw) == 4:
        return f"{'.'.join(map(str, raw))}:{number}"
    groups = ":".join(raw[at : at + 2].hex() for at in range(0, len(raw), 2))
    return f"[{groups}]:{number}"


__all__ = ["Tables", "find_shells", "read_tables"]
