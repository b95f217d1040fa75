"""Events leave the host, oldest first: to a collector (RFC 5424 over RELP and TLS, or OTLP) and from a workspace to its broker.

The spool lets go of an event only behind an acknowledgement on every way, so it arrives at least once; ``metadata.uid`` and the
number in the chain tell two sights of one apart. Each way has a thread: one that stands still does not hold the other up.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from saw.audit.chain import ChainedEvent, Head
from saw.audit.receiver import WINDOW, Outlet
from saw.audit.ship import WAYS
from saw.audit.syslog import mark_of
from saw.errors import SawError
from saw.telemetry.config import TelemetryConfig, TelemetryError, Way
from saw.telemetry.spool import Spool

if TYPE_CHECKING:
    from saw.runtime.policyd_broker import PolicyBroker

logger = logging.getLogger("saw.telemetry")
_IDLE_S = 1.0
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
#: One report to the broker holds so many events and so many bytes at most (a report may have 64 KiB).
AT_ONCE = 32
_REPORT_BYTES = 48 * 1024
_REPORT_PAUSE_S = 1.1


class Destination(Protocol):
    """Somewhere that events go, while it is open."""

    def deliver(self, events: list[ChainedEvent], acknowledged: Callable[[int], None]) -> None:
        """Send them in order; ``acknowledged(seq)`` is called as everything up to ``seq`` has been taken. Raises SawError."""
        ...

    def check(self) -> None:
        """Raise SawError when the other side has gone meanwhile."""
        ...


class Collector:
    """A receiver of the audit trail's kind: the chain of this host is one of its sources."""

    def __init__(self, config: TelemetryConfig, host: str, outlet: Outlet) -> None:
        self._config = config
        self._host = host
        self._outlet = outlet

    def deliver(self, events: list[ChainedEvent], acknowledged: Callable[[int], None]) -> None:
        """Send the events as messages of syslog, or as records of OTLP."""
        assert self._config.receiver is not None  # noqa: S101 - it is what this was made of
        way = WAYS[self._config.receiver.protocol]
        messages: list[bytes] = []
        head = Head(events[0].seq - 1, events[0].prev)
        for item in events:
            mark = mark_of(head, item)
            messages.append(way.message(item, item.seq, mark, self._host, self._config.max_message_bytes))
            head = Head(item.seq, item.hash)
        self._outlet.deliver(messages, lambda count: acknowledged(events[count - 1].seq))

    def check(self) -> None:
        """Raise when the receiver has ended the connection."""
        self._outlet.check()


class Broker:
    """The broker of this workspace, which writes what it is told into its own chained trail."""

    def __init__(self, broker: PolicyBroker, source: str, stop: threading.Event) -> None:
        self._broker = broker
        self._source = source
        self._stop = stop

    def deliver(self, events: list[ChainedEvent], acknowledged: Callable[[int], None]) -> None:
        """Tell the events in reports of a bounded size, at the pace that the broker takes them."""
        for part in parts(events):
            self._broker.report_telemetry(self._source, part)
            acknowledged(part[-1].seq)
            if self._stop.wait(_REPORT_PAUSE_S):
                return

    def check(self) -> None:
        """Each report has a connection of its own."""


def parts(events: list[ChainedEvent]) -> Iterator[list[ChainedEvent]]:
    """Yield the events in parts that fit into one report."""
    part: list[ChainedEvent] = []
    size = 0
    for item in events:
        length = len(msgspec.json.encode(item))
        if part and (len(part) >= AT_ONCE or size + length > _REPORT_BYTES):
            yield part
            part, size = [], 0
        part.append(item)
        size += length
    if part:
        yield part


@contextmanager
def opened(config: TelemetryConfig, way: Way, host: str, source: str, stop: threading.Event) -> Iterator[Destination]:
    """Open the destination of a way; raises :class:`SawError`."""
    if way == "collector":
        if config.receiver is None:
            raise TelemetryError("there is no receiver", cure="set receiver (docs/telemetry.md)")
        with WAYS[config.receiver.protocol].open(config.receiver) as outlet:
            yield Collector(config, host, outlet)
        return
    # It brings an HTTP client, which a host that is no workspace does not need.
    from saw.runtime.policyd_broker import PolicyBroker

    told = config.workspace_told()
    if told is None:
        raise TelemetryError(f"{config.workspace} cannot be read", cure="look at saw-bootstrap.service")
    broker = PolicyBroker(told, Path(config.workspace).parent)
    try:
        yield Broker(broker, source, stop)
    finally:
        broker.close()


class Courier:
    """Delivers what waits on one way until it is told to end; ``error`` says why it does not, empty while it does."""

    def __init__(self, config: TelemetryConfig, spool: Spool, way: Way, host: str) -> None:
        self._config = config
        self._spool = spool
        self._way = way
        self._host = host
        self._stop = threading.Event()
        self.error = ""
        self._thread = threading.Thread(target=self._run, name=f"saw-telemetry-{way}", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    @property
    def trouble(self) -> str:
        """Why events do not leave: ``error``, or that nothing delivers any more; empty while all is well."""
        if self._thread.is_alive() or self._stop.is_set():
            return self.error
        return "the thread that delivers has ended: systemctl restart saw-telemetry"

    def end(self, timeout: float) -> None:
        """Tell it to end, and wait for that."""
        self._stop.set()
        self._thread.join(timeout)

    def _run(self) -> None:
        pause = _SHORTEST_PAUSE_S
        while not self._stop.is_set():
            try:
                self._deliver()
                pause = _SHORTEST_PAUSE_S
            except (SawError, OSError, ValueError) as error:
                if self.error != str(error):
                    logger.warning("events do not leave for the %s: %s", self._way, error)
                if not self.error:
                    pause = _SHORTEST_PAUSE_S
                self.error = str(error) or type(error).__name__
                self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, no secret
                pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _deliver(self) -> None:
        """Deliver over one connection until it breaks; nothing is opened while nothing waits."""
        while not self._spool.pending(self._way, 1):
            if self._stop.wait(_IDLE_S):
                return
        with contextlib.ExitStack() as stack:
            destination = stack.enter_context(
                opened(self._config, self._way, self._host, self._spool.source, self._stop)
            )
            while not self._stop.is_set():
                waiting = self._spool.pending(self._way, WINDOW)
                if not waiting:
                    self.error = ""
                    self._stop.wait(_IDLE_S)
                    destination.check()
                    continue
                self._send(destination, waiting)
                self.error = ""

    def _send(self, destination: Destination, waiting: list[ChainedEvent]) -> None:
        arrived = 0

        def acknowledged(seq: int) -> None:
            nonlocal arrived
            arrived = seq

        try:
            destination.deliver(waiting, acknowledged)
        finally:
            if arrived:
                self._spool.acknowledged(self._way, arrived)


__all__ = ["AT_ONCE", "Broker", "Collector", "Courier", "Destination", "opened", "parts"]
