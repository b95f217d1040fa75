"""Landlock: confine the calling process to named paths, one TCP port and its own abstract sockets and signals.

The three system calls are made through libc (``Documentation/userspace-api/landlock.rst``). Only the standard library is
used, because the launcher runs this just before it executes a command.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from saw.errors import SawError

SYS_CREATE_RULESET = 444
SYS_ADD_RULE = 445
SYS_RESTRICT_SELF = 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
RULE_NET_PORT = 2
PR_SET_NO_NEW_PRIVS = 38

EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE, IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_MAKE_AND_REMOVE = 0x1FF0  # bits 4-12: remove dir/file, make char, dir, reg, sock, fifo, block, sym
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_FILE_RIGHTS = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV
CONNECT_TCP = 1 << 1
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1 << 0, 1 << 1

FEATURES = {
    1: "file access",
    2: "rename and link across directories",
    3: "truncation",
    4: "TCP connect",
    5: "device ioctls",
}
FEATURES[6] = "abstract Unix sockets and signals"


class LandlockError(SawError):
    """The kernel cannot apply the confinement that was asked for."""

    code = "landlock_unavailable"


@dataclass(frozen=True)
class Confinement:
    """What stays reachable: everything that is not listed is refused.

    ``devices`` are opened for reading, writing and ioctl; ``connect_ports`` are TCP ports on any address.
    """

    read_only: tuple[str, ...]
    read_write: tuple[str, ...]
    devices: tuple[str, ...] = ()
    connect_ports: tuple[int, ...] = ()


class _RulesetAttr(ctypes.Structure):
    _fields_ = [("fs", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


class _NetPort(ctypes.Structure):
    _fields_ = [("allowed", ctypes.c_uint64), ("port", ctypes.c_uint64)]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def abi() -> int:
    """Return the kernel's Landlock ABI version, 0 when Landlock is absent or switched off."""
    found = _libc().syscall(SYS_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(CREATE_RULESET_VERSION))
    return max(int(found), 0)


def handled_rights(version: int) -> tuple[int, int, int]:
    """Return the (file, network, scope) rights that ABI ``version`` can refuse and that we therefore handle."""
    files = EXECUTE | WRITE_FILE | READ_FILE | READ_DIR | _MAKE_AND_REMOVE
    files |= REFER if version >= 2 else 0
    files |= TRUNCATE if version >= 3 else 0
    files |= IOCTL_DEV if version >= 5 else 0
    network = CONNECT_TCP if version >= 4 else 0
    scope = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if version >= 6 else 0
    return files, network, scope


def require(minimum: int, *, found: int | None = None) -> int:
    """Return the kernel's ABI, or raise :class:`LandlockError` that names what an older kernel cannot refuse."""
    version = abi() if found is None else found
    if version < minimum:
        missing = ", ".join(text for level, text in sorted(FEATURES.items()) if version < level <= minimum)
        raise LandlockError(
            f"Landlock ABI {minimum} is required and this kernel offers {version}: it cannot confine {missing}",
            cure="boot a newer kernel with lsm=landlock, or let governance.yaml state a lower minimum",
            details={"required": minimum, "found": version},
        )
    return version


def confine(rules: Confinement, *, minimum: int) -> int:
    """Confine the calling thread and all it will execute; return the ABI used.

    Paths that do not exist are left out (they cannot be reached afterwards either). Raises :class:`LandlockError` when
    the ABI is lower than ``minimum`` or a call fails. With ``minimum`` 0 a kernel without Landlock is accepted and the
    result is 0.
    """
    version = require(minimum)
    if version == 0:
        return 0
    libc = _libc()
    files, network, scope = handled_rights(version)
    attributes = _RulesetAttr(files, network, scope)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = libc.syscall(SYS_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0))
    if ruleset < 0:
        raise _failed("landlock_create_ruleset")
    try:
        reading = EXECUTE | READ_FILE | READ_DIR
        writing = files & ~(_MAKE_CHAR | _MAKE_BLOCK)
        _allow_paths(libc, ruleset, rules.read_only, reading)
        _allow_paths(libc, ruleset, rules.read_write, writing)
        _allow_paths(libc, ruleset, rules.devices, files & (READ_FILE | WRITE_FILE | READ_DIR | IOCTL_DEV))
        for port in rules.connect_ports if network else ():
            rule = _NetPort(CONNECT_TCP, port)
            if libc.syscall(SYS_ADD_RULE, ruleset, RULE_NET_PORT, ctypes.byref(rule), ctypes.c_uint32(0)) != 0:
                raise _failed(f"landlock_add_rule for TCP port {port}")
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise _failed("PR_SET_NO_NEW_PRIVS")
        if libc.syscall(SYS_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)) != 0:
            raise _failed("landlock_restrict_self")
    finally:
        os.close(ruleset)
    return version


def _allow_paths(libc: ctypes.CDLL, ruleset: int, paths: Iterable[str], rights: int) -> None:
    for path in paths:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        try:
            directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            rule = _PathBeneath(rights if directory else rights & _FILE_RIGHTS, descriptor)
            if libc.syscall(SYS_ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0)) != 0:
                raise _failed(f"landlock_add_rule for {path}")
        finally:
            os.close(descriptor)


def _failed(what: str) -> LandlockError:
    number = ctypes.get_errno()
    return LandlockError(f"{what} failed: {errno.errorcode.get(number, number)}", cure="see the kernel log")
