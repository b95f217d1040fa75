"""Whether telemetry works here: every reason why it does not, in one list."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import msgspec

from saw.errors import ConfigError
from saw.files import load_json
from saw.telemetry.config import TelemetryConfig
from saw.telemetry.spool import Spool

#: A service that has not shown itself for so long is dead or stuck, seconds.
SILENT_S = 60.0


class Beat(msgspec.Struct, frozen=True):
    """What the service writes as it goes: the time (seconds since 1970), why it does not read, and which ways do not work why."""

    time: float
    problem: str = ""
    ways: dict[str, str] = {}


class Health(msgspec.Struct, frozen=True):
    """``problems`` is empty when all is well; ``waiting`` is by way; ``full_since`` is empty while there is room."""

    problems: tuple[str, ...]
    parts: dict[str, str]
    source: str
    head: int
    waiting: dict[str, int]
    bytes_waiting: int
    spool_bytes: int
    full_since: str


def health_of(config: TelemetryConfig, host: str, now: datetime) -> Health:
    """Look at all parts. Nothing is made where nothing has run yet."""
    problems: list[str] = []
    parts = {"service": _service(config, now, problems)}
    source, head, waiting, size, full = "", 0, dict[str, int](), 0, ""
    if (Path(config.state_dir) / "spool.db").exists():
        spool = Spool(Path(config.state_dir), config.spool_bytes, host)
        try:
            source, head, waiting = spool.source, spool.head.seq, spool.waiting()
            size, full = spool.bytes_waiting(), spool.full_since
        finally:
            spool.close()
    for way in config.ways():
        parts[way] = f"{waiting.get(way, 0)} of {head} events wait"
    problems += [
        f"{waiting[away]} events wait for the {away}, which is not there: {config.workspace} is missing"
        for away in config.configured()
        if away not in config.ways() and waiting.get(away)
    ]
    if not config.ways():
        parts["ways"] = "none"
        problems.append("events go nowhere: this host is no workspace and has no receiver (docs/telemetry.md)")
    parts["spool"] = f"{size} of {config.spool_bytes} bytes wait"
    if full:
        problems.append(
            f"the spool is full since {full}: events wait in the journal, and are lost where it forgets them"
        )
    return Health(tuple(problems), parts, source, head, waiting, size, config.spool_bytes, full)


def _service(config: TelemetryConfig, now: datetime, problems: list[str]) -> str:
    try:
        beat = load_json(config.beat, Beat)
    except ConfigError:
        problems.append("the service does not run: there is no sign of life of it (systemctl status saw-telemetry)")
        return "no sign of life"
    age = now.timestamp() - beat.time
    if age > SILENT_S:
        problems.append(f"the service has shown no life for {age:.0f} s (systemctl status saw-telemetry)")
    if beat.problem:
        problems.append(f"the journal is not read: {beat.problem}")
    problems += [f"events do not leave for the {way}: {text}" for way, text in beat.ways.items()]
    return f"last seen {max(0.0, age):.0f} s ago"


__all__ = ["SILENT_S", "Beat", "Health", "health_of"]
