"""Attach to the persistent terminal as a person does: on a pseudo-terminal, typing, reading the screen, leaving, coming back."""

from __future__ import annotations

import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Mapping, Sequence
from fcntl import ioctl
from types import TracebackType
from typing import Self

from saw.errors import UnavailableError

DETACH = b"\x02d"
"""Ctrl-b d: leaves tmux and keeps what runs in it."""


class Terminal:
    """``argv`` on a pseudo-terminal of its own (24 lines of 100 columns); leaving the block ends it."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.seen = b""
        self.over = False
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:  # the child: nothing of ours may run on in it
            try:
                ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
                os.execve(argv[0], list(argv), {**environment, "TERM": "xterm"})  # noqa: S606 - a path, and no shell
            finally:
                os._exit(127)
        self.handle = os.pidfd_open(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def type(self, data: bytes) -> None:
        """Type ``data``."""
        try:
            os.write(self.descriptor, data)
        except OSError as error:
            raise UnavailableError(f"the terminal is gone ({error.strerror}); {self.tail()}") from error

    def tail(self) -> str:
        """Return the end of what was shown, for a message."""
        return f"it showed {self.seen[-300:].decode('utf-8', 'replace')!r}"

    def read(self, patience: float) -> bool:
        """Wait up to ``patience`` seconds for output; return False when the other side has closed."""
        if not select.select([self.descriptor], [], [], patience)[0]:
            return True
        try:
            piece = os.read(self.descriptor, 65536)
        except OSError:  # EIO: the program has ended
            piece = b""
        self.seen += piece
        self.over = not piece
        return bool(piece)

    def expect(self, text: bytes, patience: float) -> bool:
        """Tell whether ``text`` is shown within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while text not in self.seen:
            left = deadline - time.monotonic()
            if left <= 0 or not self.read(min(left, 0.5)):
                return text in self.seen
        return True

    def gone(self, patience: float) -> bool:
        """Tell whether the program has ended within ``patience`` seconds; it is not reaped, so its pid stays its own."""
        return bool(select.select([self.handle], [], [], patience)[0])

    def ended(self, patience: float) -> bool:
        """Tell whether the program ends by itself within ``patience`` seconds."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if not self.read(0.2):
                return self.gone(max(0.1, deadline - time.monotonic()))
        return False

    def close(self) -> None:
        """Hang up, as a laptop that is shut, and end the program."""
        os.close(self.descriptor)
        for number in (signal.SIGHUP, signal.SIGKILL):
            if not self.gone(0):
                signal.pidfd_send_signal(self.handle, number)
                self.gone(5.0)
        os.waitpid(self.pid, 0)
        os.close(self.handle)


def leave_mark(terminal: Terminal, mark: str, patience: float) -> None:
    """Set a shell variable to ``mark`` and see it set; the typed line itself does not contain what is then shown."""
    shown = f"<set {mark}>".encode()
    deadline = time.monotonic() + patience
    terminal.read(patience)  # the multiplexer draws before it listens; until then the line is echoed, and lost
    while not terminal.over and time.monotonic() < deadline:  # what is typed before the shell reads may be lost
        terminal.type(f"\x15saw_mark={mark}; printf '<%s %s>\\n' set \"$saw_mark\"\r".encode())
        if terminal.expect(shown, min(10.0, patience)):
            return
    why = "the terminal ended" if terminal.over else f"no shell answered in the terminal within {patience:.0f} s"
    raise UnavailableError(f"{why}; {terminal.tail()}", cure="look at the VM's console and at the audit trail")


def mark_kept(terminal: Terminal, mark: str, word: str, patience: float) -> bool:
    """Tell whether the shell still has the variable that an earlier attachment set.

    ``word`` must differ from attachment to attachment: the multiplexer shows the old screen again.
    """
    deadline = time.monotonic() + patience
    terminal.read(patience)
    while not terminal.over and time.monotonic() < deadline:
        terminal.type(f"\x15printf '<%s %s>\\n' {word} \"$saw_mark\"\r".encode())
        if terminal.expect(f"<{word} ".encode(), min(10.0, patience)):
            return terminal.expect(f"<{word} {mark}>".encode(), 1.0)
    return False


def leave(terminal: Terminal, patience: float, again: float = 10.0) -> bool:
    """Detach; tell whether the terminal ended by that within ``patience`` seconds.

    Keys that follow typed text at once count as pasted, and then leave nothing: they are typed again each ``again`` seconds.
    """
    deadline = time.monotonic() + patience
    while not terminal.over and (left := deadline - time.monotonic()) > 0:
        terminal.type(DETACH)
        if terminal.ended(min(again, left)):
            return True
    return terminal.over and terminal.gone(max(0.1, deadline - time.monotonic()))


def attach_thrice(
    argv: Sequence[str], environment: Mapping[str, str], mark: str, *, patience: float = 120.0
) -> dict[str, bool]:
    """Attach, set a shell variable, detach; attach again and read it; hang up; attach once more and read it again.

    Returns ``{detached, kept, kept_after_hangup}``. Raises :class:`UnavailableError` when no shell answers at all.
    """
    with Terminal(argv, environment) as first:
        leave_mark(first, mark, patience)
        detached = leave(first, patience)
    with Terminal(argv, environment) as second:
        kept = mark_kept(second, mark, "kept", patience)
    with Terminal(argv, environment) as third:
        again = mark_kept(third, mark, "again", patience)
        if not third.over:
            third.type(b"\x15unset saw_mark\r" + DETACH)
            third.ended(patience / 4)
    return {"detached": detached, "kept": kept, "kept_after_hangup": again}
