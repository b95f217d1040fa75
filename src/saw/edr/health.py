"""Whether endpoint detection works here: every reason why it does not, in one list."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.audit.events import EventFactory
from saw.edr.auditing import audit_of
from saw.edr.clamav import signatures_of
from saw.edr.config import EdrConfig, Integrity, Malware, Vendor
from saw.edr.detection import Detection
from saw.edr.place import ways_of, workspace_id
from saw.edr.store import Store
from saw.errors import ConfigError
from saw.files import load_json

#: A watcher that has not shown itself for so long is dead or stuck, seconds.
SILENT_S = 60.0
#: A scan is overdue after so many intervals.
OVERDUE = 3
_COMMAND_S = 30


class Beat(msgspec.Struct, frozen=True):
    """What the watcher writes after its looks: the time (seconds since 1970), what it could not do, and how often it looked."""

    time: float
    problems: tuple[str, ...] = ()
    looks: dict[str, int] = {}


class Health(msgspec.Struct, frozen=True):
    """``problems`` is empty when all is well; ``parts`` says how each part is."""

    provider: str
    problems: tuple[str, ...]
    parts: dict[str, str]
    waiting: int


def health_of(config: EdrConfig, now: datetime) -> Health:
    """Look at all parts."""
    problems: list[str] = []
    parts: dict[str, str] = {}
    parts["watcher"] = _watcher(config, now, problems)
    store = Store(config.state, config.spool_limit, ways=ways_of(config))
    try:
        waiting = store.waiting()
        notes = {name: store.note(name) for name in ("malware_scan", "integrity_scan", "integrity_differences")}
    finally:
        store.close()
    parts["spool"] = f"{waiting} of {config.spool_limit} wait for delivery"
    if waiting >= config.spool_limit:
        problems.append(f"the spool is full: {waiting} findings wait for delivery")
    if config.malware is not None:
        parts["malware"] = _malware(config, config.malware, notes, now, problems)
    if config.integrity is not None:
        parts["integrity"] = _integrity(config, config.integrity, notes, now, problems)
    if config.audit:
        parts["audit"] = audit_of(_systemd("auditd.service"), problems)
    if config.vendor is not None:
        parts["vendor"] = _vendor(config.vendor, problems)
    return Health(config.provider, tuple(problems), parts, waiting)


def report(health: Health, config: EdrConfig, store: Store, factory: EventFactory, now: datetime) -> list[int]:
    """Write a finding for each way in which it is newly ill; one that got well and ill again is told again."""
    known = store.known("health")
    # ages differ from look to look, the words around them do not
    ill = {"".join("#" if one.isdigit() else one for one in problem): problem for problem in health.problems}
    found = [
        Detection(
            "agent_unhealthy",
            problem,
            "Endpoint detection is not well",
            f"agent_unhealthy|{name}|{now.isoformat()}",
            "medium",
            {"provider": config.provider},
        )
        for name, problem in ill.items()
        if name not in known
    ]
    marks: dict[str, str | None] = {name: None for name in known if name not in ill}
    marks |= dict.fromkeys(ill, "ill")
    if ill.keys() == known.keys():
        return []
    return store.record(found, factory, now, workspace=workspace_id(config), known={"health": marks})


def _watcher(config: EdrConfig, now: datetime, problems: list[str]) -> str:
    try:
        beat = load_json(config.beat, Beat)
    except ConfigError:
        problems.append("the watcher does not run: there is no sign of life of it (systemctl status saw-edr)")
        return "no sign of life"
    problems += beat.problems
    age = now.timestamp() - beat.time
    limit = max(SILENT_S, 3 * config.watch_s)
    if age > limit:
        problems.append(f"the watcher has shown no life for {age:.0f} s (systemctl status saw-edr)")
    return f"last seen {max(0.0, age):.0f} s ago"


def _malware(
    config: EdrConfig, malware: Malware, notes: Mapping[str, str | None], now: datetime, problems: list[str]
) -> str:
    if not Path(malware.clamscan).exists():
        problems.append(f"{malware.clamscan} is missing: install the package clamav")
    signatures = signatures_of(Path(malware.database))
    if signatures.newest is None:
        problems.append(f"there are no signatures in {malware.database}")
        return "no signatures"
    age = (now - signatures.newest).total_seconds()
    if age > malware.max_age_s:
        problems.append(
            f"the signatures in {malware.database} are {_span(age)} old, more than {_span(malware.max_age_s)}"
        )
    return f"signatures {_span(age)} old; {_last(config, 'malware scan', notes['malware_scan'], now, problems)}"


def _integrity(
    config: EdrConfig, integrity: Integrity, notes: Mapping[str, str | None], now: datetime, problems: list[str]
) -> str:
    if not Path(integrity.aide).exists():
        problems.append(f"{integrity.aide} is missing: install the package aide")
    if not Path(integrity.database).exists():
        problems.append(f"there is no integrity database {integrity.database}: saw edr integrity --init")
        return "no database"
    differences = notes["integrity_differences"] or "unknown"
    return f"{differences} differences; {_last(config, 'integrity scan', notes['integrity_scan'], now, problems)}"


def _last(config: EdrConfig, what: str, when: str | None, now: datetime, problems: list[str]) -> str:
    if when is None:
        problems.append(f"there was no {what} yet: saw edr scan")
        return "never scanned"
    age = (now - datetime.fromisoformat(when).astimezone(UTC)).total_seconds()
    if age > OVERDUE * config.scan_s:
        problems.append(f"the last {what} was {_span(age)} ago (systemctl status saw-edr-scan.timer)")
    return f"scanned {_span(max(0.0, age))} ago"


def _vendor(vendor: Vendor, problems: list[str]) -> str:
    active = _systemd(vendor.service).get("ActiveState")
    if active != "active":
        problems.append(f"{vendor.service} does not run (systemctl status {vendor.service})")
        return f"{vendor.service} does not run"
    try:
        done = subprocess.run(
            vendor.health, capture_output=True, timeout=_COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )
        code: Any = done.returncode
    except (OSError, subprocess.TimeoutExpired) as error:
        code = type(error).__name__
    if code != 0:
        problems.append(f"the health command of {vendor.service} ended with {code}: {vendor.health[0]}")
        return f"{vendor.service} runs and is not well"
    return f"{vendor.service} runs and is well"


def _systemd(unit: str) -> dict[str, str]:
    command = ["systemctl", "show", unit, "--property=LoadState,ActiveState,ConditionResult"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def _span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


__all__ = ["Beat", "Health", "health_of", "report"]
