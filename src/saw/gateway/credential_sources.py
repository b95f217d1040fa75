"""Where values of credentials are read: files of the perimeter host, and a vault. Each read is one of this moment.

A value is printable ASCII on one line. No message holds one, nor anything that a vault said beyond its reasons.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx

from saw.errors import SawError, UnavailableError
from saw.gateway.config import CredentialVault
from saw.gateway.errors import CredentialUnavailable
from saw.policy.references import Place
from saw.secrets.vault_calls import VaultCalls, VaultDenied

LOG = logging.getLogger("saw.gateway")

MAX_SECRET = 8192
"""Longest credential value (bytes)."""
VAULT_DEADLINE_S = 5.0
"""Longest time for one value of a vault, login included (seconds); all of a call's values have ``judge.DIAL_DEADLINE_S``."""
REFUSED_S = 3.0
"""How long a vault that refused a path is not asked for it again (seconds)."""
READS_AT_ONCE, READS_WAITING = 2, 32
"""How much of the vault one workspace has: reads at once, and reads that wait behind them."""
_REMEMBERED = 4096
_REFUSES = "refuses this perimeter host"


class CredentialSource(Protocol):
    """A store of one kind."""

    async def read(self, identifier: str, place: Place, workspace: str, /) -> str:
        """Return the value at ``place`` of the credential ``identifier`` (for messages), as it is now, for ``workspace``.

        Raises :class:`CredentialUnavailable` when there is none, the store does not answer, or the value cannot be sent.
        """


def usable(identifier: str, raw: bytes) -> str:
    """Return a value as text; raise :class:`CredentialUnavailable` for one that could break a header."""
    if not raw or len(raw) > MAX_SECRET or any(byte < 0x20 or byte > 0x7E for byte in raw):
        raise CredentialUnavailable(
            f"the value of credential {identifier} is empty, too long or not printable ASCII",
            cure="store the bare value on one line",
        )
    return raw.decode("ascii")


def file_name(place: Place) -> str:
    """Return the name of the file in which a value lies: its path with ``:`` in place of ``/``."""
    return ":".join(place.segments)


class FileSource:
    """Values as files in one directory, private to this user (no group or other access)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    async def read(self, identifier: str, place: Place, _workspace: str) -> str:
        """Return the value; see :class:`CredentialSource`."""
        try:
            descriptor = os.open(self._directory / file_name(place), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise CredentialUnavailable(
                f"credential {identifier} is not at hand: {error.strerror}",
                cure="place its value on the perimeter host",
            ) from error
        with os.fdopen(descriptor, "rb") as stream:
            status = os.fstat(stream.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077:
                raise CredentialUnavailable(
                    f"the file of credential {identifier} is open to group or others", cure="give it mode 0600"
                )
            raw = stream.read(MAX_SECRET + 3).strip(b"\r\n")
        return usable(identifier, raw)


class _Lane:
    """The reads of one workspace on their way: ``count`` with those that wait."""

    def __init__(self) -> None:
        self.threads = ThreadPoolExecutor(READS_AT_ONCE, "vault")
        self.count = 0


class VaultSource:
    """Secrets of a KV engine, version 2, at paths that policy names. ``monotonic`` returns seconds.

    A value counts for ``cache_s`` from the moment at which it was asked for, and not a moment longer when the vault is away; with
    0 each call asks. Each workspace has threads of its own while it reads, so that a vault that hangs holds up nothing else, and
    one workspace with many calls no other one.
    """

    def __init__(self, config: CredentialVault, monotonic: Callable[[], float]) -> None:
        self._config = config
        self._monotonic = monotonic
        self._calls = VaultCalls(config.settings(), "vault", "the path of a credential", tries=1, monotonic=monotonic)
        self._lock = threading.Lock()
        self._lanes: dict[str, _Lane] = {}
        self._closed = False
        self._known: dict[Place, tuple[float, Mapping[str, Any]]] = {}
        self._refused: dict[Place, float] = {}

    async def read(self, identifier: str, place: Place, workspace: str) -> str:
        """Return the value; see :class:`CredentialSource`."""
        found = await self._entries(identifier, place, workspace)
        value = found.get(place.entry)
        if value is None:
            raise CredentialUnavailable(
                f"the vault's secret for credential {identifier} has no entry {place.entry}",
                cure="name the entry behind # in ref",
            )
        if not isinstance(value, str):
            raise CredentialUnavailable(
                f"the entry {place.entry} of the vault's secret for credential {identifier} is no text",
                cure="store the bare value as text",
            )
        return usable(identifier, value.encode())

    def close(self) -> None:
        """Begin no read any more; the connections are let go when the last one under way is over.

        A socket that is closed while a thread reads from it gives its number to the next one, whose bytes that thread then takes.
        """
        with self._lock:
            self._closed = True
            lanes = tuple(self._lanes.values())
        for lane in lanes:
            lane.threads.shutdown(wait=False, cancel_futures=True)
        if not lanes:
            self._calls.close()

    async def _entries(self, identifier: str, place: Place, workspace: str) -> Mapping[str, Any]:
        now = self._monotonic()
        at, known = self._known.get(place, (0.0, {}))
        if known and now - at < self._config.cache_s:
            return known
        self._known.pop(place, None)
        if now < self._refused.get(place, now):
            raise _unusable(identifier, _REFUSES)
        self._check_private(identifier)
        asking = asyncio.wrap_future(self._start(identifier, place, workspace))
        try:
            async with asyncio.timeout(VAULT_DEADLINE_S):
                found = await asking
        except (TimeoutError, UnavailableError, httpx.HTTPError) as error:
            raise self._unusable(identifier, "does not answer", error) from None
        except VaultDenied as error:
            if len(self._refused) >= _REMEMBERED:
                self._refused.clear()
            self._refused[place] = now + REFUSED_S
            raise self._unusable(identifier, _REFUSES, error) from None
        except SawError as error:
            raise self._unusable(identifier, "answers something else", error) from None
        if not found:
            raise CredentialUnavailable(
                f"the vault has no secret for credential {identifier} of this caller",
                cure="store it there, or correct ref",
            )
        if self._config.cache_s:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[place] = (now, found)
        return found

    def _start(self, identifier: str, place: Place, workspace: str) -> Future[Mapping[str, Any]]:
        with self._lock:
            if self._closed:
                raise _unusable(identifier, "is not asked any more: the gatekeeper ends")
            lane = self._lanes.setdefault(workspace, _Lane())
            if lane.count >= READS_AT_ONCE + READS_WAITING:
                raise CredentialUnavailable(
                    f"credential {identifier} is not at hand: too many calls of this workspace wait for the vault",
                    cure="make fewer calls at once",
                )
            lane.count += 1
        reading = lane.threads.submit(self._ask, place)
        # A caller that gives up frees nothing: the read is over when its thread is.
        reading.add_done_callback(lambda _done: self._ended(workspace, lane))
        return reading

    def _ended(self, workspace: str, lane: _Lane) -> None:
        with self._lock:
            lane.count -= 1
            if not lane.count:
                del self._lanes[workspace]
                lane.threads.shutdown(wait=False)
            over = self._closed and not self._lanes
        if over:
            self._calls.close()

    def _ask(self, place: Place) -> Mapping[str, Any]:
        mount, *path = (quote(segment, safe="") for segment in place.segments)
        held = self._calls.held(f"/v1/{mount}/data/{'/'.join(path)}")
        return {} if held is None else held.data or {}

    def _check_private(self, identifier: str) -> None:
        """Refuse to use what proves who we are while others can read it."""
        path = self._config.secret_file
        try:
            mode = path.stat().st_mode
        except OSError as error:
            raise self._unusable(identifier, "cannot be asked: who we are there cannot be read", error) from None
        if mode & 0o077:
            LOG.warning("the vault is not asked: %s is open to group or others", path)
            raise CredentialUnavailable(
                f"credential {identifier} is not at hand: what proves who we are at the vault is open to others",
                cure="give its file mode 0600",
            )

    def _unusable(self, identifier: str, what: str, error: Exception) -> CredentialUnavailable:
        # The caller is told no address and no path; the journal of this host says more.
        said = error.message if isinstance(error, SawError) else str(error) or type(error).__name__
        LOG.warning("credential %s: the vault %s: %s", identifier, what, said)
        return _unusable(identifier, what)


def _unusable(identifier: str, what: str) -> CredentialUnavailable:
    return CredentialUnavailable(
        f"credential {identifier} is not at hand: the vault {what}", cure="see the journal of saw-gatekeeper@*"
    )
