"""Try things from inside a sandbox and report, as one JSON object on stdout, what happened to each.

``python3 sandbox_probe.py [CASE…]`` (default: all). An outcome is ``ok``, the name of an errno (``EPERM``), ``signal:SIGSYS``
or ``timeout``. Needs Python's standard library only, so that it can run in any Linux sandbox on x86-64. Every case is made so
that it changes nothing even where it is not refused, root included: calls get arguments that fail later than the
refusal would (a directory that does not exist, a descriptor of -1), and created files are removed at once.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
PAGE = ctypes.create_string_buffer(4096)
PROXY = ("10.200.0.1", 3128)


def syscall(number: int, *arguments: object) -> Callable[[], None]:
    """Return a case that makes one system call."""

    def case() -> None:
        if LIBC.syscall(ctypes.c_long(number), *arguments) < 0:
            number_found = ctypes.get_errno()
            raise OSError(number_found, os.strerror(number_found))

    return case


def sock(family: int, kind: int, protocol: int = 0) -> Callable[[], None]:
    """Return a case that creates a socket."""
    return lambda: socket.socket(family, kind, protocol).close()


def connect(family: int, address: object, kind: int = socket.SOCK_STREAM) -> Callable[[], None]:
    """Return a case that connects within a second."""

    def case() -> None:
        with socket.socket(family, kind) as connection:
            connection.settimeout(1)
            connection.connect(address)  # type: ignore[arg-type]

    return case


def send(family: int, address: object, payload: bytes = b"x") -> Callable[[], None]:
    """Return a case that sends a datagram; ok only when the kernel took it."""

    def case() -> None:
        with socket.socket(family, socket.SOCK_DGRAM) as connection:
            connection.sendto(payload, address)  # type: ignore[arg-type]

    return case


def read(path: str) -> Callable[[], None]:
    """Return a case that opens a file and reads one byte."""

    def case() -> None:
        descriptor = os.open(path, os.O_RDONLY)
        os.read(descriptor, 1)

    return case


def write(path: str, flags: int = 0) -> Callable[[], None]:
    """Return a case that creates a file, and removes it again."""

    def case() -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flags, 0o600))
        os.unlink(path)  # noqa: PTH108

    return case


def replace(path: str) -> Callable[[], None]:
    """Return a case that renames ``path`` onto itself, which needs the right to replace it and changes nothing."""
    return lambda: os.rename(path, path)  # noqa: PTH104


def replace_own() -> None:
    """Replace a file of our own (the twin of every replacement that is refused)."""
    descriptor = os.open("/tmp/saw-probe-own", os.O_WRONLY | os.O_CREAT, 0o600)
    os.close(descriptor)
    replace("/tmp/saw-probe-own")()
    os.unlink("/tmp/saw-probe-own")  # noqa: PTH108


def machine_code(code: bytes) -> Callable[[], None]:
    """Return a case that executes raw instructions."""

    def case() -> None:
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(code)
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        if ctypes.CFUNCTYPE(ctypes.c_int)(address)() < 0:
            raise OSError(errno.EPERM, "refused")

    return case


def device() -> None:
    """Make a device node, and remove it again."""
    os.mknod("/tmp/saw-probe-device", 0o020600, os.makedev(1, 3))
    os.unlink("/tmp/saw-probe-device")  # noqa: PTH108


def fileless() -> None:
    """Execute a program that has no file, out of a memfd."""
    descriptor = LIBC.syscall(ctypes.c_long(319), b"probe", ctypes.c_uint(0))
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), "memfd_create")
    with open("/usr/bin/true", "rb") as program:  # noqa: PTH123 - standard calls, nothing to hide behind
        os.write(descriptor, program.read())
    os.execv(f"/proc/self/fd/{descriptor}", ["probe"])  # noqa: S606


def sealed_memory() -> None:
    """Make anonymous memory that can never be executed."""
    if LIBC.syscall(ctypes.c_long(319), b"probe", ctypes.c_uint(8)) < 0:
        raise OSError(ctypes.get_errno(), "memfd_create")


def setuid_gain() -> None:
    """Run a setuid-root program and see whether it became root."""
    program = next((path for path in ("/usr/bin/su", "/usr/bin/passwd", "/usr/bin/mount") if os.path.exists(path)), "")  # noqa: PTH110
    child = os.fork()
    if child == 0:
        os.execv("/bin/sh", ["sh", "-c", f"grep -q 'NoNewPrivs:.1' /proc/self/status && exit 1; test -u {program}"])  # noqa: S606
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
        raise OSError(errno.EPERM, "no new privileges")


def other_process() -> None:
    """Read the environment of a process that is not ours."""
    own = os.getpgid(0)
    for name in os.listdir("/proc"):  # noqa: PTH208
        if name.isdigit() and os.stat(f"/proc/{name}").st_uid != os.getuid() and int(name) != own:  # noqa: PTH116
            read(f"/proc/{name}/environ")()
            return
    raise OSError(errno.ENOENT, "no other process is visible")


def plain_fork() -> None:
    """Start a program the ordinary way (the twin of every refused way)."""
    subprocess.run(["/usr/bin/true"], check=True)


def pty_inject() -> None:
    """Type into a terminal with TIOCSTI."""
    import fcntl

    _, slave = os.openpty()
    fcntl.ioctl(slave, 0x5412, b"x")


def pty_size() -> None:
    """An ordinary terminal ioctl."""
    import fcntl

    _, slave = os.openpty()
    fcntl.ioctl(slave, 0x5413, b"\0" * 8)


CASES: dict[str, Callable[[], None]] = {
    # process and system calls
    "ptrace": syscall(101, 0, 0, 0, 0),
    "process_vm_readv": syscall(310, os.getppid(), None, 0, None, 0, 0),
    "pidfd_getfd": syscall(438, -1, 0, 0),
    "io_uring": syscall(425, 1, PAGE),
    "keyctl": syscall(250, 0, -3, 1),
    "bpf": syscall(321, 5, PAGE, 64),
    "userfaultfd": syscall(323, 0),
    "perf": syscall(298, None, -1, -1, -1, 0),
    "mount": syscall(165, b"none", b"/nonexistent/probe", b"tmpfs", 0, None),
    "fsopen": syscall(430, b"tmpfs", 0),
    "unshare-user": syscall(272, 0x10000000),
    "unshare-net": syscall(272, 0x40000000),
    "clone-user": syscall(56, 0x10000000 | 0x200, 0, 0, 0, 0),
    "clone3": syscall(435, PAGE, 1),
    "setns": syscall(308, -1, 0),
    "open_by_handle": syscall(304, -1, PAGE, 0),
    "personality": syscall(135, 0x0040000),
    "personality-query": syscall(135, 0xFFFFFFFF),
    "unknown-call": syscall(480, 0),
    "i386-entry": machine_code(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"),
    "x32-entry": machine_code(b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"),
    "native-entry": machine_code(b"\xb8\x27\x00\x00\x00\x0f\x05\xc3"),
    "fileless-exec": fileless,
    "sealed-memory": sealed_memory,
    "fork-exec": plain_fork,
    "tiocsti": pty_inject,
    "terminal-size": pty_size,
    "setuid": setuid_gain,
    "signal-init": lambda: os.kill(1, 0),
    # files
    "read-gpu-0": read("/dev/nvidia0"),
    "read-gpu-1": read("/dev/nvidia1"),
    "read-shadow": read("/etc/shadow"),
    "read-passwd": read("/etc/passwd"),
    "others-environ": other_process,
    "write-usr": write("/usr/lib/saw-probe"),
    "write-etc": write("/etc/saw-probe"),
    "write-cron": write("/etc/cron.d/saw-probe"),
    "write-tmp": write("/tmp/saw-probe"),
    "write-shm": write("/dev/shm/saw-probe"),
    "read-host-shm": read("/dev/shm/saw-probe-host"),
    "write-generation": write("/run/saw/generations/saw-probe"),
    "replace-generation": replace("/run/saw/generations/current"),
    "write-ring1-ca": write("/run/saw/ring1-ca/saw-probe"),
    "read-ring1-ca": read("/run/saw/ring1-ca/ca.key"),
    "replace-ca-bundle": replace("/run/saw/sandbox/ca-bundle.pem"),
    "read-ca-bundle": read("/run/saw/sandbox/ca-bundle.pem"),
    "write-unit": write("/run/systemd/system/saw-probe.service"),
    "write-unit-etc": write("/etc/systemd/system/saw-probe.service"),
    "replace-own-file": replace_own,
    "make-device": device,
    # sockets
    "raw": sock(socket.AF_INET, socket.SOCK_RAW, 1),
    "ping": sock(socket.AF_INET, socket.SOCK_DGRAM, 1),
    "packet": sock(socket.AF_PACKET, socket.SOCK_RAW, 0),
    "netlink": sock(socket.AF_NETLINK, socket.SOCK_RAW, 0),
    "netlink-nft": sock(socket.AF_NETLINK, socket.SOCK_RAW, 12),
    "netlink-audit": sock(socket.AF_NETLINK, socket.SOCK_RAW, 9),
    "vsock": sock(40, socket.SOCK_STREAM),
    "alg": sock(38, 5),
    "bluetooth": sock(31, socket.SOCK_RAW, 1),
    "sctp": sock(socket.AF_INET, socket.SOCK_STREAM, 132),
    "mptcp": sock(socket.AF_INET, socket.SOCK_STREAM, 262),
    "udplite": sock(socket.AF_INET, socket.SOCK_DGRAM, 136),
    "dccp": sock(socket.AF_INET, 6, 33),
    "tcp-socket": sock(socket.AF_INET, socket.SOCK_STREAM),
    "unix-pair": lambda: [end.close() for end in socket.socketpair()] and None,
    # reach
    "direct-tcp": connect(socket.AF_INET, ("192.0.2.1", 443)),
    "direct-tcp6": connect(socket.AF_INET6, ("2001:db8::1", 443)),
    "link-local6": connect(socket.AF_INET6, ("fe80::1", 443, 0, 1)),
    "metadata": connect(socket.AF_INET, ("169.254.169.254", 80)),
    "proxy-other-port": connect(socket.AF_INET, (PROXY[0], 9901)),
    "ssh-of-vm": connect(socket.AF_INET, (PROXY[0], 22)),
    "proxy": connect(socket.AF_INET, PROXY),
    "dns-udp": send(socket.AF_INET, (PROXY[0], 53)),
    "udp-out": send(socket.AF_INET, ("192.0.2.1", 5353)),
    "udp6-out": send(socket.AF_INET6, ("2001:db8::1", 53)),
    "udp-loopback": send(socket.AF_INET, ("127.0.0.1", 9)),
    "fast-open": lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, (PROXY[0], 9901)) and None,
    "abstract-unix": connect(socket.AF_UNIX, "\0saw-probe-host"),
    "path-unix-host": connect(socket.AF_UNIX, "/run/saw-probe-host.sock"),
}


def outcome(case: Callable[[], None]) -> str:
    """Run ``case`` in a child process and return what happened."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        result = "ok"
        try:
            os.close(reading)
            os.setsid()
            case()
        except TimeoutError:
            result = "timeout"
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, str(error.errno))
        except BaseException as error:  # noqa: BLE001 - reported to the reader
            result = f"{type(error).__name__}: {error}"
        os.write(writing, result.encode())
        os._exit(0)
    os.close(writing)
    ready = select.select([reading], [], [], 5)[0]
    text = os.read(reading, 200).decode() if ready else "timeout"
    os.close(reading)
    if not ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if text:
        return text
    return f"signal:{signal.Signals(-code).name}" if code < 0 else "ok"


if __name__ == "__main__":
    print(json.dumps({name: outcome(CASES[name]) for name in sys.argv[1:] or CASES}, indent=1))
