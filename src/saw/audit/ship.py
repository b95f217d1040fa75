"""Ships the trail to a receiver elsewhere: in the order of arrival, behind a durable cursor, at least once.

The broker's database is the queue: an event leaves it by being acknowledged, and nothing else is kept here but two small
files. ``cursor.json`` says up to where the receiver has acknowledged; it is written after each batch of at most
:data:`saw.audit.receiver.WINDOW` messages, so that many can come twice after a crash, and none can be missing. ``health.json``
says what this does, and the last error.
"""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from saw.audit.chain import ChainedEvent, Head
from saw.audit.otlp import Records
from saw.audit.receiver import WINDOW, DeliveryError, Outlet, Receiver, Way, problems_of
from saw.audit.relp import Messages
from saw.audit.syslog import mark_of
from saw.errors import ConfigError, SawError, UnavailableError
from saw.files import load_json, write_atomic

#: How long a poll of the broker waits for a new event, seconds.
POLL_S = 20
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_LEAST_LONGEST, _MOST_LONGEST = 8192, 16 * 1024 * 1024
#: The ways of shipping, by the protocol of a receiver.
WAYS: dict[str, Way] = {"relp": Messages(), "otlp": Records()}


class ShipSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file ``/etc/saw/audit.json``.

    ``socket``: the broker's audit socket. ``state_dir``: where cursor and health are kept. ``receiver``: where events go.
    ``max_message_bytes``: the longest message that the receiver takes, 8 KiB to 16 MiB; a longer event is sent without its
    content and with its size. ``host``: the name in the messages, this machine's when empty.
    """

    socket: str
    state_dir: str
    receiver: Receiver
    max_message_bytes: int = 1024 * 1024
    host: str = ""


class Before(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one event of the trail."""

    source: str
    seq: int
    hash: str


class Cursor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Up to where the receiver has acknowledged: position, the event there, and for each chain its last one.

    ``restarts`` counts how often the stored trail was not the one that had been shipped.
    """

    position: int = 0
    last: Before | None = None
    sources: dict[str, Head] = msgspec.field(default_factory=dict)
    acknowledged_at: str = ""
    restarts: int = 0


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the forwarder does, since when (UTC), and the last error (kept after it has passed)."""

    state: Literal["starting", "shipping", "failing"]
    since: str
    receiver: str
    error: dict[str, Any] | None = None
    error_at: str = ""


class Placed(ChainedEvent, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A chained event with its place in the order of arrival."""

    position: int


class Page(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An answer of the broker, as ``GET /v1/audit/log`` gives it."""

    events: tuple[Placed, ...]
    next: int
    end: int
    before: Before | None


class Trail(Protocol):
    """Where events come from. ``read`` raises :class:`SawError` when the broker is away or refuses."""

    def read(self, after: int, limit: int, wait_s: int) -> Page:
        """Return up to ``limit`` events behind position ``after``, waiting up to ``wait_s`` seconds for the first."""
        ...


def load_settings(path: Path | str) -> ShipSettings:
    """Read and check the configuration; raise :class:`ConfigError` that names the field and the cure."""
    settings = load_json(path, ShipSettings)
    problems = [
        *(
            text
            for bad, text in (
                (not Path(settings.socket).is_absolute(), "socket must be an absolute path"),
                (not Path(settings.state_dir).is_absolute(), "state_dir must be an absolute path"),
            )
            if bad
        ),
        *problems_of(settings.receiver),
    ]
    if not _LEAST_LONGEST <= settings.max_message_bytes <= _MOST_LONGEST:
        problems.append(f"max_message_bytes must be {_LEAST_LONGEST} to {_MOST_LONGEST}")
    if problems:
        raise ConfigError(f"{path} is not valid: {'; '.join(problems)}", cure="correct the named fields")
    return settings


class ShipState:
    """The two files in the state directory."""

    def __init__(self, directory: Path) -> None:
        self._cursor, self._health = directory / "cursor.json", directory / "health.json"

    def clean(self) -> None:
        """Remove what a killed write left behind. For the one process that writes."""
        for file in (self._cursor, self._health):
            for left in file.parent.glob(f".{file.name}.*"):
                left.unlink(missing_ok=True)

    def cursor(self) -> Cursor:
        """Return the cursor; a new one where there is none yet. A file that does not parse is an error, not a new start."""
        return load_json(self._cursor, Cursor) if self._cursor.exists() else Cursor()

    def health(self) -> Health | None:
        """Return the health as it was last written; None when this never ran."""
        return load_json(self._health, Health) if self._health.exists() else None

    def write(self, value: Cursor | Health) -> None:
        """Replace the file of ``value``, durably."""
        write_atomic(
            self._cursor if isinstance(value, Cursor) else self._health, msgspec.json.encode(value), mode=0o640
        )


class Forwarder:
    """Reads the trail, sends it, remembers how far. One at a time for each state directory."""

    def __init__(
        self, settings: ShipSettings, trail: Trail, clock: Callable[[], datetime], stop: threading.Event
    ) -> None:
        self._settings = settings
        self._trail = trail
        self._clock = clock
        self._stop = stop
        self._state = ShipState(Path(settings.state_dir))
        self._cursor = Cursor()
        self._health = Health("starting", "", settings.receiver.address)
        self._marks_restart = False
        self._way = WAYS[settings.receiver.protocol]

    def run(self) -> None:
        """Ship until stopped. Whatever fails is written to the health and tried again: within 10 s, or when the receiver says."""
        self._state.clean()
        self._cursor = self._state.cursor()
        old = self._state.health()
        self._tell("starting", None if old is None else old.error, "" if old is None else old.error_at)
        pause = _SHORTEST_PAUSE_S
        while not self._stop.is_set():
            try:
                self._ship()
            except SawError as error:
                if self._health.state == "shipping":
                    pause = _SHORTEST_PAUSE_S
                self._tell("failing", error.as_dict(), self._now())
                if isinstance(error, DeliveryError) and error.wait_s:
                    self._stop.wait(error.wait_s)
            self._stop.wait(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads retries, no secret
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _ship(self) -> None:
        """Ship over one session until it breaks. The broker is asked first, so that a silent trail opens no session."""
        page = self._page(0)
        with ExitStack() as stack:
            session = stack.enter_context(self._way.open(self._settings.receiver))
            self._tell("shipping", self._health.error, self._health.error_at)
            while not self._stop.is_set():
                self._deliver(session, page)
                page = self._page(POLL_S)
                session.check()

    def _page(self, wait_s: int) -> Page:
        """Return the next events. Starts again at the beginning when the broker no longer has what was shipped."""
        page = self._trail.read(self._cursor.position, WINDOW, wait_s)
        if page.before == self._cursor.last:
            return page
        self._cursor = Cursor(restarts=self._cursor.restarts + 1)
        self._state.write(self._cursor)
        self._marks_restart = True
        raise UnavailableError(
            "the broker's trail is not the one that was shipped: everything is shipped again, and marked",
            cure="compare the receiver's copy with the broker's (saw audit verify --syslog), unless a backup was restored",
        )

    def _deliver(self, session: Outlet, page: Page) -> None:
        heads = dict(self._cursor.sources)
        batch: list[tuple[bytes, Placed, dict[str, Head]]] = []
        for item in page.events:
            head = heads.get(item.source, Head())
            mark = "restarted" if self._marks_restart and not batch else mark_of(head, item)
            raw = self._way.message(
                item, item.position, mark, self._settings.host or socket.gethostname(), self._settings.max_message_bytes
            )
            if item.seq > head.seq:
                heads[item.source] = Head(item.seq, item.hash)
            batch.append((raw, item, dict(heads)))
        if not batch:
            return
        taken = 0

        def acknowledged(count: int) -> None:
            nonlocal taken
            taken = count

        try:
            session.deliver([raw for raw, _, _ in batch], acknowledged)
        finally:
            if taken:
                _, item, sources = batch[taken - 1]
                self._cursor = msgspec.structs.replace(
                    self._cursor,
                    position=item.position,
                    last=Before(item.source, item.seq, item.hash),
                    sources=sources,
                    acknowledged_at=self._now(),
                )
                self._state.write(self._cursor)
                self._marks_restart = False

    def _tell(self, state: Literal["starting", "shipping", "failing"], error: dict[str, Any] | None, at: str) -> None:
        since = self._health.since if self._health.state == state and self._health.since else self._now()
        self._health = Health(state, since, self._settings.receiver.address, error, at)
        self._state.write(self._health)

    def _now(self) -> str:
        return self._clock().isoformat(timespec="seconds").replace("+00:00", "Z")
