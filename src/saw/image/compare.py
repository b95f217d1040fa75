"""Compare two builds of the golden image: every file beside the image, and everything in the image's disk.

What may differ is data (``differences.yml``), with a reason for each. Everything else that differs is named, with how.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec

from saw.image.compare_disk import REST, Found, compare_disks
from saw.image.disk import ImageError, digest_of
from saw.strict_yaml import read_strict_yaml

ALLOWED = Path(__file__).with_name("differences.yml")
DISK = "image.qcow2"
_ABSENT = object()


class Allowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One place that may differ: where, in which ways, and why. ``*`` stands for the digest in a report's name."""

    where: str
    how: list[str]
    why: str


class AllowedList(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file ``differences.yml``."""

    allowed: list[Allowed]


class Difference(msgspec.Struct, frozen=True):
    """One place that differs, in which ways; ``allowed`` says why it may, and is empty for what may not."""

    where: str
    how: list[str]
    allowed: str = ""


class Comparison(msgspec.Struct, frozen=True):
    """What was compared, whether the disks hold the same bytes, and what differs."""

    a: str
    b: str
    identical: bool
    """Whether both disk images are the same file, bit by bit."""
    differences: list[Difference]

    @property
    def refused(self) -> list[Difference]:
        """Return what differs and may not."""
        return [one for one in self.differences if not one.allowed]


def allowed_list(path: Path = ALLOWED) -> list[Allowed]:
    """Read the list of what may differ; raise :class:`ConfigError`."""
    return read_strict_yaml(path, AllowedList, "list of allowed differences", "docs/images.md").allowed


def compare(a: Path, b: Path, allowed: list[Allowed] | None = None) -> Comparison:
    """Compare two image directories, or two disk images; raise :class:`ImageError` when one of them is neither."""
    if a.is_dir() != b.is_dir():
        raise ImageError(f"{a} and {b} are not of one kind", cure="name two image directories, or two disk images")
    disks = (a / DISK, b / DISK) if a.is_dir() else (a, b)
    for disk in disks:
        if not disk.is_file():
            raise ImageError(f"{disk} is no file", cure="name an image directory (build/images/…), or its image.qcow2")
    identical = digest_of(disks[0]) == digest_of(disks[1])
    found: Found = {} if identical else compare_disks(*disks) or {DISK: ["layout of the file"]}
    if a.is_dir():
        found |= _files(a, b)
    listed = allowed_list() if allowed is None else allowed
    return Comparison(str(a), str(b), identical, [_judged(where, how, listed) for where, how in sorted(found.items())])


def _judged(where: str, how: list[str], listed: list[Allowed]) -> Difference:
    """A place passes when all of how it differs is allowed there; a pointer stands for what lies below it, too."""
    for one in listed:
        if _named(one.where, where) and all(_covers(one.how, each) for each in how):
            return Difference(where, how, one.why)
    return Difference(where, how)


def _covers(allowed: list[str], how: str) -> bool:
    return any(_named(one, how) or (one.startswith("/") and how.startswith(f"{one}/")) for one in allowed)


def _named(listed: str, found: str) -> bool:
    """Tell whether ``listed`` is ``found``, where each ``*`` stands for a digest's first twelve digits."""
    return re.fullmatch(re.escape(listed).replace(r"\*", "[0-9a-f]{12}"), found) is not None


def _files(a: Path, b: Path) -> Found:
    names = [{str(path.relative_to(top)) for path in top.rglob("*") if not path.is_dir()} for top in (a, b)]
    found: Found = {}
    for name in sorted((names[0] | names[1]) - {DISK}):
        if name not in names[0] or name not in names[1]:
            found[name] = ["only in B" if name not in names[0] else "only in A"]
            continue
        one, other = ((top / name).read_bytes() for top in (a, b))
        if one != other:
            found[name] = _pointers(one, other) if name.endswith(".json") else ["content"]
    return found


def _pointers(one: bytes, other: bytes) -> list[str]:
    """Return the JSON pointers of what differs; how the text is written, when nothing that it says differs."""
    try:
        return sorted(_changed(json.loads(one), json.loads(other), "")) or [REST]
    except ValueError:
        return ["content"]


def _changed(one: Any, other: Any, at: str) -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = one.keys() | other.keys()
        pairs = [
            (key.replace("~", "~0").replace("/", "~1"), one.get(key, _ABSENT), other.get(key, _ABSENT)) for key in keys
        ]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(str(index), left, right) for index, (left, right) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if type(one) is type(other) and one == other else [at or "/"]
    return [found for key, left, right in pairs for found in _changed(left, right, f"{at}/{key}")]
