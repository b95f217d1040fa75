"""Configuration of patching, ``/etc/saw/patching.json``. Times are in seconds, paths absolute, the reboot window is in UTC."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from saw.errors import ConfigError
from saw.files import load_json

DEFAULT_CONFIG = Path("/etc/saw/patching.json")
DAY_S = 86400.0
Place = Annotated[str, msgspec.Meta(pattern=r"^/[^\n\x00]*\Z")]
Span = Annotated[float, msgspec.Meta(gt=0, le=366 * DAY_S)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**7)]
Words = Annotated[str, msgspec.Meta(min_length=3, max_length=512, pattern=r"\S")]
#: A shell pattern of one field of a Release file. Commas, quotes and semicolons would end it in apt's configuration.
Pattern = Annotated[str, msgspec.Meta(pattern=r'^[^,;"=\\\s][^,;"=\\\n]*\Z', max_length=200)]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
FIELDS = ("origin", "label", "archive", "codename", "component", "site")


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where updates may come from: shell patterns of the fields of a Release file, all of which have to match.

    ``${distro_id}`` and ``${distro_codename}`` stand for those of the host, as in unattended-upgrades.
    """

    origin: Pattern
    label: Pattern | None = None
    archive: Pattern | None = None
    codename: Pattern | None = None
    component: Pattern | None = None
    site: Pattern | None = None

    def __post_init__(self) -> None:
        if not self.origin.strip("*?"):
            raise ValueError("origin has to name who publishes the packages; a pattern for everybody is refused")

    @property
    def line(self) -> str:
        """The pattern in the words of unattended-upgrades."""
        return ",".join(f"{name}={value}" for name in FIELDS if (value := getattr(self, name)) is not None)

    def matches(self, told: dict[str, str], names: dict[str, str]) -> bool:
        """Whether a source with the fields ``told`` is one of these; ``names`` are the host's, by placeholder."""
        for name in FIELDS:
            wanted = getattr(self, name)
            if wanted is None:
                continue
            for placeholder, value in names.items():
                wanted = wanted.replace(f"${{{placeholder}}}", value)
            if not fnmatchcase(told.get(name, ""), wanted):
                return False
        return True


class Hold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A package that is not upgraded: ``owner`` answers for it until a day (inclusive)."""

    package: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9+.-]+\Z")]
    owner: Words
    reason: Words
    until: date

    def over(self, today: date) -> bool:
        """Whether its end has passed."""
        return today > self.until


class Window(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When the host may restart: on these days, from ``start`` (HH:MM, UTC) for ``minutes``; it may pass midnight."""

    days: Annotated[tuple[Day, ...], msgspec.Meta(min_length=1)]
    start: Annotated[str, msgspec.Meta(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]\Z")]
    minutes: Annotated[int, msgspec.Meta(ge=10, le=1440)]

    def holds(self, moment: datetime) -> bool:
        """Whether ``moment`` (UTC) lies in the window."""
        return any(begin <= moment < begin + timedelta(minutes=self.minutes) for begin in self._begins(moment, (-1, 0)))

    def following(self, moment: datetime) -> datetime:
        """Return when the window begins next after ``moment`` (UTC)."""
        return next(begin for begin in self._begins(moment, range(9)) if begin > moment)

    def _begins(self, moment: datetime, offsets: range | tuple[int, ...]) -> list[datetime]:
        hour, minute = map(int, self.start.split(":"))
        days = [moment.date() + timedelta(days=offset) for offset in offsets]
        return [
            datetime.combine(day, time(hour, minute), moment.tzinfo) for day in days if DAYS[day.weekday()] in self.days
        ]


class Reboot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the host restarts. Without a window it never does so by itself. ``busy`` are systemd units that prevent it.

    They are shell patterns; the defaults are the VM of a workspace on its hypervisor, and the agent's sandbox inside a workspace.
    """

    window: Window | None = None
    busy: tuple[Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9@._*?-]+\Z")], ...] = (
        "saw-vm@*.service",
        "saw-shell.service",
    )
    overdue_s: Span = 14 * DAY_S
    command: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)] = ("/usr/bin/systemctl", "--no-block", "reboot")


class PatchConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/patching.json``.

    ``origins`` are the sources of updates that are installed by schedule. A pending one that is older than ``overdue_s`` is a
    finding, as are lists of packages older than ``lists_s``. ``engine``: whether updates are installed
    here, or only reported.
    """

    origins: Annotated[tuple[Origin, ...], msgspec.Meta(min_length=1)]
    holds: tuple[Hold, ...] = ()
    engine: bool = True
    overdue_s: Span = 7 * DAY_S
    lists_s: Span = 3 * DAY_S
    reboot: Reboot = Reboot()
    state_dir: Place = "/var/lib/saw/patching"
    workspace: Place = "/run/saw/workspace.json"
    syslog: str = "/dev/log"
    spool_limit: Count = 2000
    lists_dir: Place = "/var/lib/apt/lists"
    sources_dir: Place = "/etc/apt"
    os_release: Place = "/etc/os-release"
    boot_dir: Place = "/boot"
    reboot_required: Place = "/run/reboot-required"
    livepatch_dir: Place = "/sys/kernel/livepatch"

    def __post_init__(self) -> None:
        names = [hold.package for hold in self.holds]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{twice[0]} is held twice")

    @property
    def state(self) -> Path:
        """What survives a restart."""
        return Path(self.state_dir)


def read_config(path: Path | str = DEFAULT_CONFIG) -> PatchConfig:
    """Read the configuration; raises :class:`ConfigError` that names file, field and cure."""
    try:
        return load_json(path, PatchConfig)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid: {error}", cure="correct the named field (docs/patching.md)") from error


__all__ = ["DAYS", "DEFAULT_CONFIG", "FIELDS", "Hold", "Origin", "PatchConfig", "Reboot", "Window", "read_config"]
