"""The watcher's looks: reverse shells, units and cron jobs, configuration of audit and EDR, setuid files.

Each look is compared with what is known; differences and the new state are written in one go. The first look of an area finds
nothing to compare with: it is taken as it is and says so in a finding that leaves the box, so that a wiped state does not pass
unseen.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import msgspec

from saw.audit.events import EventFactory
from saw.edr.alerts import NOTE, Read, Tail
from saw.edr.config import Alerts, EdrConfig
from saw.edr.detection import Detection, Now
from saw.edr.packages import packages_of
from saw.edr.place import workspace_id
from saw.edr.policy_units import policy_units_of
from saw.edr.shells import find_shells
from saw.edr.store import Store
from saw.edr.trees import (
    Change,
    Look,
    Marks,
    always,
    compare,
    look_for_setuid,
    persistence_of,
    setuid_of,
    starts_something,
    tampering_of,
)

Judge = Callable[[Change, str], Detection | None]


class Watcher:
    """Looks at one host. ``config_file`` is always among the protected files."""

    def __init__(self, config: EdrConfig, store: Store, factory: EventFactory, now: Now, config_file: Path) -> None:
        self._config = config
        self._store = store
        self._factory = factory
        self._now = now
        self._protected = tuple(dict.fromkeys((str(config_file.absolute()), *config.protected)))
        self._persistence_marks = Marks()
        self._protected_marks = Marks()
        self._shells = frozenset(config.shells)
        self._alerts = Tail(config.alerts) if config.alerts else None
        self.problems: dict[str, str] = {}

    def look_at_alerts(self) -> list[int]:
        """Look for what another engine found; return the numbers of new findings."""
        settings, tail = self._config.alerts, self._alerts
        if settings is None or tail is None:
            return []
        place = self._store.note(NOTE)
        read = tail.look(place)
        if read is None:
            self.problems["alerts"] = f"{settings.file} is not there: no alert of {settings.format} is read"
            return []
        if read.unreadable:
            self.problems["alerts"] = f"lines of {settings.file} are no alerts of {settings.format}"
        elif read.place != place:
            self.problems.pop("alerts", None)
        if read.place == place:
            return []
        found = [*read.detections, *([_unreadable(settings, read)] if read.unreadable else [])]
        return self._write(found, notes={NOTE: read.place})

    def look_at_processes(self) -> list[int]:
        """Look for reverse shells; return the numbers of new findings."""
        return self._write(find_shells(Path(self._config.proc), self._shells))

    def look_at_files(self) -> list[int]:
        """Look at units, cron jobs and the configuration of audit and EDR."""
        found = self._area(
            "protected", self._protected, self._protected_marks.look(self._protected, always), tampering_of
        )
        patterns = self._config.persistence
        look = self._persistence_marks.look(patterns, starts_something)
        return found + self._area("persistence", patterns, look, persistence_of)

    def look_at_setuid(self) -> list[int]:
        """Look for setuid and setgid files."""
        roots = self._config.setuid_roots
        return self._area("setuid", roots, look_for_setuid(roots), setuid_of) if roots else []

    def _area(self, area: str, patterns: tuple[str, ...], look: Look, judge: Judge) -> list[int]:
        if look.cut_off:
            self.problems[area] = f"{area}: more files than can be watched"
        else:
            self.problems.pop(area, None)
        known = self._store.known(area)
        note = f"patterns_{area}"
        wanted = hashlib.sha256(json.dumps(patterns).encode()).hexdigest()
        adopted = self._store.note(note)
        changes = compare(known, look.marks)
        if look.cut_off:
            changes = [change for change in changes if change.how != "gone"]
        if adopted == wanted and not changes:
            return []
        told = [change for change in changes if change.how != "new" or adopted == wanted]
        taken = len(changes) - len(told)
        there = [change.path for change in told if change.mark]
        explained = packages_of(there) | policy_units_of(there)
        found = [judge(change, explained.get(change.path, "")) for change in told]
        if adopted != wanted:
            found.append(_taken(area, taken, first=adopted is None, mark=wanted))
        marks = {area: {change.path: change.mark for change in changes}}
        # What is known tells repeats apart here; a unit that comes a second time is a second finding.
        moment = self._now().isoformat()
        fresh = [msgspec.structs.replace(one, key=f"{one.key}|{moment}") for one in found if one]
        return self._write(fresh, marks, {note: wanted})

    def _write(
        self,
        found: list[Detection],
        known: dict[str, dict[str, str | None]] | None = None,
        notes: dict[str, str] | None = None,
    ) -> list[int]:
        wanted = [one for one in found if not self._config.ignored(one.kind, one.subject)]
        if not wanted and not known and not notes:
            return []
        workspace = workspace_id(self._config)
        return self._store.record(
            wanted, self._factory, self._now(), workspace=workspace, known=known or {}, notes=notes or {}
        )


def _unreadable(settings: Alerts, read: Read) -> Detection:
    """Return what is told of lines that are no alerts: their number and digest, and nothing of what they say."""
    return Detection(
        "agent_unhealthy",
        settings.file,
        f"Lines are no alerts of {settings.format}",
        f"alerts_unreadable|{read.place}|{read.unreadable_sha256}",
        "medium",
        {"provider": settings.format, "count": read.unreadable, "sha256": read.unreadable_sha256},
    )


def _taken(area: str, count: int, *, first: bool, mark: str) -> Detection:
    return Detection(
        "baseline_taken",
        area,
        "What is there was taken as known"
        if first
        else "Other places are watched, and what is there was taken as known",
        f"baseline_taken|{area}|{mark}",
        "low",
        {"area": area, "files": count, "first": first},
    )


__all__ = ["Watcher"]
