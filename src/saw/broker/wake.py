"""Wakes waiting long-polls the moment something they watch has changed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

#: The key of everything that perimeters see; a workspace's watchers use its id.
PERIMETER = "*perimeter*"
#: The key of changes of workspaces, whichever.
WORKSPACES = "*workspaces*"
#: The key of changes of sponsors, whichever: a workspace's or an agent's is one, too.
SPONSORS = "*sponsors*"
#: The key of the audit trail: whoever reads it behind a position.
TRAIL = "*trail*"


class Waker:
    """Keys with waiters. :meth:`wake` may be called from any thread; waiters live on one event loop."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiters: dict[str, set[asyncio.Future[None]]] = {}
        self._closed = False

    def wake(self, keys: Iterable[str]) -> None:
        """Wake everyone who waits for one of ``keys``."""
        with self._lock:
            found = [waiter for key in set(keys) for waiter in self._waiters.pop(key, ())]
        for waiter in found:
            waiter.get_loop().call_soon_threadsafe(_finish, waiter)

    def wake_all(self) -> None:
        """Wake everyone, after something that cannot be told: each looks for itself."""
        with self._lock:
            keys = list(self._waiters)
        self.wake(keys)

    def close(self) -> None:
        """Wake everyone for good: the broker is stopping and a poll returns what it has."""
        with self._lock:
            self._closed = True
        self.wake_all()

    @property
    def closed(self) -> bool:
        """Whether nobody waits any more: a poll returns at once."""
        return self._closed

    async def poll(self, key: str, read: Callable[[], Awaitable[T]], changed: Callable[[T], bool], wait_s: float) -> T:
        """Return ``read()`` as soon as ``changed`` holds for it, or as it is after ``wait_s`` seconds.

        The waiter is registered before reading, so a change between the two is not lost.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait_s
        while True:
            waiter: asyncio.Future[None] = loop.create_future()
            with self._lock:
                self._waiters.setdefault(key, set()).add(waiter)
            try:
                value = await read()
                remaining = deadline - loop.time()
                if changed(value) or remaining <= 0 or self._closed:
                    return value
                await asyncio.wait([waiter], timeout=remaining)
            finally:
                waiter.cancel()
                with self._lock:
                    self._waiters.get(key, set()).discard(waiter)
                    if not self._waiters.get(key):
                        self._waiters.pop(key, None)


def _finish(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
