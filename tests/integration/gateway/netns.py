"""Private network namespaces for tests: commands, sockets and threads inside them, and nothing left afterwards."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)
_COUNT = itertools.count()


def sh(*command: str, stdin: str | None = None) -> str:
    """Run a command and return what it printed; a failure shows its words."""
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
    return result.stdout


class Namespace:
    """One network namespace with loopback up."""

    def __init__(self, role: str) -> None:
        self.name = f"saw{os.getpid()}-{next(_COUNT)}-{role}"
        sh("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> str:
        """Run ip(8) inside."""
        return sh("ip", "-n", self.name, *arguments)

    def sh(self, *command: str, stdin: str | None = None) -> str:
        """Run a command inside."""
        return sh("ip", "netns", "exec", self.name, *command, stdin=stdin)

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process inside; its pid is the command's own."""
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], **options)

    def _enter(self) -> None:
        descriptor = os.open(Path("/run/netns") / self.name, os.O_RDONLY)
        try:
            if _LIBC.setns(descriptor, _NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(descriptor)

    def thread(self, target: Callable[[], object]) -> threading.Thread:
        """Start a thread that lives in the namespace; sockets it opens stay there."""

        def inside() -> None:
            self._enter()
            target()

        thread = threading.Thread(target=inside, daemon=True)
        thread.start()
        return thread

    def run(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the namespace and return its result or raise its exception."""
        results: list[T] = []
        errors: list[BaseException] = []

        def inside() -> None:
            try:
                results.append(function())
            except BaseException as error:  # noqa: BLE001 - handed to the caller
                errors.append(error)

        self.thread(inside).join()
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Delete the namespace with its interfaces."""
        sh("ip", "netns", "delete", self.name)
