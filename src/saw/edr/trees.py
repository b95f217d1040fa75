"""What is watched in the file system: units and cron jobs, the configuration of audit and EDR, and setuid files.

A look returns path → mark; two marks of one path are equal exactly when what counts of the file is. Times do not count.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

from saw.edr.detection import Detection, printable

MOST_FILES = 20_000
#: Below one start, so that whoever owns one folder cannot keep the watcher from the others.
MOST_BELOW = 5_000
_MOST_BYTES = 1 << 20
_UNIT = re.compile(r".+\.(service|timer|socket|path|mount|automount|target|slice|swap|conf)")
_CRON_NAME = re.compile(r"[A-Za-z0-9_-]+")
_CRON_FOLDER = re.compile(r"cron\.(d|hourly|daily|weekly|monthly|yearly)")
#: File systems that hold files of their own; the kernel's others hold no program that somebody put there.
_REAL = frozenset(
    {"btrfs", "ext2", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "ramfs", "vfat", "xfs", "zfs", "bcachefs"}
)


class Look(msgspec.Struct, frozen=True):
    """Marks by path, and whether there was more than may be looked at."""

    marks: dict[str, str]
    cut_off: bool = False


class Marks:
    """Makes marks, and reads a file again only when its inode says that it may have changed."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[tuple[int, ...], str]] = {}

    def look(self, patterns: tuple[str, ...], counts: Callable[[str], bool]) -> Look:
        """Look at all files that ``patterns`` name, or that lie below folders that they name, and that ``counts`` takes."""
        marks: dict[str, str] = {}
        seen = self._seen
        self._seen = {}
        cut_off = False
        for start in _starts(patterns):
            for number, path in enumerate(_below(start)):
                if number >= MOST_BELOW or len(marks) >= MOST_FILES:
                    cut_off = True
                    break
                if counts(path) and path not in marks and (mark := self._mark(path, seen)):
                    marks[path] = mark
        return Look(marks, cut_off)

    def _mark(self, path: str, seen: Mapping[str, tuple[tuple[int, ...], str]]) -> str:
        try:
            state = os.lstat(path)
            now = (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_mode)
            before = seen.get(path)
            mark = before[1] if before and before[0] == now else mark_of(path, state)
        except OSError:
            return ""
        if mark:
            self._seen[path] = (now, mark)
        return mark


def mark_of(path: str, state: os.stat_result) -> str:
    """Return what counts of a file: kind, mode, owner and content (its first MiB and its length), or where a link leads."""
    if stat.S_ISLNK(state.st_mode):
        return f"link {printable(str(Path(path).readlink()), 5000)}"
    if not stat.S_ISREG(state.st_mode):
        return ""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as stream:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return ""
        digest = hashlib.sha256(stream.read(_MOST_BYTES)).hexdigest()
    return f"file {stat.S_IMODE(state.st_mode):o} {state.st_uid}:{state.st_gid} {state.st_size} {digest}"


def starts_something(path: str) -> bool:
    """Whether systemd or cron would read a file of this name in this folder; notes and copies beside them do not count."""
    place = Path(path)
    if _CRON_FOLDER.fullmatch(place.parent.name):
        return bool(_CRON_NAME.fullmatch(place.name))
    if "systemd" in place.parts:
        return bool(_UNIT.fullmatch(place.name))
    return not place.name.startswith(".") and not place.name.endswith(("~", ".swp", ".dpkg-new", ".dpkg-tmp"))


def always(_path: str) -> bool:
    """Every file counts."""
    return True


def look_for_setuid(roots: tuple[str, ...], mounts: Mapping[str, bool] | None = None) -> Look:
    """Return all setuid and setgid files below ``roots``.

    File systems that are mounted below are followed where a setuid bit means something: not those of the kernel, and not those
    that are mounted ``nosuid``. ``mounts`` is mount point → whether to follow (default: this process's).
    """
    follow = follow_mounts() if mounts is None else mounts
    marks: dict[str, str] = {}
    waiting = list(roots)
    visited: set[tuple[int, int]] = set()
    while waiting:
        folder = waiting.pop()
        try:
            state = Path(folder).lstat()
            if (state.st_dev, state.st_ino) in visited:
                continue
            visited.add((state.st_dev, state.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    _setuid_entry(entry, follow, waiting, marks)
        except OSError:
            continue
        if len(marks) > MOST_FILES:
            return Look(marks, cut_off=True)
    return Look(marks)


def _setuid_entry(
    entry: os.DirEntry[str], follow: Mapping[str, bool], waiting: list[str], marks: dict[str, str]
) -> None:
    try:
        if entry.is_dir(follow_symlinks=False):
            if follow.get(entry.path, True):
                waiting.append(entry.path)
        elif entry.is_file(follow_symlinks=False):
            state = entry.stat(follow_symlinks=False)
            # setgid without the group's execute bit is mandatory locking, not a privilege
            if (
                state.st_mode & stat.S_ISUID
                or state.st_mode & (stat.S_ISGID | stat.S_IXGRP) == stat.S_ISGID | stat.S_IXGRP
            ):
                marks[entry.path] = f"{stat.S_IMODE(state.st_mode):o} {state.st_uid}:{state.st_gid}"
    except OSError:
        return


def follow_mounts(table: Path = Path("/proc/self/mountinfo")) -> dict[str, bool]:
    """Return mount point → whether setuid bits below it count."""
    found: dict[str, bool] = {}
    for line in table.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), words[4])
        found[point] = after.split()[0] in _REAL and "nosuid" not in words[5].split(",")
    return found


def _starts(patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        yield from sorted(Path("/").glob(pattern.lstrip("/")))


def _below(start: Path) -> Iterator[str]:
    if not start.is_dir():
        yield str(start)
        return
    for folder, folders, names in os.walk(start):
        folders.sort()
        # a link to a folder is a thing of its own: os.walk lists it as a folder and does not enter it
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*names, *links]):
            yield os.path.join(folder, name)  # noqa: PTH118 - thousands of them in each look


class Change(msgspec.Struct, frozen=True):
    """How a file differs from what was known: ``new``, ``changed`` or ``gone``."""

    path: str
    how: str
    mark: str | None


def compare(known: Mapping[str, str], now: Mapping[str, str]) -> list[Change]:
    """Return the differences, by path."""
    changes = [Change(path, "new", mark) for path, mark in now.items() if path not in known]
    changes += [Change(path, "changed", mark) for path, mark in now.items() if known.get(path, mark) != mark]
    changes += [Change(path, "gone", None) for path in known if path not in now]
    return sorted(changes, key=lambda change: change.path)


def persistence_of(change: Change, package: str) -> Detection | None:
    """Return the finding of a unit or cron job that is new or other than before; one that is gone starts nothing."""
    if change.how == "gone":
        return None
    return Detection(
        "persistence",
        change.path,
        "A unit or cron job is new" if change.how == "new" else "A unit or cron job was changed",
        f"persistence|{change.path}|{change.mark}",
        "low" if package else "high",
        {"how": change.how, "mark": change.mark, "package": package},
    )


def tampering_of(change: Change, package: str) -> Detection:
    """Return the finding of a change to the configuration of audit or EDR, its removal included."""
    return Detection(
        "tampering",
        change.path,
        f"The configuration of audit or EDR is {change.how}",
        f"tampering|{change.path}|{change.how}|{change.mark}",
        "low" if package else "critical",
        {"how": change.how, "mark": change.mark, "package": package},
    )


def setuid_of(change: Change, _package: str) -> Detection | None:
    """Return the finding of a setuid or setgid file that is new, or whose mode or owner changed."""
    if change.how == "gone":
        return None
    return Detection(
        "setuid_file",
        change.path,
        "A file runs with the rights of its owner or group",
        f"setuid_file|{change.path}|{change.mark}",
        "high",
        {"how": change.how, "mode_and_owner": change.mark},
    )


__all__ = [
    "Change",
    "Look",
    "Marks",
    "always",
    "compare",
    "follow_mounts",
    "look_for_setuid",
    "mark_of",
    "persistence_of",
    "setuid_of",
    "starts_something",
    "tampering_of",
]
