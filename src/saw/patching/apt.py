"""What apt says of this host, read into types, and what is not in order with its sources."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.errors import ConfigError, SawError
from saw.patching.config import PatchConfig

PROBE = Path(__file__).with_name("apt_probe.py")
#: The interpreter that has apt's library (package python3-apt, which unattended-upgrades needs).
SYSTEM_PYTHON = "/usr/bin/python3"
_PROBE_S = 300
_OPTIONS = re.compile(r"^\s*deb(?:-src)?\s+\[(?P<options>[^]]*)\]")


class PatchError(SawError):
    """A part of patching cannot do its work."""

    code = "patching_failed"


class Offered(msgspec.Struct, frozen=True):
    """A version newer than the installed one. ``candidate``: apt itself would take it; ``origins`` are its sources."""

    package: str
    source: str
    source_version: str
    installed: str
    offered: str
    candidate: bool
    origins: tuple[dict[str, str], ...]


class Installed(msgspec.Struct, frozen=True):
    """A package of this host, and the source package that it was built from."""

    package: str
    source: str
    source_version: str
    installed: str
    architecture: str


class Engine(msgspec.Struct, frozen=True):
    """What apt tells unattended-upgrades: ``patterns`` and ``others`` are sources, ``reboots`` whether it restarts the host."""

    patterns: tuple[str, ...]
    others: tuple[str, ...]
    reboots: bool


class AptState(msgspec.Struct, frozen=True):
    """The answer of the probe (``apt_probe.py``)."""

    installed: tuple[Installed, ...]
    pending: tuple[Offered, ...]
    held: tuple[str, ...]
    kernels: tuple[str, ...]
    engine: Engine
    unverified: tuple[str, ...]


def probe(config: PatchConfig) -> AptState:
    """Ask apt; raises :class:`PatchError` when it does not answer."""
    command = [SYSTEM_PYTHON, "-I", str(PROBE), config.boot_dir]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PatchError(f"{SYSTEM_PYTHON}: {error}", cure="look at /var/lib/dpkg and the disk") from error
    if done.returncode != 0:
        words = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise PatchError(
            f"apt's library gave no answer: {words}", cure="install python3-apt, and look at `apt-get check`"
        )
    try:
        return jsontext.decode(done.stdout, kind=AptState)
    except msgspec.MsgspecError as error:
        raise PatchError(f"the answer of {PROBE.name} cannot be read: {error}", cure="report this") from error


def names_of(config: PatchConfig) -> dict[str, str]:
    """Return the host's distribution by the placeholders of unattended-upgrades; raises :class:`ConfigError`."""
    try:
        text = Path(config.os_release).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot read {config.os_release}: {error.strerror}", cure="this needs a Debian system"
        ) from error
    told = dict(line.split("=", 1) for line in shlex.split(text, comments=True) if "=" in line)
    return {"distro_id": told.get("ID", "").capitalize(), "distro_codename": told.get("VERSION_CODENAME", "")}


def unsigned_sources(config: PatchConfig, apt: AptState) -> list[str]:
    """Return every place where apt is told to take packages that nobody signed."""
    found = [f"apt's setting {name} is on" for name in apt.unverified]
    folder = Path(config.sources_dir)
    for path in [*sorted((folder / "sources.list.d").glob("*")), folder / "sources.list"]:
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        except OSError as error:
            raise PatchError(f"cannot read {path}: {error.strerror}", cure="run this as root") from error
        if path.suffix == ".sources":
            switched = _deb822(lines)
        elif path.suffix == ".list":
            switched = any((match := _OPTIONS.match(line)) and _weak(match["options"]) for line in lines)
        else:
            continue
        if switched:
            found.append(f"{path} trusts a source without a signature")
    return found


def unlisted_sources(config: PatchConfig, engine: Engine) -> list[str]:
    """Return how unattended-upgrades is told something else than this configuration says."""
    wanted = {_fields(origin.line): origin.line for origin in config.origins}
    told = {_fields(line): line for line in (*engine.patterns, *engine.others)}
    found = [
        f"unattended-upgrades takes updates from {told[one]!r}, which is not on the list"
        for one in sorted(told.keys() - wanted.keys(), key=told.__getitem__)
    ]
    if config.engine:
        lacking = sorted(wanted[one] for one in wanted.keys() - told.keys())
        found += [f"unattended-upgrades does not take updates from {line!r}" for line in lacking]
    if engine.reboots:
        found.append("unattended-upgrades restarts the host by itself, in no window")
    return found


def _fields(line: str) -> frozenset[str]:
    return frozenset(part.strip() for part in line.split(","))


def _weak(options: str) -> bool:
    values = dict(one.replace("+=", "=").split("=", 1) for one in options.split() if "=" in one)
    return _weakened({name.lower(): value for name, value in values.items()})


def _deb822(lines: list[str]) -> bool:
    stanza: dict[str, str] = {}
    found = False
    for line in [*lines, ""]:
        if not line.strip():
            found = found or (_weakened(stanza) and stanza.get("enabled", "yes").lower() != "no")
            stanza = {}
        elif ":" in line and not line.startswith((" ", "\t", "#")):
            name, _, value = line.partition(":")
            stanza[name.strip().lower()] = value.strip()
    return found


def _weakened(values: Mapping[str, Any]) -> bool:
    return any(
        str(values.get(name, "no")).lower() not in {"no", "false", "0", "off", "without", "disable"}
        for name in ("trusted", "allow-insecure", "allow-weak", "allow-downgrade-to-insecure")
    )


__all__ = [
    "AptState",
    "Engine",
    "Installed",
    "Offered",
    "PatchError",
    "names_of",
    "probe",
    "unlisted_sources",
    "unsigned_sources",
]
