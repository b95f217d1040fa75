"""What uses an image on this machine. An image that something uses is never removed, and what cannot be read counts as a use.

Three things use one: the root disk of a VM, which reads from the image file as long as it exists (qcow2's backing file); a
release record, since whoever registered it may go back to the image, and its bills of materials are asked for as long as it is
in force; and whoever names it. Only the broker knows which records are in force; without it, each record counts, and one that it
does not know counts always.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from saw.image.disk import ImageError

RECORD = "release.json"
KEPT = 2
"""How many images of a kind are kept whether something uses them or not: the newest, and the one to go back to."""
VMS = "var/lib/saw/vms"
MACHINE = Path("/")
"""This machine's root: it may be a hypervisor itself."""
_MAGIC = b"QFI\xfb"
_LONGEST = 1023
"""qcow2: the backing file's name has at most 1023 bytes (QEMU's specification of the format)."""


class Image(msgspec.Struct, frozen=True):
    """What became of an image: kept, with every reason, or removed (no reason)."""

    name: str
    why: tuple[str, ...] = ()


def backing_of(disk: Path) -> str:
    """Return the backing file that the header of a qcow2 disk names, empty for none; raises :class:`ImageError`."""
    try:
        with disk.open("rb") as stream:
            head = stream.read(20)
            at, size = int.from_bytes(head[8:16], "big"), int.from_bytes(head[16:20], "big")
            if head[:4] != _MAGIC or len(head) < 20 or size > _LONGEST:
                raise ImageError(f"{disk} is no qcow2 disk", cure="finish or remove what was made there")
            if not at:
                return ""
            stream.seek(at)
            return stream.read(size).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ImageError(f"cannot read {disk}: {error}", cure="run this as root, and look at that disk") from error


def disks(build: Path) -> Iterator[Path]:
    """Yield the root disks of VMs: of light hosts below ``build``, and of this machine where it is a hypervisor itself.

    Raises :class:`ImageError` for a folder that cannot be looked into.
    """
    hosts = (host for place in _entries(build) for host in _entries(place / "hosts"))
    for state in (*(host / "root" / VMS for host in hosts), MACHINE / VMS):
        for folder in _entries(state):
            yield from (path for path in _entries(folder) if path.name.startswith("root.qcow2"))


def _entries(folder: Path) -> list[Path]:
    """Return what lies in a folder, sorted; nothing where it is none. What it may not read, it does not pass over."""
    try:
        with os.scandir(folder) as found:
            return sorted(folder / entry.name for entry in found)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise ImageError(
            f"cannot look for disks of VMs in {folder}: {error.strerror}",
            cure="run this as root, and look at that folder",
        ) from error


def by_disks(build: Path) -> dict[str, list[str]]:
    """Return the names of images that root disks read from, each with those disks; raises :class:`ImageError`."""
    found: dict[str, list[str]] = {}
    for disk in disks(build):
        backing = backing_of(disk)
        if backing:
            found.setdefault(Path(backing).parent.name, []).append(f"the root disk of {disk.parent.name} reads from it")
    return found


def uses_of(
    images: Iterable[Path], build: Path, *, in_force: Mapping[str, str] | None = None, registered: Collection[str] = ()
) -> dict[str, list[str]]:
    """Return what uses each image, by name; raises :class:`ImageError` when a disk cannot be read.

    ``in_force`` are the records that the broker says are in force, by name; None where it was not asked. ``registered`` are the
    names of all that it lists, in any state: a record of another name may be in force elsewhere, or wait for signatures.
    """
    reading = by_disks(build)
    found = {}
    for image in images:
        why = list(reading.get(image.name, ()))
        if in_force is None and (image / RECORD).exists():
            why.append("it has a release record, and the broker was not asked")
        elif in_force and image.name in in_force:
            why.append(in_force[image.name])
        elif in_force is not None and image.name not in registered and (image / RECORD).exists():
            why.append("it has a record that this broker does not know")
        found[image.name] = why
    return found


def prune(
    build: Path,
    names: list[str],
    say: Callable[[str], None],
    *,
    named: Iterable[str] = (),
    in_force: Mapping[str, str] | None = None,
    registered: Collection[str] = (),
    dry: bool = False,
) -> list[Image]:
    """Remove the images of one kind (``names``, the newest first) that nothing uses, but the newest two and those ``named``.

    What interrupted builds left goes too. Says what is kept because it is used, and returns what became of each. Raises
    :class:`ImageError`, and removes no image, when what uses them cannot be read.
    """
    folder = build / "images"
    if not dry:
        for unfinished in folder.glob(".workspace-*.partial"):
            shutil.rmtree(unfinished, ignore_errors=True)
    used = uses_of([folder / name for name in names], build, in_force=in_force, registered=registered)
    found = []
    for number, name in enumerate(names):
        ours = ["it is one of the newest"] if number < KEPT else []
        ours += ["it was named"] if name in set(named) else []
        found.append(Image(name, (*ours, *used[name])))
        if used[name] and not ours:
            say(f"  kept {name}: {'; '.join(used[name])}")
        elif not used[name] and not ours:
            say(f"  {'would remove' if dry else 'removing'} {name}: nothing uses it")
            if not dry:
                remove(folder / name)
    return found


def remove(image: Path) -> None:
    """Remove an image so that an interrupted removal leaves none that looks finished."""
    going = image.with_name(f".{image.name}.partial")
    shutil.rmtree(going, ignore_errors=True)
    image.rename(going)
    shutil.rmtree(going, ignore_errors=True)


__all__ = ["RECORD", "Image", "backing_of", "by_disks", "disks", "prune", "remove", "uses_of"]
