"""``saw edr watch``: the watcher's loop, and a second thread that delivers findings, so that a slow broker delays no look."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from socket import gethostname

import msgspec

from saw.audit.events import EventFactory
from saw.edr.config import EdrConfig
from saw.edr.detection import EdrError
from saw.edr.forward import BrokerDestination, Destination, SyslogDestination, close_all, deliver
from saw.edr.health import Beat
from saw.edr.place import Reporting, ways_of
from saw.edr.store import Store, Way
from saw.edr.watcher import Watcher
from saw.errors import SawError
from saw.files import write_atomic
from saw.runtime.notify import notify

logger = logging.getLogger("saw.edr")
#: A look takes at most a twentieth of one CPU: its next turn comes after so many times the CPU time that it took.
_REST = 20
_DELIVER_S = 2.0
_DELIVER_AGAIN_S = 30.0


def now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)


def factory_of(component: str = "saw-edr") -> EventFactory:
    """Return the factory of this host's events."""
    return EventFactory(component, host=gethostname(), new_uid=lambda: str(uuid.uuid4()))


class _Turn:
    """Something that is done again and again, at an interval that grows with what it costs."""

    def __init__(self, name: str, interval: float, work: Callable[[], object]) -> None:
        self.name = name
        self.next = 0.0
        self.count = 0
        self._interval = interval
        self._work = work

    def take(self) -> str:
        """Do it; return what went wrong, if anything."""
        used = time.thread_time()
        try:
            self._work()
        except (SawError, OSError) as error:
            problem = f"{self.name}: {error}"
        else:
            problem = ""
        self.count += 1
        self.next = time.monotonic() + max(self._interval, _REST * (time.thread_time() - used))
        return problem


class Service:
    """The watcher of one host, until ``stop`` is set."""

    def __init__(self, config: EdrConfig, config_file: Path, stop: threading.Event) -> None:
        self._config = config
        self._stop = stop
        self._factory = factory_of()
        self._store = Store(config.state, config.spool_limit, ways=ways_of(config))
        watcher = Watcher(config, self._store, self._factory, now, config_file)
        self._watcher = watcher
        # files first: what changed while the watcher was away is the first thing that is told
        self._turns = [_Turn("files", config.watch_s, watcher.look_at_files)]
        if config.provider == "embedded":
            self._turns.append(_Turn("processes", config.shells_s, watcher.look_at_processes))
            self._turns.append(_Turn("setuid", config.setuid_s, watcher.look_at_setuid))
        if config.alerts is not None:
            self._turns.append(_Turn("alerts", config.shells_s, watcher.look_at_alerts))
        self._problems: dict[str, str] = {}

    def run(self) -> None:
        """Look until told to stop."""
        config = self._config
        Path(config.run_dir).mkdir(parents=True, exist_ok=True)
        courier = threading.Thread(target=Courier(config).run, args=(self._stop,), name="saw-edr-courier", daemon=True)
        courier.start()
        ready = False
        while not self._stop.is_set():
            for turn in self._turns:
                if turn.next <= time.monotonic():
                    self._note(turn.name, turn.take())
            self._beat()
            if not ready:
                notify("READY=1")
                ready = True
            notify("WATCHDOG=1")
            self._stop.wait(max(0.05, min(turn.next for turn in self._turns) - time.monotonic()))
        courier.join(timeout=5)
        self._store.close()

    def _note(self, name: str, problem: str) -> None:
        if problem and self._problems.get(name) != problem:
            logger.warning("%s", problem)
        self._problems[name] = problem

    def _beat(self) -> None:
        self._store.use(ways_of(self._config))
        problems = (*filter(None, self._problems.values()), *self._watcher.problems.values())
        beat = Beat(time.time(), problems, {turn.name: turn.count for turn in self._turns})
        write_atomic(self._config.beat, msgspec.json.encode(beat))


class Courier:
    """Delivers findings on all ways. A way that fails is tried again later, and does not hold the other up."""

    def __init__(self, config: Reporting) -> None:
        self._config = config
        self._store = Store(config.state, config.spool_limit, ways=ways_of(config))
        self._destinations: dict[Way, Destination] = {}
        self._again: dict[Way, float] = {}
        self._failed: dict[Way, str] = {}
        self._host = gethostname()

    def run(self, stop: threading.Event) -> None:
        """Deliver until told to stop."""
        while not stop.is_set():
            self.deliver()
            stop.wait(_DELIVER_S)
        self.close()

    def deliver(self) -> None:
        """Deliver what waits and can be delivered now."""
        ways = ways_of(self._config)
        self._store.use(ways)
        for way in ways:
            if self._again.get(way, 0.0) > time.monotonic():
                continue
            try:
                if self._store.pending(way, 1):
                    deliver(self._store, way, self._destination(way))
                    self._failed.pop(way, None)
            except (SawError, OSError, ValueError) as error:
                if self._failed.get(way) != str(error):
                    logger.warning("findings are not delivered: %s", error)
                self._failed[way] = str(error)
                self._again[way] = time.monotonic() + _DELIVER_AGAIN_S
                # identity, addresses and trust may be new by then
                if way in self._destinations:
                    self._destinations.pop(way).close()

    def close(self) -> None:
        """Close all connections."""
        close_all(self._destinations)
        self._store.close()

    def _destination(self, way: Way) -> Destination:
        if way not in self._destinations:
            made = (
                SyslogDestination(self._config.syslog, self._host)
                if way == "syslog"
                else BrokerDestination.of(self._config)
            )
            if made is None:
                raise EdrError(f"{self._config.workspace} cannot be read", cure="look at saw-bootstrap.service")
            self._destinations[way] = made
        return self._destinations[way]


__all__ = ["Courier", "Service", "factory_of", "now"]
