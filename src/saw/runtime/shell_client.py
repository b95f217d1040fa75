"""``saw-run`` and the attach command: hand a command to ``saw-execd`` inside the sandbox and return its exit status.

Started as ``python -I -S shell_client.py [--attach | -- COMMAND…]`` so that it costs a few milliseconds: standard library
only, and heavy modules only where a terminal is involved. The caller's terminal is never handed into the sandbox: there
the command gets a terminal of its own, and the bytes are relayed here. See ``shell_execd`` for the protocol.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import _socket
import os
import sys
import time

SOCKET = "/run/saw/shell/exec.sock"
PASSED = ("TERM", "COLORTERM", "LANG", "TZ")
USAGE = "usage: saw run [--socket PATH] [--cwd DIR] -- COMMAND…\n       saw run [--socket PATH] --attach\n"
EXIT_UNAVAILABLE = 125
WAIT_S = 5.0


def connect(path: str, deadline: float) -> _socket.socket:
    """Connect to the daemon, waiting until ``deadline`` (monotonic seconds) while the sandbox is starting."""
    while True:
        connection = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.05)
        else:
            return connection


def request(arguments: list[str], *, tty: bool, size: tuple[int, int] = (0, 0), directory: str = "") -> bytes:
    """Return the request packet for ``arguments``; only harmless variables (terminal type, language) are passed on."""
    names = [name for name in os.environ if name in PASSED or name.startswith("LC_")]
    variables = [f"{name}={os.environ[name]}" for name in names]
    head = ["run", "tty" if tty else "pipe", str(size[0]), str(size[1]), directory, str(len(variables))]
    return b"\0".join(os.fsencode(word) for word in (*head, *variables, *arguments))


def _receive(connection: _socket.socket) -> tuple[bytes, list[int]]:
    raw, ancillary, _, _ = connection.recvmsg(4096, _socket.CMSG_SPACE(4), _socket.MSG_CMSG_CLOEXEC)
    descriptors = [
        int.from_bytes(data[:4], sys.byteorder)
        for level, kind, data in ancillary
        if (level, kind) == (_socket.SOL_SOCKET, _socket.SCM_RIGHTS)
    ]
    return raw, descriptors


def _outcome(raw: bytes) -> int:
    word, _, value = raw.partition(b"\0")
    if word == b"exit":
        return int(value)
    if word == b"error":
        code, _, text = value.partition(b"\0")
        os.write(2, b"saw run: " + text + b"\n")
        return int(code)
    os.write(2, b"saw run: the sandbox ended before the command did\n")
    return EXIT_UNAVAILABLE


def _submit(connection: _socket.socket, packet: bytes, handed: list[int]) -> None:
    """Send the request; from then on signals go to the command, and none is lost or acts on us in between."""
    numbers = (_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP, _signal.SIGQUIT)

    def forward(number: int, _frame: object) -> None:
        connection.send(b"signal\0%d" % number)

    _signal.pthread_sigmask(_signal.SIG_BLOCK, numbers)
    try:
        for number in numbers:
            _signal.signal(number, forward)
        rights = b"".join(number.to_bytes(4, sys.byteorder) for number in handed)
        connection.sendmsg([packet], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)] if handed else [])
    finally:
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, numbers)


def run_piped(connection: _socket.socket, packet: bytes) -> int:
    """Run with our own standard descriptors handed over; a terminal among them is replaced by a relayed pipe."""
    handed: list[int] = []
    relays: list[tuple[int, int]] = []
    for number in (0, 1, 2):
        if os.isatty(number):
            reading, writing = os.pipe()
            handed.append(reading if number == 0 else writing)
            relays.append((0, writing) if number == 0 else (reading, number))
        else:
            handed.append(number)
    _submit(connection, packet, handed)
    for number in handed:
        if number > 2:
            os.close(number)
    raw, _ = _receive(connection)
    if raw != b"started":
        return _outcome(raw)
    if relays:
        return _relay(connection, relays)
    return _outcome(_receive(connection)[0])


def run_terminal(connection: _socket.socket, arguments: list[str], directory: str) -> int:
    """Run on a terminal of the sandbox and relay between it and ours, which is raw meanwhile."""
    import fcntl
    import termios
    import tty

    def size() -> bytes:
        return fcntl.ioctl(1, termios.TIOCGWINSZ, b"\0" * 8)

    shape = size()
    rows, columns = (int.from_bytes(shape[i : i + 2], sys.byteorder) for i in (0, 2))
    _submit(connection, request(arguments, tty=True, size=(rows, columns), directory=directory), [])
    raw, descriptors = _receive(connection)
    if raw != b"started" or len(descriptors) != 1:
        return _outcome(raw)
    master = descriptors[0]

    def resized(*_: object) -> None:
        fcntl.ioctl(master, termios.TIOCSWINSZ, size())

    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        _signal.signal(_signal.SIGWINCH, resized)
        return _relay(connection, [(0, master), (master, 1)])
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


def _relay(connection: _socket.socket, pairs: list[tuple[int, int]]) -> int:
    """Copy each (from, to) pair until the command's end is reported and its output is drained."""
    import select

    poll = select.poll()
    for source, _ in pairs:
        poll.register(source, select.POLLIN)
    poll.register(connection.fileno(), select.POLLIN)
    targets = dict(pairs)
    outcome: int | None = None
    while True:
        events = poll.poll(None if outcome is None else 0)
        output_seen = False
        for descriptor, _ in events:
            if descriptor == connection.fileno():
                outcome = _outcome(_receive(connection)[0])
                poll.unregister(descriptor)
                continue
            try:
                data = os.read(descriptor, 65536)
                while data:
                    data_left = data[os.write(targets[descriptor], data) :]
                    output_seen = output_seen or descriptor != 0
                    if not data_left:
                        break
                    data = data_left
            except OSError:
                data = b""
            if not data:
                poll.unregister(descriptor)
                if descriptor == 0 and not os.isatty(targets[0]):
                    os.close(targets[0])
        if outcome is not None and not output_seen:
            return outcome


def main(argv: list[str]) -> int:
    """Parse, connect, run; return the command's exit code, or 125 when the sandbox cannot be reached."""
    path, directory, attach = SOCKET, "", False
    rest = list(argv)
    while rest and rest[0].startswith("-"):
        word = rest.pop(0)
        if word == "--":
            break
        if word == "--attach":
            attach = True
        elif word in {"--socket", "--cwd"} and rest:
            value = rest.pop(0)
            path, directory = (value, directory) if word == "--socket" else (path, value)
        else:
            os.write(1 if word in {"-h", "--help"} else 2, USAGE.encode())
            return 0 if word in {"-h", "--help"} else 2
    if attach:
        rest = ["tmux", "-S", os.path.dirname(path) + "/tmux.sock", "new-session", "-A", "-s", "main"]  # noqa: PTH120
    if not rest:
        os.write(2, USAGE.encode())
        return 2
    try:
        connection = connect(path, time.monotonic() + WAIT_S)
        if os.isatty(0) and os.isatty(1):
            return run_terminal(connection, rest, directory)
        return run_piped(connection, request(rest, tty=False, directory=directory))
    except OSError as error:
        text = f"saw run: the sandbox does not answer: {path}: {error.strerror} (see `systemctl status saw-shell`)\n"
        os.write(2, text.encode())
        return EXIT_UNAVAILABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
