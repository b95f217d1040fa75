"""Configuration of endpoint detection, ``/etc/saw/edr.json``. Times are in seconds, paths absolute."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from saw.errors import ConfigError
from saw.files import load_json

DEFAULT_CONFIG = Path("/etc/saw/edr.json")
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=10**7)]
Place = Annotated[str, msgspec.Meta(pattern=r"^/[^\n\x00]*\Z")]
Kind = Literal[
    "malware",
    "system_file_changed",
    "reverse_shell",
    "setuid_file",
    "persistence",
    "tampering",
    "engine_alert",
    "baseline_taken",
    "agent_unhealthy",
]
#: Programs that are shells, by the name of the file that runs.
SHELLS = ("ash", "bash", "busybox", "csh", "dash", "fish", "ksh", "mksh", "rbash", "sh", "tcsh", "zsh")


class Ignore(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Findings that somebody decided not to see: of one kind, with a subject that matches a shell pattern, for a reason."""

    kind: Kind
    subject: Annotated[str, msgspec.Meta(min_length=1)]
    reason: Annotated[str, msgspec.Meta(min_length=3)]

    def covers(self, kind: str, subject: str) -> bool:
        """Whether it is about this finding."""
        return kind == self.kind and fnmatchcase(subject, self.subject)


class Malware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The ClamAV scan: what is scanned, with which signatures, and how old they may be."""

    paths: tuple[Place, ...]
    database: Place = "/var/lib/clamav"
    max_age_s: Annotated[float, msgspec.Meta(gt=0)] = 7 * 86400.0
    clamscan: Place = "/usr/bin/clamscan"


class Integrity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The AIDE check: its configuration and its database, which only ``saw edr integrity`` replaces."""

    config: Place = "/etc/saw/aide.conf"
    database: Place = "/var/lib/saw/edr-integrity/aide.db"
    aide: Place = "/usr/bin/aide"


class Alerts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file into which another engine writes its alerts, and from which severity on they are findings of ours."""

    format: Literal["falco", "wazuh"]
    file: Place
    minimum: Literal["informational", "low", "medium", "high", "critical"] = "low"


class Vendor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An engine of others: the systemd unit it runs as, and a command that ends with 0 while it is well."""

    service: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9@._-]+\.service\Z")]
    health: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class EdrConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/edr.json``.

    ``persistence`` and ``protected`` are patterns of files and folders; ``setuid_roots`` are folders that are walked down.
    ``shells_s``, ``watch_s`` and ``setuid_s`` are the intervals of the watcher's three looks; ``alerts`` are read as often
    as the first. ``scan_s`` is how often malware
    and integrity are scanned. ``spool_limit`` is how many findings may wait for delivery.
    """

    provider: Literal["embedded", "falco", "wazuh", "vendor_package"] = "embedded"
    state_dir: Place = "/var/lib/saw/edr"
    run_dir: Place = "/run/saw/edr"
    workspace: Place = "/run/saw/workspace.json"
    syslog: str = "/dev/log"
    proc: Place = "/proc"
    shells_s: Seconds = 2.0
    watch_s: Seconds = 5.0
    setuid_s: Seconds = 60.0
    scan_s: Seconds = 3600.0
    spool_limit: Count = 2000
    persistence: tuple[Place, ...] = ()
    protected: tuple[Place, ...] = ()
    setuid_roots: tuple[Place, ...] = ()
    shells: tuple[str, ...] = SHELLS
    audit: bool = False
    malware: Malware | None = None
    integrity: Integrity | None = None
    vendor: Vendor | None = None
    alerts: Alerts | None = None
    ignore: tuple[Ignore, ...] = ()

    def __post_init__(self) -> None:
        if (self.provider != "embedded") != (self.vendor is not None):
            raise ValueError("vendor belongs to providers other than embedded, and those need it")
        if self.alerts is not None and self.alerts.format != self.provider:
            raise ValueError(f"alerts are those of {self.alerts.format}, and the provider is {self.provider}")
        if self.provider == "falco" and self.alerts is None:
            raise ValueError("the provider falco needs alerts")

    @property
    def state(self) -> Path:
        """What survives a restart."""
        return Path(self.state_dir)

    @property
    def beat(self) -> Path:
        """The file by which the watcher shows that it is alive."""
        return Path(self.run_dir) / "beat.json"

    def ignored(self, kind: str, subject: str) -> bool:
        """Whether somebody decided not to see this finding."""
        return any(one.covers(kind, subject) for one in self.ignore)


def read_config(path: Path | str = DEFAULT_CONFIG) -> EdrConfig:
    """Read the configuration; raises :class:`ConfigError` that names file, field and cure."""
    try:
        return load_json(path, EdrConfig)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid: {error}", cure="correct the named field (docs/edr.md)") from error


__all__ = ["DEFAULT_CONFIG", "SHELLS", "Alerts", "EdrConfig", "Ignore", "Integrity", "Malware", "Vendor", "read_config"]
