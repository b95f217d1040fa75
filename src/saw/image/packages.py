"""The package state of an image: which versions apt would install today, asked of the signed indices of the archive.

A package set is an input of the image as source files are: its digest covers names and versions and nothing else, so that two
builders that see the same versions get the same digest on whatever day they ask. Asking costs a few seconds and no more than
the indices: apt's own resolver answers on an empty system, with lists of its own that are kept below the cache.
"""

from __future__ import annotations

import email.utils
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from saw import jsontext
from saw.files import write_atomic
from saw.image.base_os import BaseOs
from saw.image.disk import ImageError, run

FILE = "packages.json"
"""The package set beside an image, and beside the cached tree that it was made of."""
SECURITY = "Debian-Security"
"""Label of the archive of security updates (its Release file), which apt shows with every version that comes from there."""
ASK_S = 600.0
"""Longest time that asking may take, the indices included."""
NAME = re.compile(r"[a-z0-9][a-z0-9+.-]*")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+:~-]*")
"""What Debian's policy allows (5.6.1, 5.6.12); such a name or version cannot be more than one field of a file."""
_PLANNED = re.compile(r"Inst (?P<name>\S+) (?:\[[^]]*\] )?\((?P<version>\S+) (?P<from>.*?) ?\[[a-z0-9-]+\]\)")
_AWAY_CURE = "look at the mirror and the network, or build with what is known: REUSE=1"


class IndexAway(ImageError):
    """The archive's indices cannot be had, or apt does not trust them."""

    code = "index_away"


class IndexOlder(ImageError):
    """The archive offers older versions than an image has: its mirror is behind, or somebody shows an old state."""

    code = "index_older"


class PackageSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every package that is installed, name → version; ``security`` names those whose version is in the security archive.

    ``asked`` is when the indices were asked, ``index`` the date of the newest of them (both RFC 3339).
    """

    suite: str
    asked: str
    index: str
    packages: dict[str, str]
    security: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        wrong = [name for name in self.packages if not NAME.fullmatch(name)]
        wrong += [version for version in self.packages.values() if not VERSION.fullmatch(version)]
        if wrong or not self.packages:
            raise ValueError(f"{wrong[0]!r} is no name or version of a package" if wrong else "it names no package")
        if datetime.fromisoformat(self.asked).tzinfo is None:
            raise ValueError(f"asked {self.asked!r} has no zone")

    @property
    def digest(self) -> str:
        """SHA-256 over the sorted names and versions."""
        return hashlib.sha256(
            "".join(f"{name}={self.packages[name]}\n" for name in sorted(self.packages)).encode()
        ).hexdigest()

    def note(self) -> dict[str, str]:
        """Return what the record of a build and its provenance say of this set."""
        return {"digest": self.digest, "asked": self.asked, "index": self.index, "count": str(len(self.packages))}

    def age(self, now: datetime) -> str:
        """Say how old this state is, in words."""
        days = max(0, (now - datetime.fromisoformat(self.asked)).days)
        return f"packages as of {self.asked[:10]} ({days} {'day' if days == 1 else 'days'} ago)"


class Change(msgspec.Struct, frozen=True):
    """One package whose version is another one; ``old`` or ``new`` is empty where one side does not have it."""

    name: str
    old: str
    new: str
    security: bool = False
    older: bool = False


@dataclass(frozen=True)
class Archive:
    """What the indices are asked of: sources (lines of a sources.list) and the suite whose essential packages count."""

    sources: tuple[str, ...]
    suite: str

    @property
    def name(self) -> str:
        """Name of the folder with apt's lists of these sources."""
        return f"apt-{self.suite}-{hashlib.sha256(chr(10).join(self.sources).encode()).hexdigest()[:12]}"


def read_set(path: Path) -> PackageSet:
    """Read a package set; raises :class:`ImageError` that names file, reason and cure."""
    try:
        return jsontext.decode(path.read_bytes(), kind=PackageSet)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror}", cure=f"name the {FILE} of an image") from error
    except msgspec.DecodeError as error:
        raise ImageError(f"{path} is no package set: {error}", cure=f"name the {FILE} of an image") from error


def write_set(path: Path, packages: PackageSet) -> None:
    """Write a package set, sorted, one field a line."""
    write_atomic(path, msgspec.json.format(msgspec.json.encode(packages, order="sorted")) + b"\n")


def ask(archive: Archive, base: BaseOs, wanted: Iterable[str], cache: Path, *, patience: float = ASK_S) -> PackageSet:
    """Ask the archive which versions a minimal tree with ``wanted`` would get now; raises :class:`IndexAway`.

    The indices have to be signed with the archive's key and in date, which apt verifies. It reads neither the sources nor the
    pins of this machine. An index that cannot be had is an error here, though apt would go on with an old one.
    """
    home = cache / archive.name
    new = not home.exists()
    try:
        return _asked(home, archive, base, wanted, patience)
    except BaseException:
        if new:  # half of the first lists are no use, and may be what fills the disk
            shutil.rmtree(home, ignore_errors=True)
        raise


def _asked(home: Path, archive: Archive, base: BaseOs, wanted: Iterable[str], patience: float) -> PackageSet:
    for name in ("lists/partial", "archives/partial", "none"):
        (home / name).mkdir(parents=True, exist_ok=True)
    (home / "status").touch()
    write_atomic(home / "sources.list", "\n".join(archive.sources) + "\n")
    options = _options(home)
    deadline = datetime.now(UTC).timestamp() + patience
    _apt([*options, "update"], patience)
    codename = f"?codename(^{re.escape(base.suite)}$)"
    # What the installer of the tree takes (minbase): essential and required packages of the suite, and apt.
    minimal = (f"?narrow({codename},?essential)", f"?narrow({codename},?priority(required))", "apt")
    left = max(1.0, deadline - datetime.now(UTC).timestamp())
    plan = _apt([*options, "--simulate", "install", *minimal, *sorted(wanted)], left)
    found = [match for line in plan.splitlines() if (match := _PLANNED.match(line))]
    security = tuple(sorted(match["name"] for match in found if f"{SECURITY}:" in match["from"]))
    packages = {match["name"]: match["version"] for match in found}
    try:
        return PackageSet(base.suite, _now(), _index_date(home / "lists"), packages, security)
    except ValueError as error:
        raise IndexAway(f"apt's plan for {base.suite} cannot be read: {error}", cure="report this") from error


def compare(old: PackageSet, new: PackageSet) -> list[Change]:
    """Return what ``new`` changes, by name. A security update is one whose new version is in the security archive."""
    found = []
    for name in sorted(old.packages.keys() | new.packages.keys()):
        before, after = old.packages.get(name, ""), new.packages.get(name, "")
        if before != after:
            lower = bool(before and after) and _lower(after, before)
            found.append(Change(name, before, after, bool(after) and not lower and name in new.security, lower))
    return found


def words(changes: list[Change]) -> str:
    """Say what changes: how many packages, how many of them are security updates, and some by name."""
    if not changes:
        return "no package is newer"
    newer = [one for one in changes if one.new and not one.older]
    security = [one for one in newer if one.security]
    others = ((sum(one.older for one in changes), "older"), (sum(not one.new for one in changes), "gone"))
    parts = [f"{_count(newer)} newer ({len(security) or 'none'} of them for security)"] if newer else []
    parts += [f"{number} {word}" for number, word in others if number]
    first = sorted(changes, key=lambda one: (not one.older, not one.security, not one.old, one.name))[:4]
    named = [f"{one.name} {one.old} → {one.new}" if one.old and one.new else one.name for one in first]
    more = f" and {len(changes) - len(first)} more" if len(changes) > len(first) else ""
    return f"{', '.join(parts)}: {', '.join(named)}{more}"


def refuse_older(changes: list[Change]) -> None:
    """Raise :class:`IndexOlder` where a package would be older than it is."""
    if any(one.older for one in changes):
        raise IndexOlder(
            f"the archive offers older packages than the newest image has: {words(changes)}",
            cure="see that the mirror is up to date; take them all the same with OLDER=1",
        )


def pins(packages: PackageSet, free: Iterable[str]) -> str:
    """Return preferences (apt_preferences(5)) with which apt can install ``packages`` and nothing else, but for ``free``."""
    words_of = [("*", "release *", -1), (" ".join(free), "release *", 500)]
    words_of += [(name, f"version {version}", 1001) for name, version in sorted(packages.packages.items())]
    return "".join(f"Package: {name}\nPin: {pin}\nPin-Priority: {value}\n\n" for name, pin, value in words_of)


def installed(status: str) -> dict[str, str]:
    """Return what a dpkg database (its file ``status``) says is installed, name → version."""
    found = {}
    for stanza in status.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in stanza.splitlines() if re.match(r"(Package|Status|Version): ", line)
        )
        if fields.get("Status", "").endswith(" installed"):
            found[fields["Package"]] = fields["Version"]
    return found


def _options(home: Path) -> list[str]:
    """Options of apt-get: a state of its own, nothing unsigned, no index that is older than it says; fails where one is away."""
    values = {
        "Dir::State": home, "Dir::State::lists": f"{home}/lists/", "Dir::State::status": home / "status",
        "Dir::State::extended_states": home / "extended_states", "Dir::Cache": home, "Dir::Cache::archives": f"{home}/archives/",
        "Dir::Etc::sourcelist": home / "sources.list", "Dir::Etc::sourceparts": f"{home}/none/",
        "Dir::Etc::preferences": "/dev/null", "Dir::Etc::preferencesparts": f"{home}/none/",
        "APT::Architectures": run("dpkg", "--print-architecture").strip(), "APT::Install-Recommends": "false",
        "APT::Install-Suggests": "false", "APT::Update::Error-Mode": "any", "Acquire::Languages": "none",
        "Acquire::AllowInsecureRepositories": "false", "Acquire::AllowWeakRepositories": "false",
        "Acquire::AllowDowngradeToInsecureRepositories": "false", "Acquire::Check-Valid-Until": "true",
        "Acquire::Check-Date": "true", "Acquire::Retries": 1, "Acquire::http::Timeout": 10, "Acquire::https::Timeout": 10,
    }  # fmt: skip
    return ["-q", *(word for name, value in values.items() for word in ("-o", f"{name}={value}"))]


def _apt(words_of: list[str], patience: float) -> str:
    try:
        done = subprocess.run(
            ["apt-get", *words_of], capture_output=True, text=True, check=False, timeout=patience, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise IndexAway("apt-get is not installed", cure="build on a Debian machine") from error
    except subprocess.TimeoutExpired as error:
        raise IndexAway(f"the archive did not answer within {patience:.0f} s", cure=_AWAY_CURE) from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        raise IndexAway(
            f"the archive cannot be asked: {' '.join(said[:3]) or done.stderr.strip()[-300:]}", cure=_AWAY_CURE
        )
    return done.stdout


def _index_date(lists: Path) -> str:
    """Return the date of the newest Release file that apt holds."""
    dates = [
        email.utils.parsedate_to_datetime(match[1])
        for path in lists.glob("*Release")
        if (match := re.search(r"^Date: (.+)$", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE))
    ]
    return max(dates).astimezone(UTC).isoformat(timespec="seconds") if dates else ""


def _lower(left: str, right: str) -> bool:
    """Whether version ``left`` is lower than ``right``, as dpkg orders them."""
    done = subprocess.run(["dpkg", "--compare-versions", left, "lt", right], check=False, capture_output=True)
    return done.returncode == 0


def _count(changes: list[Change]) -> str:
    return f"{len(changes)} {'package is' if len(changes) == 1 else 'packages are'}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
