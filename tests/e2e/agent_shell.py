"""One long session of the agent, for the many short commands of the tests: each attachment takes seconds under emulation."""

from __future__ import annotations

import base64
import os
import select
import signal
import subprocess
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress


class SessionGone(Exception):
    """The session ended before it answered."""


class AgentShell:
    """A POSIX shell at the other end of ``argv``, which reads its commands from standard input (``saw ssh WORKSPACE -- sh``)."""

    def __init__(self, argv: Sequence[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            list(argv), env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._unread = b""

    def run(self, command: str, stdin: str, timeout: float) -> subprocess.CompletedProcess[str]:
        """Run a shell command with this standard input; raise :class:`SessionGone`, or ``TimeoutExpired`` after ``timeout`` s."""
        mark = uuid.uuid4().hex
        given, told = (base64.b64encode(text.encode()).decode() for text in (stdin, command))
        line = (
            f'd=$(mktemp -d); printf %s {given} | base64 -d | sh -c "$(printf %s {told} | base64 -d)" >$d/o 2>$d/e; '
            f'echo "<{mark} $? $(base64 -w0 $d/o):$(base64 -w0 $d/e) {mark}>"; rm -rf $d\n'
        )
        answer = self._ask(line, f"{mark}>".encode(), timeout, command)
        code, _, texts = answer.decode("ascii").partition(f"<{mark} ")[2].partition(" ")
        out, err = (base64.b64decode(text).decode("utf-8", "replace") for text in texts.split()[0].split(":"))
        return subprocess.CompletedProcess(command, int(code), out, err)

    def answers(self, timeout: float) -> bool:
        """Tell whether the session is still there: it answers within ``timeout`` seconds."""
        with suppress(SessionGone, subprocess.TimeoutExpired):
            return self.run("true", "", timeout).returncode == 0
        return False

    def close(self) -> str:
        """End the session as its user would, by the end of input, or by force; return what it said on standard error."""
        with suppress(BrokenPipeError, ValueError):
            assert self.process.stdin is not None
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(10)
        said = b""
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            if select.select([stream], [], [], 0)[0]:
                said = os.read(stream.fileno(), 65536)
            stream.close()
        return said.decode("utf-8", "replace")

    def _ask(self, line: str, end: bytes, timeout: float, command: str) -> bytes:
        deadline = time.monotonic() + timeout
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(line.encode("ascii"))
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise SessionGone from error
        while end not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(command, timeout)
            if select.select([self.process.stdout], [], [], left)[0]:
                piece = os.read(self.process.stdout.fileno(), 1 << 20)
                if not piece:
                    raise SessionGone
                self._unread += piece
        answer, _, self._unread = self._unread.partition(end)
        return answer
