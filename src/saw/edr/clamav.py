"""Malware: ClamAV's ``clamscan`` over files that are new or changed, and over all of them when its signatures are.

``clamscan`` loads the signatures for each run and needs no daemon that keeps a gigabyte of them in memory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from saw.edr.config import Malware
from saw.edr.detection import Detection, EdrError, Now
from saw.edr.store import Store

SIGNATURES = (".cvd", ".cld", ".cdb", ".hdb", ".hsb", ".ldb", ".mdb", ".msb", ".ndb", ".yar", ".yara")
"""Endings of signature files."""
_VERDICT = re.compile(r"^(.+): (?:OK|Empty file|(\S+) FOUND)$")
"""What clamscan says of a file that it has looked at; of one that it could not read it says something else, or nothing."""
_BUILT = re.compile(rb"ClamAV-VDB:(\d{1,2} \w{3} \d{4} \d{2}-\d{2} [+-]\d{4}):")
_TIMEOUT = 6 * 3600.0
#: A file that changes while the list is made has its turn in the next scan too.
_OVERLAP_NS = 120 * 10**9


class Signatures(msgspec.Struct, frozen=True):
    """The signatures on this host: how many files, when the newest was made, and a mark that changes with them."""

    files: int
    newest: datetime | None
    mark: str


def signatures_of(folder: Path) -> Signatures:
    """Look at a database folder; the time of an official file is the one in its header, of others that of the file."""
    times: list[datetime] = []
    marks: list[str] = []
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix in SIGNATURES)
    except OSError:
        files = []
    for path in files:
        state = path.stat()
        times.append(_built(path) or datetime.fromtimestamp(state.st_mtime, UTC))
        marks.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
    return Signatures(len(files), max(times, default=None), "\n".join(marks))


def _built(path: Path) -> datetime | None:
    with path.open("rb") as stream:
        found = _BUILT.match(stream.read(512))
    if found is None:
        return None
    try:
        return datetime.strptime(found[1].decode(), "%d %b %Y %H-%M %z").astimezone(UTC)
    except ValueError:
        return None


class MalwareScan(msgspec.Struct, frozen=True):
    """What a scan found, how many files it was given, the notes to keep when its findings were written, what went wrong.

    Without notes the next scan begins where this one did.
    """

    detections: tuple[Detection, ...]
    files: int
    notes: dict[str, str]
    problems: tuple[str, ...] = ()


def scan_malware(config: Malware, store: Store, now: Now, *, everything: bool = False) -> MalwareScan:
    """Scan what changed since the last scan, or everything when the signatures did; raises :class:`EdrError`."""
    signatures = signatures_of(Path(config.database))
    if not signatures.files:
        raise EdrError(
            f"there are no signatures in {config.database}",
            cure="let freshclam fetch them, or name a folder that has them (docs/edr.md)",
        )
    started = now()
    since = 0
    if not everything and store.note("malware_signatures") == signatures.mark:
        since = int(store.note("malware_since") or 0)
    files = list(_changed(config.paths, since))
    detections, problem = _clamscan(config, files) if files else ([], "")
    if problem:
        return MalwareScan(tuple(detections), len(files), {}, (problem,))
    notes = {
        "malware_signatures": signatures.mark,
        "malware_since": str(int(started.timestamp() * 1e9) - _OVERLAP_NS),
        "malware_scan": started.astimezone(UTC).isoformat(),
    }
    return MalwareScan(tuple(detections), len(files), notes)


def _changed(roots: tuple[str, ...], since: int) -> Iterator[str]:
    """Yield regular files below ``roots`` whose inode changed after ``since`` (ns); the modification time anyone can set."""
    for root in roots:
        for folder, folders, names in os.walk(root):
            folders.sort()
            for name in sorted(names):
                path = os.path.join(folder, name)  # noqa: PTH118 - thousands of them
                try:
                    state = os.lstat(path)
                except OSError:
                    continue
                if stat.S_ISREG(state.st_mode) and state.st_size and state.st_ctime_ns > since:
                    yield path


def _clamscan(config: Malware, files: list[str]) -> tuple[list[Detection], str]:
    """Return what is found, and what could not be looked at (empty: nothing); raises :class:`EdrError` when nothing could."""
    with contextlib.ExitStack() as stack:
        lines: list[str] = []
        called: dict[str, str] = {}
        inherited: list[int] = []
        for path in files:
            entry = path
            if not path.isprintable():
                # A list of lines cannot hold such a name, so that the file goes by its open descriptor.
                try:
                    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno in {errno.EMFILE, errno.ENFILE}:
                        raise EdrError(
                            f"more files with unprintable names than can be open: {path!r}", cure="remove such files"
                        ) from error
                    continue
                stack.callback(os.close, descriptor)
                inherited.append(descriptor)
                entry = f"/proc/self/fd/{descriptor}"
                called[os.path.realpath(entry)] = called[entry] = path
            lines.append(entry)
        listing = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".list", encoding="utf-8"))
        listing.write("\n".join(lines) + "\n")
        listing.flush()
        command = [config.clamscan, f"--database={config.database}", "--no-summary", "--stdout"]
        try:
            done = subprocess.run(
                [*command, f"--file-list={listing.name}"],
                capture_output=True,
                encoding="utf-8",
                errors="surrogateescape",
                timeout=_TIMEOUT,
                check=False,
                stdin=subprocess.DEVNULL,
                pass_fds=inherited,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EdrError(f"{config.clamscan} did not run: {error}", cure="install the package clamav") from error
    seen: set[str] = set()
    found: list[Detection] = []
    said: list[str] = []
    for line in (done.stdout + done.stderr).splitlines():
        verdict = _VERDICT.match(line)
        if verdict is None:
            said.append(line)
            continue
        path = called.get(verdict[1], verdict[1])
        seen.add(path)
        if verdict[2]:
            found.append(_detection(path, verdict[2]))
    missed = [path for path in files if path not in seen and _is_file(path)]
    if not missed:
        return found, ""
    if not seen:
        raise EdrError(f"clamscan ended with {done.returncode}: {' '.join(said[-3:])}"[:500], cure="see saw edr scan")
    return found, f"{len(missed)} of {len(files)} files could not be looked at, the first is {missed[0]!r}"


def _is_file(path: str) -> bool:
    """Tell whether it is still there: files come and go during a scan."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _detection(path: str, signature: str) -> Detection:
    try:
        state = os.lstat(path)
        changed, owner = state.st_ctime_ns, state.st_uid
    except OSError:
        changed, owner = 0, -1
    return Detection(
        "malware",
        path,
        f"Malware ({signature})",
        f"malware|{path}|{signature}|{changed}",
        "critical",
        {"signature": signature, "owner_id": owner},
    )


__all__ = ["SIGNATURES", "MalwareScan", "Signatures", "scan_malware", "signatures_of"]
