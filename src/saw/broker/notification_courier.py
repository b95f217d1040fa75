"""Has the messages of each channel delivered, one after the other, as soon as they are there or are due again.

Every broker of a database does this; which of them sends a message the claim decides (:mod:`saw.broker.notification_queue`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from saw.broker.clock import Clock, parse_iso
from saw.broker.context import Services
from saw.broker.notification_mail import MailSender
from saw.broker.notification_queue import Claimed, NotDelivered, Queue, channel_key
from saw.broker.notification_settings import Channel, Webhook
from saw.broker.notification_webhook import WebhookSender
from saw.broker.wake import Waker
from saw.errors import SawError

logger = logging.getLogger("saw.broker")

LOOK_S = 30.0
"""Longest time between two looks at a channel, for what another broker could not tell."""
AGAIN_S = 5.0
"""Pause after a look that failed, as while the database is away."""


class Sender(Protocol):
    """The way to one far end."""

    async def send(self, claimed: Claimed) -> None:
        """Deliver a message; raise :class:`NotDelivered`."""
        ...


def senders(services: Services) -> dict[str, Sender]:
    """Return the way to each channel of the configuration."""

    def one(channel: Channel) -> Sender:
        if isinstance(channel, Webhook):
            return WebhookSender(channel, services.clock)
        return MailSender(channel, services.config.server_names[0])

    return {channel.name: one(channel) for channel in services.config.notifications}


class Courier:
    """Delivers what waits."""

    def __init__(self, services: Services, waker: Waker, ways: Mapping[str, Sender]) -> None:
        self._clock: Clock = services.clock
        self._waker = waker
        self._queue = Queue(services)
        self._ways = ways

    def take_back(self) -> None:
        """Have sent again what the only broker of a database was sending when it ended; before it serves."""
        self._queue.release()

    async def run(self) -> None:
        """Deliver until the broker stops."""
        if not self._ways:
            return
        async with asyncio.TaskGroup() as group:
            for channel in self._ways:
                group.create_task(self._serve(channel))

    async def step(self, channel: str) -> str | None:
        """Deliver one message of ``channel`` that is due and return ``""``; else return when the next one is, None for never."""
        claimed, upcoming = await asyncio.to_thread(self._queue.claim, channel)
        if claimed is None:
            return upcoming
        try:
            await self._ways[channel].send(claimed)
        except NotDelivered as error:
            logger.warning("message %s to %s was not delivered: %s", claimed.id, channel, error)
            await asyncio.to_thread(self._queue.failed, claimed, error)
        except Exception:
            logger.exception("message %s to %s could not be sent", claimed.id, channel)
            unsent = NotDelivered("the broker failed to send it; see its log", code="internal")
            await asyncio.to_thread(self._queue.failed, claimed, unsent)
        else:
            await asyncio.to_thread(self._queue.delivered, claimed)
        return ""

    async def _serve(self, channel: str) -> None:
        upcoming: str | None = ""
        while not self._waker.closed:
            try:
                upcoming = await self._waker.poll(
                    channel_key(channel), lambda: self.step(channel), _differs(upcoming), self._pause(upcoming)
                )
            except SawError as error:
                logger.warning("messages to %s wait: %s; trying again in %.0f s", channel, error, AGAIN_S)
            except Exception:
                logger.exception("messages to %s wait; trying again in %.0f s", channel, AGAIN_S)
            else:
                continue
            upcoming = ""
            await asyncio.sleep(AGAIN_S)

    def _pause(self, upcoming: str | None) -> float:
        """Return how long to wait for news: until something is due, and no longer than :data:`LOOK_S`."""
        if upcoming is None:
            return LOOK_S
        if not upcoming:
            return 0.0
        return min(max((parse_iso(upcoming) - self._clock()).total_seconds(), 0.01), LOOK_S)


def _differs(before: str | None) -> Callable[[str | None], bool]:
    return lambda found: found != before
