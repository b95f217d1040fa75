"""Configuration of telemetry, ``/etc/saw/telemetry.json``. Paths are absolute."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from saw.audit.receiver import Receiver, problems_of
from saw.errors import ConfigError, SawError
from saw.files import load_json
from saw.runtime.policyd_config import Workspace

DEFAULT_CONFIG = Path("/etc/saw/telemetry.json")
Way = Literal["broker", "collector"]
Place = Annotated[str, msgspec.Meta(pattern=r"^/[^\n\x00]*\Z")]
Pattern = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
#: Severity of syslog (RFC 5424): 0 is an emergency, 7 is for debugging; entries of this number and below are told.
Priority = Annotated[int, msgspec.Meta(ge=0, le=7)]


#: Units in which agents run, and what runs for them: what these write is an agent's own word, and may hold its secrets.
_OF_AGENTS = ("saw-agent@", "saw-mcp-", "saw-shell", "saw-openshell-podman")


def of_an_agent(unit: str) -> bool:
    """Whether a unit, or a pattern of units, is of those whose words are an agent's."""
    return unit.startswith(_OF_AGENTS)


class TelemetryError(SawError):
    """A part of telemetry cannot do its work."""

    code = "telemetry_failed"


class Log(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Entries of units by a shell pattern, as severe as ``priority`` or more; ``text`` says whether their words are carried.

    Units of agents are meant only by a pattern that begins with their name, and their words are never carried.
    """

    unit: Pattern
    priority: Priority
    text: bool = False


class Select(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is told; everything else stays in the journal.

    ``sign_ins``: sshd, sudo and what PAM says of others. ``accounts``: users, groups and passwords. ``services``: patterns of
    units of which start and stop are told. ``failures``: units that failed, whichever. ``kernel``: the kernel's own entries, None
    for none. ``audit_keys``: patterns of the keys of audit's rules; ``audit``: also what audit tells without a rule.
    """

    sign_ins: bool = True
    accounts: bool = True
    services: tuple[Pattern, ...] = ()
    failures: bool = True
    kernel: Priority | None = 3
    audit: bool = True
    audit_keys: tuple[Pattern, ...] = ("saw-*",)
    logs: tuple[Log, ...] = ()

    def tells_service(self, unit: str) -> bool:
        """Whether start and stop of this unit are told."""
        return any(fnmatchcase(unit, pattern) for pattern in self.services)

    def tells_key(self, key: str) -> bool:
        """Whether records with this key of an audit rule are told."""
        return bool(key) and any(fnmatchcase(key, pattern) for pattern in self.audit_keys)

    def log_of(self, unit: str, priority: int) -> Log | None:
        """Return the rule by which an entry is told, None when there is none."""
        return next(
            (
                one
                for one in self.logs
                if priority <= one.priority
                and fnmatchcase(unit, one.unit)
                and (of_an_agent(one.unit) or not of_an_agent(unit))
            ),
            None,
        )


class TelemetryConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``/etc/saw/telemetry.json``.

    ``journal``: a folder of journal files, empty for the host's own. ``first``: where the first reading begins. ``spool_bytes``:
    how much may wait. ``host``: the name in events and messages, this machine's when empty. ``broker``: whether a workspace tells
    its broker. ``receiver``: a collector, as of the audit trail. ``max_message_bytes``: the longest message that it takes.
    """

    state_dir: Place = "/var/lib/saw/telemetry"
    run_dir: Place = "/run/saw/telemetry"
    workspace: Place = "/run/saw/workspace.json"
    journal: Annotated[str, msgspec.Meta(pattern=r"^(/[^\n\x00]*)?\Z")] = ""
    first: Literal["boot", "now", "all"] = "boot"
    spool_bytes: Annotated[int, msgspec.Meta(ge=64 * 1024, le=16 * 2**30)] = 64 * 2**20
    host: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9._-]{0,255}\Z")] = ""
    broker: bool = True
    receiver: Receiver | None = None
    max_message_bytes: Annotated[int, msgspec.Meta(ge=8192, le=16 * 2**20)] = 2**20
    select: Select = Select()

    def __post_init__(self) -> None:
        if self.receiver is not None and (problems := problems_of(self.receiver)):
            raise ValueError("; ".join(problems))

    @property
    def beat(self) -> Path:
        """The file by which the service shows that it is alive."""
        return Path(self.run_dir) / "beat.json"

    def ways(self) -> tuple[Way, ...]:
        """Return the ways on which events have to arrive here. A host becomes a workspace once it is told so."""
        return tuple(way for way in self.configured() if way != "broker" or Path(self.workspace).exists())

    def configured(self) -> tuple[Way, ...]:
        """Return the ways that are not configured off, whether they are there now or not."""
        found: list[Way] = ["broker"] if self.broker else []
        if self.receiver is not None:
            found.append("collector")
        return tuple(found)

    def workspace_told(self) -> Workspace | None:
        """Return what the workspace was told at its creation, None on a host that is none (or is not told yet)."""
        try:
            return load_json(self.workspace, Workspace) if Path(self.workspace).exists() else None
        except ConfigError:
            return None


def read_config(path: Path | str = DEFAULT_CONFIG) -> TelemetryConfig:
    """Read the configuration; raises :class:`ConfigError` that names file, field and cure."""
    try:
        return load_json(path, TelemetryConfig)
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid: {error}", cure="correct the named field (docs/telemetry.md)"
        ) from error


__all__ = ["DEFAULT_CONFIG", "Log", "Select", "TelemetryConfig", "TelemetryError", "Way", "of_an_agent", "read_config"]
