"""``saw telemetry run``: the journal is read into the spool by one thread, and each way out has a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname
from typing import Any

import msgspec

from saw.audit.events import EventFactory
from saw.errors import SawError
from saw.files import write_atomic
from saw.runtime.notify import notify
from saw.telemetry.config import TelemetryConfig, Way
from saw.telemetry.forward import Courier
from saw.telemetry.health import Beat
from saw.telemetry.journal import Entry, Gap, Open, Reading, Untold
from saw.telemetry.spool import Spool
from saw.telemetry.told import Claims, Host
from saw.telemetry.translate import began_event, event_of, gap_event, untold_event

logger = logging.getLogger("saw.telemetry")
_READ_S = 1.0
_AGAIN_S = 5.0
_BEAT_S = 5.0
#: Where nothing is to be told, the cursor is written that seldom: to read such entries again does no harm.
_CURSOR_S = 10.0
#: A full spool is read into again once so many bytes are free, so that its edge is not met again and again.
_ROOM = 16 * 1024


def host_name(config: TelemetryConfig) -> str:
    """Return the name of this host in events."""
    return config.host or gethostname()


class Service:
    """Telemetry of one host, until ``stop`` is set."""

    def __init__(self, config: TelemetryConfig, stop: threading.Event, open_journal: Open = Reading) -> None:
        self._config = config
        self._stop = stop
        self._open = open_journal
        self._name = host_name(config)
        self._factory = EventFactory("saw-telemetry", host=self._name, new_uid=lambda: str(uuid.uuid4()))
        self._spool = Spool(Path(config.state_dir), config.spool_bytes, self._name)
        self._claims = Claims()
        self._couriers: dict[Way, Courier] = {}
        self._reading: Reading | None = None
        self._skipped: tuple[str, float] = ("", 0.0)
        self._again = 0.0
        self._problem = ""
        self._beaten = 0.0

    def run(self) -> None:
        """Read and deliver until told to stop."""
        Path(self._config.run_dir).mkdir(parents=True, exist_ok=True)
        self._use_ways()
        if self._spool.head.seq == 0:
            self._spool.append([], _now(), first=[began_event(self._host(), datetime.now(UTC), self._spool.source)])
        self._beat()
        notify("READY=1")
        while not self._stop.is_set():
            self._use_ways()
            try:
                self.turn()
            except (SawError, OSError, ValueError) as error:
                self._end_reading()
                self._again = time.monotonic() + _AGAIN_S
                if self._problem != str(error):
                    logger.warning("the journal is not told: %s", error)
                self._problem = str(error) or type(error).__name__
            if time.monotonic() >= self._beaten + _BEAT_S:
                self._beat()
            notify("WATCHDOG=1")
        self._end_reading()
        self._write_skipped(0.0)
        for courier in self._couriers.values():
            courier.end(5)
        self._spool.close()

    def turn(self) -> None:
        """Read what is new, once, and write it; wait a moment when there is nothing or no room."""
        if time.monotonic() < self._again:
            self._stop.wait(0.2)
            return
        if self._reading is None:
            if self._spool.full_since and not self._spool.has_room(_ROOM):
                self._stop.wait(_READ_S)
                return
            self._reading = self._open(self._config, self._spool.cursor)
        entries, gap = self._reading.read(_READ_S)
        self._problem = ""
        if entries:
            self._write(entries, gap)
        else:
            self._write_skipped(_CURSOR_S)

    def _write(self, entries: list[Entry | Untold], gap: Gap | None) -> None:
        host = self._host()
        read = [(entry.cursor, self._event(host, entry)) for entry in entries]
        if gap is None and not any(event for _, event in read):
            self._skipped = (read[-1][0], self._skipped[1] or time.monotonic())
            self._write_skipped(_CURSOR_S)
            return
        first: list[dict[str, Any]] = []
        if gap is not None:
            logger.warning("entries left the journal before they were read: %s", gap.entries)
            first = [gap_event(host, gap, datetime.now(UTC), self._spool.full_since)]
        self._skipped = ("", 0.0)
        taken = self._spool.append(read, _now(), first=first)
        if taken < len(read):
            # What had no room stays in the journal; it is read again from there.
            logger.warning("the spool is full: events wait in the journal")
            self._end_reading()

    def _event(self, host: Host, entry: Entry | Untold) -> dict[str, Any] | None:
        # One entry that cannot be told must not stop all that come after it; that there was one is told.
        if isinstance(entry, Untold):
            logger.warning("an entry is too long, or not as it has to be")
            return untold_event(host, datetime.now(UTC), entry.cursor, "unreadable")
        try:
            return event_of(host, entry, self._config.select)
        except (SawError, ValueError, OverflowError) as error:
            logger.warning("an entry cannot be told: %s", error)
            return untold_event(host, datetime.now(UTC), entry.cursor, type(error).__name__)

    def _write_skipped(self, age_s: float) -> None:
        cursor, since = self._skipped
        if cursor and time.monotonic() >= since + age_s:
            self._skipped = ("", 0.0)
            self._spool.append([(cursor, None)], _now())

    def _host(self) -> Host:
        told = self._config.workspace_told()
        return Host(self._factory, self._name, told.workspace_id if told else "", self._claims)

    def _use_ways(self) -> None:
        ways = self._config.ways()
        if ways == tuple(self._couriers):
            return
        self._spool.use(ways, self._config.configured())
        for way in self._couriers.keys() - set(ways):
            self._couriers[way].end(5)
        for way in ways:
            if way not in self._couriers:
                self._couriers[way] = Courier(self._config, self._spool, way, self._name)
                self._couriers[way].start()
        self._couriers = {way: self._couriers[way] for way in ways}

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def _beat(self) -> None:
        self._beaten = time.monotonic()
        errors = {way: courier.trouble for way, courier in self._couriers.items() if courier.trouble}
        beat = Beat(time.time(), self._problem, {str(way): text for way, text in errors.items()})
        write_atomic(self._config.beat, msgspec.json.encode(beat))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


__all__ = ["Service", "host_name"]
