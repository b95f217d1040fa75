"""The report: drift that nobody answers for, hosts that could not be checked, and what is waived. A versioned JSON format."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from saw import jsontext
from saw.drift.look import Seen
from saw.drift.observed import DriftError
from saw.errors import ConfigError
from saw.files import write_private
from saw.strict_yaml import read_strict_yaml
from saw.waivers import good_on, refuse_empty

PAGE = "docs/drift.md"
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class Waiver(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Drift that ``owner`` answers for until a day (inclusive). ``host``, ``role`` and ``task`` are shell patterns."""

    owner: Text
    reason: Text
    expires: date
    host: Text = "*"
    role: Text = "*"
    task: Text = "*"

    @property
    def about(self) -> str:
        """What it is about, in words."""
        return f"{self.host} / {self.role} / {self.task}"

    def covers(self, drift: Drift) -> bool:
        """Whether it is about this drift."""
        pairs = ((drift.host, self.host), (drift.role, self.role), (drift.task, self.task))
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


class _Waivers(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    waivers: tuple[Waiver, ...]


class Drift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place that is not as a play wants it. ``hidden``: the task tells no place. ``applied``: it was mended by the look."""

    playbook: str
    host: str
    role: str
    task: str
    module: str
    place: str
    hidden: bool = False
    applied: bool = False


class Unchecked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A host of which a playbook does not know whether it drifted, and at which task it was lost."""

    playbook: str
    host: str
    reason: Literal["unreachable", "failed", "not_looked_at"]
    role: str = ""
    task: str = ""


class NotAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A task whose module cannot tell in check mode what it would do: no drift, and no proof of none."""

    playbook: str
    host: str
    role: str
    task: str
    module: str


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Format 1. ``taken`` is UTC; ``hosts`` are all that the playbooks are for; ``unused`` are waivers that no drift needs."""

    format: Literal["saw-drift-report"] = "saw-drift-report"
    version: Literal[1] = 1
    taken: str
    playbooks: tuple[str, ...]
    hosts: tuple[str, ...]
    drift: tuple[Drift, ...]
    unchecked: tuple[Unchecked, ...]
    waived: tuple[Drift, ...]
    not_asked: tuple[NotAsked, ...]
    problems: tuple[str, ...]
    unused: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every host was checked and is as it should be, or somebody answers for it."""
        return not (self.drift or self.unchecked or self.problems)


def read_waivers(path: Path | str) -> tuple[Waiver, ...]:
    """Read waivers; raises :class:`ConfigError` that names file, reason and cure."""
    waivers = read_strict_yaml(path, _Waivers, "file of waivers", PAGE).waivers
    refuse_empty(path, waivers, ("owner", "reason", "host", "role", "task"))
    for one in waivers:
        if {one.host, one.role, one.task} == {"*"}:
            raise ConfigError(f"{path}: a waiver takes everything", cure="name a host, a role or a task in it")
    return waivers


def judge(seen: Iterable[Seen], waivers: Iterable[Waiver], now: datetime) -> Report:
    """Hold what was seen against the waivers; a waiver that ran out covers nothing, and is a problem of its own.

    A waiver never covers a host that could not be checked.
    """
    seen = tuple(seen)
    good, problems = good_on(waivers, now.date())
    found = sorted(
        {
            Drift(one.playbook, at.host, at.role, at.task, at.module, at.place, at.hidden, at.applied)
            for one in seen
            for at in one.changed
        },
        key=lambda at: (at.host, at.playbook, at.role, at.task, at.place),
    )
    waived = tuple(one for one in found if any(waiver.covers(one) for waiver in good))
    hosts = tuple(sorted({host for one in seen for host in one.hosts}))
    empty = () if hosts else ("no host was looked at: check the inventory, and the hosts of the playbooks",)
    return Report(
        taken=now.astimezone(UTC).isoformat(timespec="seconds"),
        playbooks=tuple(one.playbook for one in seen),
        hosts=hosts,
        drift=tuple(one for one in found if one not in waived),
        unchecked=tuple(dict.fromkeys(entry for one in seen for entry in _unchecked(one))),
        waived=waived,
        not_asked=tuple(
            NotAsked(one.playbook, at.host, at.role, at.task, at.module) for one in seen for at in one.blind
        ),
        problems=(*(words for one in seen for words in one.problems), *empty, *problems),
        unused=tuple(one.about for one in good if not any(one.covers(drift) for drift in found)),
    )


def _unchecked(seen: Seen) -> list[Unchecked]:
    """Return each host that was lost, at the first task where it was, and each that never answered."""
    first = {one.host: one for one in reversed(seen.lost)}
    told = [Unchecked(seen.playbook, host, one.reason, one.role, one.task) for host, one in sorted(first.items())]
    return told + [Unchecked(seen.playbook, host, "not_looked_at") for host in seen.missed if host not in first]


def write_report(path: Path | str, report: Report) -> None:
    """Replace the file atomically (0600): a reader sees the old report or the new one."""
    path = Path(path)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    except (FileExistsError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise DriftError(f"{path} cannot be written: {error.strerror}", cure="name another file") from error


def read_report(path: Path | str) -> Report:
    """Read a report strictly; raises :class:`DriftError` for another format or version, and for what was cut off."""
    try:
        return jsontext.decode(Path(path).read_bytes(), kind=Report)
    except OSError as error:
        raise DriftError(f"cannot read {path}: {error.strerror}", cure="name a report of saw drift check") from error
    except msgspec.DecodeError as error:
        raise DriftError(
            f"{path} is no drift report of format 1: {error}", cure="make it with saw drift check"
        ) from error


__all__ = ["Drift", "NotAsked", "Report", "Unchecked", "Waiver", "judge", "read_report", "read_waivers", "write_report"]
