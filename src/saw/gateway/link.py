"""The link to the broker: states come by long-poll, audit events go at least once, both over mutual TLS."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx
import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.gateway.config import GatekeeperConfig
from saw.gateway.errors import StateRefused
from saw.gateway.spool import Spool
from saw.gateway.state import parse_state
from saw.gateway.view import ViewKeeper

LOG = logging.getLogger("saw.gateway")
RETRY_FIRST_S = 0.2
RETRY_MOST_S = 2.0


class Accepted(msgspec.Struct, frozen=True):
    """The broker's answer to shipped events: the highest sequence number it has of this source."""

    accepted: int


def tls_context(config: GatekeeperConfig) -> ssl.SSLContext:
    """Return a context that trusts our authority alone and shows the perimeter certificate; TLS 1.3."""
    context = ssl.create_default_context(cafile=str(config.ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(str(config.cert_file), str(config.key_file))
    return context


class BrokerLink:
    """Two endless tasks over one HTTP client, which is renewed when a certificate file changes."""

    def __init__(
        self, config: GatekeeperConfig, keeper: ViewKeeper, spool: Spool, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._spool = spool
        self._clock = clock
        self._client: httpx.AsyncClient | None = None
        self._stamps: tuple[int, ...] = ()

    def _files(self) -> tuple[Path, ...]:
        return (self._config.ca_file, self._config.cert_file, self._config.key_file)

    async def _connected(self) -> httpx.AsyncClient:
        stamps = tuple(path.stat().st_mtime_ns for path in self._files())
        if self._client is None or stamps != self._stamps:
            await self.close()
            wait = self._config.poll_wait_s
            self._client = httpx.AsyncClient(
                base_url=self._config.broker_url,
                verify=tls_context(self._config),
                timeout=httpx.Timeout(5.0, read=wait + 5.0),
                trust_env=False,
            )
            self._stamps = stamps
        return self._client

    async def close(self) -> None:
        """Close the connections."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def poll_once(self) -> None:
        """Ask for a state newer than ours, wait for it, and take it in."""
        client = await self._connected()
        after = self._keeper.after
        try:
            response = await client.get(
                "/v1/perimeter/state",
                params={
                    "after": max(after or 0, 0),
                    "wait": 0 if after is None else self._config.poll_wait_s,
                    "first": self._config.numbers.first,
                    "last": self._config.numbers.last,
                },
                headers={"host": self._config.broker_name},
                extensions={"sni_hostname": self._config.broker_name},
            )
        except httpx.TransportError:
            await self._keeper.lost()
            raise
        self._keeper.contact.reached()
        _check(response)
        await self._keeper.take(parse_state(response.content))

    async def ship_once(self) -> bool:
        """Send the oldest waiting events, and what time it is here; return whether there were any."""
        events = await asyncio.to_thread(self._spool.pending)
        if not events:
            return False
        client = await self._connected()
        response = await client.post(
            "/v1/perimeter/events",
            content=msgspec.json.encode({"source": self._config.name, "events": events}),
            headers={
                "host": self._config.broker_name,
                "content-type": "application/json",
                "x-saw-time": str(int(self._clock() * 1000)),
            },
            extensions={"sni_hostname": self._config.broker_name},
        )
        _check(response)
        accepted = jsontext.decode(response.content, kind=Accepted).accepted
        if accepted < events[0].seq:
            raise StateRefused(f"the broker has event {accepted}, event {events[0].seq} was sent")
        await asyncio.to_thread(self._spool.acknowledge, min(accepted, events[-1].seq))
        return True

    async def poll_forever(self) -> None:
        """Keep the state current until cancelled."""
        await _forever("state", self.poll_once)

    async def ship_forever(self, interval_s: float = 0.25) -> None:
        """Keep events flowing until cancelled; looks for new ones every ``interval_s`` seconds when idle."""

        async def step() -> None:
            if not await self.ship_once():
                await asyncio.sleep(interval_s)

        await _forever("events", step)


def _check(response: httpx.Response) -> None:
    if response.status_code != httpx.codes.OK:
        raise StateRefused(f"the broker answered {response.status_code} to {response.request.url.path}")


async def _forever(what: str, step: Callable[[], Awaitable[None]]) -> None:
    pause, told = RETRY_FIRST_S, ""
    while True:
        try:
            await step()
        except (SawError, httpx.HTTPError, OSError, msgspec.DecodeError) as error:
            text = f"{type(error).__name__}: {error}"
            if text != told:
                LOG.warning("the broker link (%s) fails: %s", what, text)
            told = text
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MOST_S)
        else:
            if told:
                LOG.warning("the broker link (%s) works again", what)
            pause, told = RETRY_FIRST_S, ""
