"""The sandbox's system call filter, assembled here as classic BPF (``Documentation/userspace-api/seccomp_filter.rst``).

The unit around it carries systemd's allowlist; this filter is the second, argument-aware layer and also holds where the
command is started without systemd. It knows x86-64 only: a call by the i386 or x32 entry kills the process, an
unknown newer call answers ENOSYS. Only the standard library is used.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from dataclasses import dataclass, field

from saw.errors import SawError

AUDIT_ARCH_X86_64 = 0xC000003E
X32_BIT = 0x40000000
HIGHEST_KNOWN = 470
SYS_SECCOMP = 317
SET_MODE_FILTER = 1
FLAG_TSYNC = 1
PR_SET_NO_NEW_PRIVS = 38

RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_LD, _JEQ, _JGE, _JSET, _AND, _RET = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_OFFSET_NR, _OFFSET_ARCH, _OFFSET_ARGS = 0, 4, 16

SOCKET, CLONE, SOCKETPAIR, IOCTL, PERSONALITY, MEMFD_CREATE, EXECVEAT, CLONE3 = 41, 56, 53, 16, 135, 319, 322, 435

DENIED: dict[str, int] = {
    "ptrace": 101,
    "process_vm_readv": 310,
    "process_vm_writev": 311,
    "pidfd_getfd": 438,
    "kcmp": 312,
    "process_madvise": 440,
    "process_mrelease": 448,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
    "bpf": 321,
    "userfaultfd": 323,
    "perf_event_open": 298,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "mount": 165,
    "umount2": 166,
    "pivot_root": 155,
    "chroot": 161,
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "mount_setattr": 442,
    "open_tree_attr": 467,
    "unshare": 272,
    "setns": 308,
    "open_by_handle_at": 304,
    "name_to_handle_at": 303,
    "fanotify_init": 300,
    "quotactl": 179,
    "quotactl_fd": 443,
    "swapon": 167,
    "swapoff": 168,
    "reboot": 169,
    "kexec_load": 246,
    "kexec_file_load": 320,
    "init_module": 175,
    "finit_module": 313,
    "delete_module": 176,
    "acct": 163,
    "syslog": 103,
    "settimeofday": 164,
    "clock_settime": 227,
    "clock_adjtime": 305,
    "adjtimex": 159,
    "sethostname": 170,
    "setdomainname": 171,
    "iopl": 172,
    "ioperm": 173,
    "modify_ldt": 154,
    "uselib": 134,
    "ustat": 136,
    "sysfs": 139,
    "vhangup": 153,
    "lookup_dcookie": 212,
    "move_pages": 279,
    "migrate_pages": 256,
    "memfd_secret": 447,
}
"""System calls that answer EPERM, by number (``arch/x86/entry/syscalls/syscall_64.tbl``)."""

NAMESPACE_FLAGS = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x80
"""CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET,TIME}; the last only means a namespace in clone3 and unshare."""
CLONE_FLAGS = NAMESPACE_FLAGS & ~0x80
MFD_NOEXEC_SEAL = 0x8
AT_EMPTY_PATH = 0x1000
TERMINAL_IOCTLS = (0x5412, 0x541C, 0x5423)
"""TIOCSTI, TIOCLINUX and TIOCSETD: typing into, or changing, somebody else's terminal."""

MSG_FASTOPEN = 0x20000000
SENDING = {"sendto": (44, 3), "sendmsg": (46, 2), "sendmmsg": (307, 3)}
"""Calls that can open a TCP connection by MSG_FASTOPEN, which older Landlock does not see: number, index of the flags."""

AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10
SOCK_STREAM, SOCK_DGRAM = 1, 2
PROTOCOLS = {SOCK_STREAM: (0, 6), SOCK_DGRAM: (0, 17)}
"""Per Internet socket type, the protocols that may be asked for: TCP and UDP, nothing raw, SCTP, MPTCP or UDP-Lite."""


class SeccompError(SawError):
    """The kernel did not take the system call filter."""

    code = "seccomp_unavailable"


@dataclass
class _Program:
    """Instructions with symbolic jump targets; classic BPF only jumps forward, at most 255 instructions."""

    instructions: list[tuple[int, str | None, str | None, int]] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def add(self, code: int, value: int, then: str | None = None, otherwise: str | None = None) -> None:
        self.instructions.append((code, then, otherwise, value))

    def label(self, name: str) -> None:
        self.labels[name] = len(self.instructions)

    def load_argument(self, index: int, *, high: bool = False) -> None:
        self.add(_LD, _OFFSET_ARGS + 8 * index + (4 if high else 0))

    def answer(self, value: int) -> None:
        self.add(_RET, value)

    def assemble(self) -> bytes:
        out = bytearray()
        for position, (code, then, otherwise, value) in enumerate(self.instructions):
            jumps = [self.labels[name] - position - 1 if name else 0 for name in (then, otherwise)]
            if not all(0 <= jump <= 255 for jump in jumps):
                raise ValueError(f"jump out of range at instruction {position}")
            out += struct.pack("<HBBI", code, jumps[0], jumps[1], value)
        return bytes(out)


def build_filter() -> bytes:
    """Return the filter as an array of ``struct sock_filter`` (8 bytes each, little-endian)."""
    program = _Program()
    refuse = RET_ERRNO | errno.EPERM
    program.add(_LD, _OFFSET_ARCH)
    program.add(_JEQ, AUDIT_ARCH_X86_64, "native")
    program.answer(RET_KILL_PROCESS)
    program.label("native")
    program.add(_LD, _OFFSET_NR)
    program.add(_JGE, X32_BIT, "kill", "in-range")
    program.label("kill")
    program.answer(RET_KILL_PROCESS)
    program.label("in-range")
    program.add(_JGE, HIGHEST_KNOWN, "newer", "known")
    program.label("newer")
    program.answer(RET_ERRNO | errno.ENOSYS)
    program.label("known")
    for name, number in sorted(DENIED.items(), key=lambda item: item[1]):
        program.add(_JEQ, number, None, f"not-{name}")
        program.answer(refuse)
        program.label(f"not-{name}")
    program.add(_JEQ, CLONE3, None, "not-clone3")
    program.answer(RET_ERRNO | errno.ENOSYS)
    program.label("not-clone3")
    _argument_rules(program)
    program.answer(RET_ALLOW)
    program.label("refuse")
    program.answer(refuse)
    program.label("allow")
    program.answer(RET_ALLOW)
    return program.assemble()


def _argument_rules(program: _Program) -> None:
    program.add(_JEQ, CLONE, None, "not-clone")
    program.load_argument(0)
    program.add(_JSET, CLONE_FLAGS, "refuse", "allow")
    program.label("not-clone")

    program.add(_JEQ, IOCTL, None, "not-ioctl")
    program.load_argument(1)
    for request in TERMINAL_IOCTLS:
        program.add(_JEQ, request, "refuse")
    program.add(_RET, RET_ALLOW)
    program.label("not-ioctl")

    program.add(_JEQ, PERSONALITY, None, "not-personality")
    program.load_argument(0)
    program.add(_JEQ, 0, "allow")
    program.add(_JEQ, 0xFFFFFFFF, "allow", "refuse")
    program.label("not-personality")

    program.add(_JEQ, MEMFD_CREATE, None, "not-memfd")
    program.load_argument(1)
    program.add(_JSET, MFD_NOEXEC_SEAL, "allow")
    program.answer(RET_ERRNO | errno.ENOSYS)
    program.label("not-memfd")

    program.add(_JEQ, EXECVEAT, None, "not-execveat")
    program.load_argument(4)
    program.add(_JSET, AT_EMPTY_PATH, "refuse", "allow")
    program.label("not-execveat")

    for name, (number, flags) in SENDING.items():
        program.add(_JEQ, number, None, f"not-{name}")
        program.load_argument(flags)
        program.add(_JSET, MSG_FASTOPEN, "refuse", "allow")
        program.label(f"not-{name}")

    program.add(_JEQ, SOCKETPAIR, None, "not-socketpair")
    program.load_argument(0)
    program.add(_JEQ, AF_UNIX, "allow", "refuse")
    program.label("not-socketpair")

    program.add(_JEQ, SOCKET, "socket", "allow")
    program.label("socket")
    program.load_argument(0)
    program.add(_JEQ, AF_UNIX, "allow")
    program.add(_JEQ, AF_INET, "internet")
    program.add(_JEQ, AF_INET6, "internet", "refuse")
    program.label("internet")
    program.load_argument(1)
    program.add(_AND, 0xF)
    for kind, protocols in PROTOCOLS.items():
        program.add(_JEQ, kind, None, f"not-type-{kind}")
        program.load_argument(2)
        for protocol in protocols:
            program.add(_JEQ, protocol, "allow")
        program.answer(RET_ERRNO | errno.EPERM)
        program.label(f"not-type-{kind}")
    program.add(_RET, RET_ERRNO | errno.EPERM)


class _SockFprog(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


def install(program: bytes) -> None:
    """Apply ``program`` to every thread of this process, for good; raise :class:`SeccompError` when the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise SeccompError("PR_SET_NO_NEW_PRIVS failed", cure="see the kernel log")
    header = _SockFprog(len(program) // 8, program)
    answer = libc.syscall(SYS_SECCOMP, ctypes.c_uint(SET_MODE_FILTER), ctypes.c_uint(FLAG_TSYNC), ctypes.byref(header))
    if answer != 0:
        number = ctypes.get_errno()
        raise SeccompError(
            f"the system call filter was not accepted: {errno.errorcode.get(number, number)}",
            cure="use a kernel with CONFIG_SECCOMP_FILTER",
        )
