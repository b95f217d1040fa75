"""Several gatekeepers on one perimeter host: the sockets of each, and which one does what only one may do.

Every replica decides, injects and records. They share the ledger and the audit chain, each change of which is one transaction.
The one that holds the lock of the state folder leads: it alone writes Envoy's files and the saved state, ships events, tells
the ends of charges and sends approved calls. The kernel gives the lock away when its holder ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

PLACE = "{replica}"
"""What stands for a replica's number in the paths of the configuration."""
MOST_REPLICAS = 8
LEAD_EVERY_S = 1.0
"""How often a replica that does not lead asks for the lock (seconds)."""


class Sockets(msgspec.Struct, frozen=True, kw_only=True):
    """The Unix sockets of one replica: its own five, and where Envoy takes calls from it. ``review`` None: no reviews."""

    authz: Path
    mcp: Path
    postgres: Path
    records: Path
    review: Path | None
    send: Path


def sockets_of(replica: int, *, authz: Path, review: Path | None, send: Path) -> Sockets:
    """Return the sockets of a replica out of the configured paths."""
    own = _numbered(authz, replica)
    return Sockets(
        authz=own,
        mcp=own.with_name("mcp.sock"),
        postgres=own.with_name("postgres.sock"),
        records=own.with_name("records.sock"),
        review=None if review is None else _numbered(review, replica),
        send=_numbered(send, replica),
    )


def problem_of_sockets(replicas: tuple[Sockets, ...]) -> str:
    """Return why several replicas could not have these sockets, or an empty text."""
    paths = [path for item in replicas for path in msgspec.structs.astuple(item) if path is not None]
    if len(set(paths)) == len(paths):
        return ""
    return f"two replicas would share a socket: write {PLACE} in authz_socket (for a folder), review_socket and ring2.send_socket"


def named(what: str, replica: int) -> str:
    """Return the name of something of a replica in Envoy's files; the first one's has no number."""
    return what if replica == 1 else f"{what}-{replica}"


def home(number: int, replicas: int) -> int:
    """Return which replica decides on the calls of workspace ``number`` as long as it is well.

    What a gatekeeper remembers of a workspace's sessions is in one process, so a workspace stays with one.
    """
    return (number - 1) % replicas + 1


class Lead:
    """The right of one replica, of those that share the state folder ``directory``, to do what only one may do."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "lead"
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Return whether this process leads. Once it does, it leads until it ends."""
        return self._descriptor is not None

    def take(self) -> bool:
        """Try to get the lead without waiting, and return whether this process has it now; raises ``OSError``."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return True

    def close(self) -> None:
        """Give the lead away."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def one_at_a_time(directory: Path) -> Iterator[None]:
    """Hold a lock of the state folder: SQLite's change to its log of writes is not made by two processes at once."""
    descriptor = os.open(directory / "opening", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _numbered(path: Path, replica: int) -> Path:
    return Path(str(path).replace(PLACE, str(replica)))
