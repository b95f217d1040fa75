"""Attempts on the kernel and on other processes. Every call is real; what it changes is changed back, or belongs to a child."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable

from saw.conformance.probe.core import LIBC, NotPossible, Refused, attempt, syscall

X86_64 = os.uname().machine == "x86_64"


class Sleeper:
    """A child of ours that holds still: what is tried on it is tried on another process."""

    def __enter__(self) -> int:
        self.pid = os.fork()
        if self.pid == 0:
            time.sleep(20)
            os._exit(0)
        return self.pid

    def __exit__(self, *_: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@attempt("call")
def call(number: int, arguments: list, reached: list) -> str:  # type: ignore[type-arg]
    """Make one system call by its x86-64 number. ``reached`` names errnos that only come after the permission check."""
    if not X86_64:
        raise NotPossible("system call numbers are those of x86-64")
    values = [item.encode() if isinstance(item, str) else item for item in arguments]
    try:
        return f"the call answered {syscall(number, *values)}"
    except OSError as error:
        if errno.errorcode.get(error.errno or 0) in reached:
            return f"the kernel went on to check the arguments: {error}"
        raise


@attempt("ptrace")
def ptrace() -> str:
    """Attach to another process."""
    with Sleeper() as pid:
        syscall(101, 16, pid, 0, 0)
        os.waitpid(pid, 0)
        return "attached"


@attempt("traceme")
def traceme() -> str:
    """Ask to be traced by the parent."""
    syscall(101, 0, 0, 0, 0)
    return "traced"


class _Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@attempt("vm-access")
def vm_access(number: int, pid: int = 0) -> str:
    """Read (310) or write (311) the memory of another process."""
    content = ctypes.create_string_buffer(b"saw-probe", 16)
    local = ctypes.create_string_buffer(b"saw-probe", 16)
    one, two = _Range(ctypes.addressof(local), 9), _Range(ctypes.addressof(content), 9)
    if pid:
        syscall(number, pid, ctypes.byref(one), 1, ctypes.byref(two), 1, 0)
        return f"reached process {pid}"
    with Sleeper() as child:
        syscall(number, child, ctypes.byref(one), ctypes.c_ulong(1), ctypes.byref(two), ctypes.c_ulong(1), 0)
        return "reached the memory of another process"


@attempt("pidfd-getfd")
def pidfd_getfd() -> str:
    """Take a descriptor out of another process."""
    with Sleeper() as child:
        handle = syscall(434, child, 0)
        os.close(syscall(438, handle, 1, 0))
        return "took a descriptor"


@attempt("kcmp")
def kcmp() -> str:
    """Compare kernel objects of two processes."""
    with Sleeper() as child:
        syscall(312, os.getpid(), child, 1, 0, 0)
        return "compared"


@attempt("io-uring")
def io_uring() -> str:
    """Make an io_uring, whose operations pass no system call filter."""
    os.close(syscall(425, 1, ctypes.create_string_buffer(256)))
    return "made"


@attempt("bpf")
def bpf(command: int) -> str:
    """Make a BPF map (0) or load a program (5)."""
    body = ctypes.create_string_buffer(128)
    if command == 0:
        struct.pack_into("IIII", body, 0, 2, 4, 4, 1)
    else:
        code = ctypes.create_string_buffer(struct.pack("<BBhiBBhi", 0xB7, 0, 0, 0, 0x95, 0, 0, 0))
        text = ctypes.create_string_buffer(b"GPL\0")
        struct.pack_into("IIQQ", body, 0, 1, 2, ctypes.addressof(code), ctypes.addressof(text))
    os.close(syscall(321, command, body, 128))
    return "accepted"


@attempt("perf")
def perf() -> str:
    """Count events of this process."""
    body = ctypes.create_string_buffer(112)
    struct.pack_into("IIQ", body, 0, 1, 112, 0)  # software, size, CPU clock
    struct.pack_into("Q", body, 40, 0x60)  # exclude kernel and hypervisor
    os.close(syscall(298, body, 0, -1, ctypes.c_long(-1), 0))
    return "counting"


@attempt("mount")
def mount() -> str:
    """Mount a file system on a directory of our own."""
    place = f"/tmp/saw-probe-mount-{os.getpid()}"
    os.mkdir(place, 0o700)
    try:
        syscall(165, b"none", place.encode(), b"tmpfs", 0, None)
        syscall(166, place.encode(), 0)
    finally:
        os.rmdir(place)
    return "mounted"


@attempt("clone")
def clone(flags: int) -> str:
    """Make a child in new namespaces with clone."""
    if syscall(56, ctypes.c_ulong(flags | signal.SIGCHLD), None, None, None, None) == 0:
        os._exit(0)
    return "a child in new namespaces ran"


@attempt("clone3")
def clone3(flags: int) -> str:
    """Make a child in new namespaces with clone3, whose flags a filter cannot see."""
    body = ctypes.create_string_buffer(struct.pack("8Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0), 64)
    if syscall(435, body, ctypes.c_size_t(64)) == 0:
        os._exit(0)
    return "a child in new namespaces ran"


@attempt("setns")
def setns(path: str) -> str:
    """Enter a namespace by its file."""
    handle = os.open(path, os.O_RDONLY)
    syscall(308, handle, 0)
    return "entered"


@attempt("file-handle")
def file_handle() -> str:
    """Open a file by its handle, which no path rule sees."""
    body = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
    number = ctypes.c_int(0)
    syscall(303, ctypes.c_int(-100), b"/usr", body, ctypes.byref(number), 0)
    root = os.open("/usr", os.O_RDONLY)
    os.close(syscall(304, root, body, os.O_RDONLY))
    return "opened"


@attempt("machine-code")
def machine_code(code: str) -> str:
    """Execute raw instructions that enter the kernel by the entry of another ABI."""
    if not X86_64:
        raise NotPossible("the instructions are those of x86-64")
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(bytes.fromhex(code))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    answer = ctypes.CFUNCTYPE(ctypes.c_int)(address)()
    if answer < 0:
        raise OSError(-answer, os.strerror(-answer))
    return f"the kernel answered {answer}"


def _memfd() -> int:
    handle = syscall(319, b"saw-probe", 0)
    with open("/usr/bin/true", "rb") as program:
        os.write(handle, program.read())
    return handle


@attempt("fileless")
def fileless(how: str) -> str:
    """Execute a program that has no file: by /proc/self/fd or by execveat."""
    handle = _memfd()
    child = os.fork()
    if child == 0:
        try:
            if how == "proc":
                os.execv(f"/proc/self/fd/{handle}", ["probe"])
            words = (ctypes.c_char_p * 2)(b"probe", None)
            syscall(322, handle, b"", words, None, 0x1000)
        except OSError as error:
            os._exit(error.errno or 1)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))
    return "executed"


@attempt("sealed-memory")
def sealed_memory() -> str:
    """Make anonymous memory that can never be executed (5.x kernels make it without the seal)."""
    try:
        syscall(319, b"probe", 8)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NotPossible("this kernel has no MFD_NOEXEC_SEAL") from None
    return "made"


@attempt("fork-exec")
def fork_exec() -> str:
    """Start a program the ordinary way."""
    subprocess.run(["/usr/bin/true"], check=True)
    return "ran"


@attempt("terminal")
def terminal(request: int) -> str:
    """Type into (TIOCSTI), or ask the size of, our controlling terminal."""
    _, slave = os.openpty()
    fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY; the attempt leads a session of its own
    fcntl.ioctl(slave, request, bytearray(8))
    return "the terminal took it"


@attempt("identity")
def identity(how: str) -> str:
    """Become root, or join root's group."""
    if os.getuid() == 0:
        return "this is root already"
    {"setuid": lambda: os.setuid(0), "setgid": lambda: os.setgid(0), "setgroups": lambda: os.setgroups([0])}[how]()
    return "changed"


@attempt("root")
def root() -> str:
    """Be root, or hold a capability."""
    status = open("/proc/self/status", encoding="ascii", errors="replace").read()
    held = {line.split(":")[0]: int(line.split()[1], 16) for line in status.splitlines() if line.startswith("Cap")}
    for name in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
        if held.get(name):
            return f"{name} is {held[name]:x}"
    if os.geteuid() == 0:
        return "the effective user is root"
    raise Refused("no capability is held", reason="none_held")


@attempt("setuid-program")
def setuid_program() -> str:
    """Start a set-user-id program of root and look whether it runs as root."""
    places = ("/usr/bin/passwd", "/usr/bin/su", "/usr/bin/chsh", "/usr/bin/newgrp", "/usr/bin/mount")
    found = [path for path in places if os.path.exists(path) and os.stat(path).st_mode & 0o4000]
    if not found:
        raise NotPossible("there is no set-user-id program")
    if os.getuid() == 0:
        return "this is root already"
    if os.statvfs(found[0]).f_flag & 2:
        raise Refused(f"{found[0]} lies on a file system without set-user-id", reason="nosuid")
    master, slave = os.openpty()
    child = os.fork()
    if child == 0:
        for number in range(3):
            os.dup2(slave, number)
        os.execv(found[0], [found[0]])
    try:
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            with open(f"/proc/{child}/status", encoding="ascii", errors="replace") as stream:
                lines = dict(line.split(":", 1) for line in stream.read().splitlines() if ":" in line)
            if lines.get("Name", "").strip() == os.path.basename(found[0]):
                if lines["Uid"].split()[1] == "0":
                    return f"{found[0]} ran as root"
                raise Refused(f"{found[0]} ran without root's rights", reason="no_new_privileges")
            if lines.get("State", "").strip().startswith("Z"):
                break
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(master)
    raise Refused(f"{found[0]} could not be seen running", reason="not_started")


@attempt("find-process")
def find_process(mark: str) -> str:
    """Find a process of the host by a word in its command line."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/cmdline", "rb") as stream:
                    if mark.encode() in stream.read() and int(name) != os.getpid():
                        return f"sees process {name}"
            except OSError:
                continue
    raise Refused("no such process is visible", reason="hidden")


@attempt("find-own")
def find_own() -> str:
    """See a process of our own."""
    with Sleeper() as child:
        return open(f"/proc/{child}/stat", encoding="ascii").read().split()[0]


@attempt("host-process")
def host_process(pid: int, mark: str, what: str) -> str:
    """Read the environment or the memory of, trace, or signal, the host's process ``pid``, of our own user."""
    if what == "signal":
        os.kill(pid, signal.SIGURG)  # ignored by default: harmless where another process has this number
        return "the kernel took the signal"
    if what == "trace":
        syscall(101, 16, pid, 0, 0)
        os.waitpid(pid, 0)
        syscall(101, 17, pid, 0, 0)
        return "attached, and detached again"
    with open(f"/proc/{pid}/{'environ' if what == 'environment' else 'maps'}", "rb") as stream:
        content = stream.read()
    if what == "environment" and mark.encode() not in content:
        raise Refused("another process has this number here", reason="hidden")
    if what == "memory":
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            if mark.encode() not in stream.read():
                raise Refused("another process has this number here", reason="hidden")
        with open(f"/proc/{pid}/mem", "rb") as stream:
            stream.seek(int(content.split(b"-", 1)[0], 16))
            stream.read(16)
    return f"read the {what} of process {pid}"


@attempt("shared-memory")
def shared_memory(key: int, mark: str) -> str:
    """Read System V shared memory of the host."""
    LIBC.shmat.restype = ctypes.c_void_p
    handle = LIBC.shmget(ctypes.c_int(key), ctypes.c_size_t(0), ctypes.c_int(0))
    if handle < 0:
        found = ctypes.get_errno()
        raise OSError(found, os.strerror(found))
    address = LIBC.shmat(ctypes.c_int(handle), None, ctypes.c_int(0o10000))
    if address in (None, ctypes.c_void_p(-1).value):
        found = ctypes.get_errno()
        raise OSError(found, os.strerror(found))
    if ctypes.string_at(address, len(mark)) != mark.encode():
        raise Refused("another segment has this key", reason="absent")
    return "read it"


@attempt("limit")
def limit(what: str, bound: int) -> str:
    """Use more of a resource than a sandbox should give: bounded, and given back at once."""
    attempts: dict[str, Callable[[int], str]] = {
        "tasks": _tasks, "descriptors": _descriptors, "core": _core, "memory": _memory,
    }  # fmt: skip
    return attempts[what](bound)


def _tasks(bound: int) -> str:
    threading.stack_size(65536)
    over, threads = threading.Event(), []
    try:
        for _ in range(bound):
            thread = threading.Thread(target=over.wait, daemon=True)
            thread.start()
            threads.append(thread)
    except RuntimeError:
        raise OSError(errno.EAGAIN, f"no more than {len(threads)} tasks") from None
    finally:
        over.set()
    return f"{bound} tasks ran at once"


def _descriptors(bound: int) -> str:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = bound + 64
    if hard == resource.RLIM_INFINITY or hard >= wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    else:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    handle = os.open("/dev/null", os.O_RDONLY)
    for _ in range(bound):
        os.dup(handle)
    return f"{bound} descriptors were open at once"


def _memory(bound: int) -> str:
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as stream:
        stream.write("1000")  # whoever makes room ends this process, and no other
    held = []
    try:
        for _ in range(bound // 1024**2):
            held.append(b"\1" * 1024**2)  # noqa: PERF401 - how many there were is told
    except MemoryError:
        raise OSError(errno.ENOMEM, f"no more than {len(held)} MiB") from None
    return f"{len(held)} MiB were held at once"


def _core(bound: int) -> str:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard != resource.RLIM_INFINITY and hard < bound:
        raise OSError(errno.EPERM, f"core dumps are limited to {hard} bytes")
    resource.setrlimit(resource.RLIMIT_CORE, (bound, hard))
    return f"core dumps of {bound} bytes are allowed"


@attempt("priority")
def priority(what: str) -> str:
    """Take real-time scheduling, a higher priority, or the memory of everybody by never being swapped."""
    if what == "realtime":
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    elif what == "nice":
        os.setpriority(os.PRIO_PROCESS, 0, -5)
    else:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as stream:
            stream.write("-900")
    return "taken"


@attempt("hostname")
def hostname() -> str:
    """Set the host's name (to what it is)."""
    name = socket.gethostname().encode()
    syscall(170, name, ctypes.c_size_t(len(name)))
    return "set"
