"""File integrity: AIDE's check against a database that is replaced by a reviewed step alone.

``saw edr integrity`` shows the differences and their digest. Accepting names that digest: AIDE then looks again and writes the
new database in one go, which takes the place of the old one only when the differences are still the ones that were seen.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import rfc8785

from saw import jsontext
from saw.edr.config import Integrity
from saw.edr.detection import Detection, EdrError
from saw.edr.packages import packages_of

_TIMEOUT = 2 * 3600.0
_DIFFERS = 7  # bits of the exit code: 1 added, 2 removed, 4 changed; anything above is an error (aide(1))


class Differences(msgspec.Struct, frozen=True):
    """Paths that were added, removed and changed since the database was made, with AIDE's words for what differs."""

    added: dict[str, str] = {}
    removed: dict[str, str] = {}
    changed: dict[str, str] = {}
    details: dict[str, Any] = {}

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical form, lower-case hex: what a reviewer names."""
        return hashlib.sha256(rfc8785.dumps(msgspec.to_builtins(self))).hexdigest()

    @property
    def count(self) -> int:
        """How many paths differ."""
        return len(self.added) + len(self.removed) + len(self.changed)

    def detections(self) -> list[Detection]:
        """Return one finding for each path; the same difference has the same key for ever."""
        ways = (("added", self.added), ("removed", self.removed), ("changed", self.changed))
        packages = packages_of([*self.added, *self.changed])
        return [
            self._detection(path, how, words, packages.get(path, ""))
            for how, paths in ways
            for path, words in sorted(paths.items())
        ]

    def _detection(self, path: str, how: str, words: str, package: str) -> Detection:
        mark = hashlib.sha256(rfc8785.dumps([words, self.details.get(path)])).hexdigest()
        return Detection(
            "system_file_changed",
            path,
            f"A system file was {how}" + (" by a package" if package else ""),
            f"system_file_changed|{path}|{how}|{mark}",
            "low" if package else "high",
            {"how": how, "what": words.strip(), "package": package},
        )


def check(config: Integrity) -> Differences:
    """Compare the host with the database; raises :class:`EdrError` when there is none or AIDE fails."""
    _there(config)
    return _run(config, "--check", [f"database_in=file:{config.database}"])


def initialise(config: Integrity) -> None:
    """Make the first database; raises :class:`EdrError` when there is one already."""
    database = Path(config.database)
    if database.exists():
        raise EdrError(
            f"there is a database already: {database}", cure="see saw edr integrity, and accept what it shows"
        )
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = _new(database)
    _run(config, "--init", [f"database_out=file:{new}"])
    _replace(new, database)


def accept(config: Integrity, digest: str) -> Differences:
    """Take the differences of ``digest`` into the database; raises :class:`EdrError` when they are others by now."""
    _there(config)
    database = Path(config.database)
    new = _new(database)
    try:
        found = _run(config, "--update", [f"database_in=file:{database}", f"database_out=file:{new}"])
        if found.digest != digest:
            raise EdrError(
                f"the differences are not those of {digest}: their digest is {found.digest}",
                cure="look at them again: saw edr integrity",
            )
        _replace(new, database)
    finally:
        new.unlink(missing_ok=True)
    return found


def _there(config: Integrity) -> None:
    if not Path(config.database).exists():
        raise EdrError(f"there is no database {config.database}", cure="make it: saw edr integrity --init")


def _new(database: Path) -> Path:
    new = database.with_suffix(".new")
    new.unlink(missing_ok=True)
    return new


def _replace(new: Path, database: Path) -> None:
    new.chmod(0o600)
    with new.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(new, database)


def _run(config: Integrity, verb: str, lines: list[str]) -> Differences:
    before = "\n".join(["report_format=json", "report_url=stdout", "gzip_dbout=no", *lines])
    command = [config.aide, f"--config={config.config}", f"--before={before}", verb]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EdrError(f"{config.aide} did not run: {error}", cure="install the package aide") from error
    if not 0 <= done.returncode <= _DIFFERS:
        said = " ".join(done.stderr.decode(errors="replace").split())
        raise EdrError(f"aide {verb} ended with {done.returncode}: {said}"[:600], cure=f"look at {config.config}")
    if verb == "--init":
        return Differences()
    try:
        return jsontext.decode(done.stdout.decode(errors="replace"), kind=Differences)
    except msgspec.DecodeError as error:
        raise EdrError(f"aide {verb} gave no report: {error}", cure="aide 0.18 or later is needed") from error


__all__ = ["Differences", "accept", "check", "initialise"]
