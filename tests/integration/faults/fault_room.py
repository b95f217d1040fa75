"""What the four daemons are put through: a small disk that can be filled, and a way that goes silent.

The disk is a tmpfs in a mount namespace that goes with the process that holds it.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from netns import Namespace, sh

MIB = 1024 * 1024


class Room:
    """``size`` bytes at ``place``, for those alone who are started with :attr:`enter` before their command.

    :attr:`seen` is the same folder as this process sees it.
    """

    def __init__(self, place: Path, size: int) -> None:
        place.mkdir(parents=True, exist_ok=True)
        mount = f"mount -t tmpfs -o size={size},mode=0755 tmpfs {place} && echo made && exec sleep infinity"
        command = ["unshare", "--mount", "--propagation", "slave", "sh", "-c", mount]
        self._holder = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"made\n"
        self.place = place
        self.enter = ("nsenter", "--mount", f"--target={self._holder.pid}", "--")
        self.seen = Path(f"/proc/{self._holder.pid}/root{place}")
        self._filler = self.seen / "filler"

    def fill(self) -> None:
        """Take all that is left."""
        descriptor = os.open(self._filler, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        size = MIB
        try:
            while size:
                try:
                    os.write(descriptor, bytes(size))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    size //= 2
        finally:
            os.close(descriptor)

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()

    def names(self) -> set[str]:
        """Return the names of all files but the filler."""
        return {path.name for path in self.seen.rglob("*") if path.is_file()} - {self._filler.name}

    def close(self) -> None:
        """End the mount namespace; what runs in it ended before."""
        self._holder.kill()
        self._holder.wait(10)
        assert self._holder.stdout is not None
        self._holder.stdout.close()


@contextmanager
def partitioned(namespace: str, *matches: str) -> Iterator[None]:
    """What matches (expressions of nftables) is dropped without a word in the network namespace of that name."""
    nft = ("ip", "netns", "exec", namespace, "nft")
    rules = " ".join(f"{match} drop;" for match in matches)
    chain = f"chain out {{ type filter hook output priority 0; policy accept; {rules} }}"
    sh(*nft, "-f", "-", stdin=f"table inet partition {{\n{chain}\n}}\n")
    try:
        yield
    finally:
        sh(*nft, "delete", "table", "inet", "partition")


class RoomNamespace(Namespace):
    """A network namespace whose processes see a :class:`Room`."""

    def __init__(self, role: str, room: Room) -> None:
        super().__init__(role)
        self.room = room

    def sh(self, *command: str, stdin: str | None = None) -> str:
        """Run a command inside."""
        return super().sh(*self.room.enter, *command, stdin=stdin)

    def popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        """Start a process inside; its pid is the command's own."""
        return super().popen(*self.room.enter, *command, **options)
