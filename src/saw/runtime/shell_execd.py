"""``saw-execd``: the one process of the prepared sandbox that starts commands in it.

Started by ``saw-shell.service`` through the launcher, so it is already confined, and so is all it starts; in a private PID
namespace it is process 1 and reaps orphans. It listens on ``DIRECTORY/exec.sock`` (SOCK_SEQPACKET, group-readable) and keeps
a tmux server on ``DIRECTORY/tmux.sock``.

One connection is one command. Packets are fields joined by NUL:

- request: ``run``, mode (``pipe`` or ``tty``), rows, columns, working directory, number of variables, variables,
  arguments. ``pipe`` carries three descriptors (SCM_RIGHTS): standard input, output, error.
- answers: ``started`` (``tty``: with the terminal's master descriptor) or ``error``, exit code, text; at the end ``exit``, code
  (128 + signal when killed).
- later from the client: ``signal``, number. Closing the connection hangs the command up.

Runs under ``python -I -S``: standard library only.
"""

from __future__ import annotations

import argparse
import array
import contextlib
import fcntl
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

MAX_REQUEST = 128 * 1024
MAX_FIELDS = 4096
_FORWARDED = frozenset(
    {signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGUSR2}
)


_RESET = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
"""Signals that a command meets in their ordinary way, whatever the daemon was started with (a hang-up must end it)."""

EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127
_HOME = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
"""The daemon's own working directory, returned to after each start."""


class RequestInvalid(Exception):
    """A request that does not follow the protocol above."""


@dataclass(frozen=True)
class Request:
    """A parsed request; ``size`` is rows and columns of the terminal."""

    tty: bool
    size: tuple[int, int]
    directory: str
    variables: dict[str, str]
    arguments: list[str]


def parse_request(raw: bytes) -> Request:
    """Parse the first packet of a connection; raise :class:`RequestInvalid`."""
    fields = raw.split(b"\0")
    if len(fields) < 7 or len(fields) > MAX_FIELDS or fields[0] != b"run" or fields[1] not in {b"pipe", b"tty"}:
        raise RequestInvalid("not a run request")
    try:
        rows, columns, count = (int(fields[i]) for i in (2, 3, 5))
    except ValueError:
        raise RequestInvalid("sizes must be numbers") from None
    if not (0 <= rows < 10000 and 0 <= columns < 10000 and 0 <= count <= len(fields) - 7):
        raise RequestInvalid("sizes are out of range")
    words = [os.fsdecode(field) for field in fields[6:]]
    variables = dict(word.split("=", 1) for word in words[:count] if "=" in word)
    return Request(fields[1] == b"tty", (rows, columns), os.fsdecode(fields[4]), variables, words[count:])


class Daemon:
    """The event loop: connections, their commands, and children."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.selector = selectors.DefaultSelector()
        self.commands: dict[int, socket.socket] = {}
        self.processes: dict[socket.socket, int] = {}
        self.running = True

    def serve(self) -> None:
        """Serve until SIGTERM."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.selector.register(wake_read, selectors.EVENT_READ)
        while self.running:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    self._accept()
                elif key.fileobj == wake_read:
                    if signal.SIGTERM in os.read(wake_read, 512):
                        self.running = False
                    self._reap()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)
        for process in self.processes.values():
            _kill_group(process, signal.SIGKILL)

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            connection, _ = self.listener.accept()
            uid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1]
            if uid not in {0, os.getuid()}:
                _send(connection, b"error\x00125\0this user may not run commands here")
                connection.close()
                return
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ)

    def _close(self, connection: socket.socket) -> None:
        self.selector.unregister(connection)
        connection.close()
        self.processes.pop(connection, None)

    def _hear(self, connection: socket.socket) -> None:
        descriptors: list[int] = []
        try:
            raw, ancillary, flags, _ = connection.recvmsg(MAX_REQUEST, socket.CMSG_SPACE(12), socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += array.array("i", data[: len(data) - len(data) % 4])
        except BlockingIOError:
            return
        except OSError:
            raw, flags = b"", 0
        try:
            process = self.processes.get(connection)
            if not raw:
                if process is not None:
                    _kill_group(process, signal.SIGHUP)
                    self.commands.pop(process, None)
                self._close(connection)
            elif process is not None:
                _forward_signal(process, raw)
            else:
                self._start(connection, raw, flags, descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _start(self, connection: socket.socket, raw: bytes, flags: int, descriptors: list[int]) -> None:
        try:
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise RequestInvalid("the request is too large")
            request = parse_request(raw)
            if len(descriptors) != (0 if request.tty else 3):
                raise RequestInvalid("wrong number of descriptors")
            process, master = _spawn(request, descriptors)
        except OSError as error:
            code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
            _send(connection, b"error\0%d\0%s in the sandbox" % (code, str(error).encode()))
            self._close(connection)
            return
        except RequestInvalid as error:
            _send(connection, b"error\x00125\0" + str(error).encode())
            self._close(connection)
            return
        self.processes[connection] = process
        self.commands[process] = connection
        rights = [] if master is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [master]))]
        with contextlib.suppress(OSError):
            connection.sendmsg([b"started"], rights)
        if master is not None:
            os.close(master)

    def _reap(self) -> None:
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            connection = self.commands.pop(process, None)
            if connection is not None:
                code = os.waitstatus_to_exitcode(status)
                _send(connection, b"exit\0%d" % (code if code >= 0 else 128 - code))
                self._close(connection)


def _send(connection: socket.socket, packet: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.send(packet)


def _kill_group(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, number)


def _forward_signal(process: int, raw: bytes) -> None:
    word, _, value = raw.partition(b"\0")
    if word == b"signal" and value.isdigit() and int(value) in _FORWARDED:
        _kill_group(process, int(value))


def _spawn(request: Request, descriptors: list[int]) -> tuple[int, int | None]:
    """Start the command; return its process id (also its group and session) and, for a terminal, the master descriptor."""
    if not request.tty:
        return _spawn_piped(request, descriptors), None
    master, slave = os.openpty()
    try:
        os.set_inheritable(master, False)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", *request.size, 0, 0))
        process = os.fork()
        if process == 0:
            _become(request, slave)
    finally:
        os.close(slave)
    return process, master


def _spawn_piped(request: Request, descriptors: list[int]) -> int:
    # posix_spawn shares memory until the exec, which fork does not, and knows no working directory: we lend it ours.
    try:
        if request.directory:
            os.chdir(request.directory)
        actions = [(os.POSIX_SPAWN_DUP2, descriptor, target) for target, descriptor in enumerate(descriptors)]
        return os.posix_spawnp(
            request.arguments[0],
            request.arguments,
            {**os.environ, **request.variables},
            file_actions=actions,
            setsid=True,
            setsigdef=_RESET,
        )
    finally:
        os.fchdir(_HOME)


def _become(request: Request, terminal: int) -> None:
    code = EXIT_NOT_EXECUTABLE
    try:
        signal.set_wakeup_fd(-1)
        for number in _RESET:
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        for target in (0, 1, 2):
            os.dup2(terminal, target)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        os.closerange(3, 256)
        if request.directory:
            os.chdir(request.directory)
        os.execvpe(request.arguments[0], request.arguments, {**os.environ, **request.variables})  # noqa: S606
    except OSError as error:
        code = EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
        os.write(2, f"saw: {error.filename or request.arguments[0]}: {error.strerror} in the sandbox\n".encode())
    finally:
        os._exit(code)


def listen(path: str) -> socket.socket:
    """Bind the command socket at ``path`` (mode 0660), replacing a stale one."""
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    before = os.umask(0o117)
    try:
        listener.bind(path)
    finally:
        os.umask(before)
    listener.listen(64)
    return listener


def start_tmux(directory: str) -> None:
    """Start the persistent tmux server with its session ``main``, when tmux is installed."""
    tmux = shutil.which("tmux")
    if tmux is not None:
        command = [tmux, "-S", f"{directory}/tmux.sock", "new-session", "-d", "-s", "main", "-x", "200", "-y", "50"]
        subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # reaped by the loop


def main(argv: list[str]) -> int:
    """Run the daemon until SIGTERM."""
    parser = argparse.ArgumentParser(prog="saw-execd")
    parser.add_argument("--directory", default="/run/saw/shell", help="where exec.sock and tmux.sock are made")
    parser.add_argument("--no-tmux", action="store_true", help="serve commands only")
    options = parser.parse_args(argv)
    daemon = Daemon(listen(f"{options.directory}/exec.sock"))
    if not options.no_tmux:
        start_tmux(options.directory)
    daemon.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
