"""The home directory of a sandbox: places that the agent must not change, and files that the bundle lays down there.

The home belongs to the agent, who may have put links anywhere in it: every component is opened without following them.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path, PurePosixPath

import msgspec

from saw import jsontext
from saw.files import write_atomic
from saw.policy.persistence import AGENT_FILES, START_FILES
from saw.runtime.sandbox import SandboxError, SandboxSpec

PLACED = Path("/var/lib/saw/sandbox/placed.json")
"""Which files of the home a bundle laid down: a JSON list of absolute paths, so that the next one can take them back."""


def protect_home(spec: SandboxSpec) -> list[str]:
    """Create the protected places of the home directory as root's (files 0644, directories 0755); return what changed.

    What the agent put at a protected place before is set aside under ``NAME.saw-replaced``.
    """
    if not spec.protected:
        return []
    ours = [(name, folder) for name, folder in spec.persistence.places() if f"{spec.home}/{name}" in spec.protected]
    return [f"{spec.home}/{name}" for name, directory in ours if _protect(spec, name, directory=directory)]


def place_files(spec: SandboxSpec, record: Path = PLACED) -> list[str]:
    """Write the files of the bundle below the home, and take back what an earlier bundle laid down; return what changed.

    A running sandbox holds these files as mount points; they are written in place, because a file that takes the place of a
    mount point undoes the mount. Raises :class:`SandboxError` when a place is not what it must be.
    """
    wanted = {f"{spec.home}/{name}": text for name, text in spec.persistence.files.items()}
    before = _recorded(record)
    if before != sorted(wanted):
        write_atomic(_folder(record), msgspec.json.encode(sorted({*before, *wanted})) + b"\n", mode=0o600)
    gone = [path for path in before if path not in wanted and _below_home(spec, path)]
    changed = [path for path in gone if _take_back(spec, path)]
    changed += [
        f"{spec.home}/{name}" for name, text in spec.persistence.files.items() if _write(spec, name, text.encode())
    ]
    if before != sorted(wanted):
        write_atomic(record, msgspec.json.encode(sorted(wanted)) + b"\n", mode=0o600)
    return changed


def make_below_home(spec: SandboxSpec, path: str) -> None:
    """Create a directory below the home as the agent's, with what is missing above it."""
    os.close(_walk(spec, list(Path(path).relative_to(spec.home).parts)))


def _folder(record: Path) -> Path:
    record.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    return record


def _recorded(record: Path) -> list[str]:
    try:
        return jsontext.decode(record.read_bytes(), kind=list[str])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError) as error:
        raise SandboxError(f"{record} cannot be read: {error}", cure="remove it; it is written anew") from error


def _below_home(spec: SandboxSpec, path: str) -> bool:
    """Tell whether a recorded path lies below the home; what the record says is not believed, since it outlives a restart."""
    place = PurePosixPath(path)
    return place.is_relative_to(spec.home) and str(place) != spec.home and ".." not in place.parts


def _open_directory(name: str, parent: int | None = None) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)


def _make(name: str, parent: int, owner: SandboxSpec | None) -> None:
    """Make a directory where there is nothing; root's without an ``owner``."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o755, dir_fd=parent)
        if owner is not None:
            os.chown(name, owner.uid, owner.gid, dir_fd=parent, follow_symlinks=False)


def _walk(spec: SandboxSpec, parts: list[str], *, make: bool = True) -> int:
    """Return a descriptor of home/parts, making missing directories unless told not to; raise when a component is a link.

    What is made belongs to whom the directory around it belongs to: the agent's in the home, root's in a protected place.
    """
    descriptor = _open_directory(spec.home)
    for depth, part in enumerate(parts):
        place = f"{spec.home}/{'/'.join(parts[: depth + 1])}"
        roots = any(PurePosixPath(place).is_relative_to(other) for other in spec.protected)
        try:
            if make:
                _make(part, descriptor, None if roots else spec)
            following = _open_directory(part, descriptor)
        except OSError as error:
            raise SandboxError(
                f"{spec.home}/{'/'.join(parts)} cannot be prepared: {error.strerror}",
                cure="remove the link or file there",
            ) from error
        finally:
            os.close(descriptor)
        descriptor = following
    return descriptor


def _protect(spec: SandboxSpec, name: str, *, directory: bool) -> bool:
    *parents, last = name.split("/")
    parent = _walk(spec, parents)
    try:
        try:
            found = os.stat(last, dir_fd=parent, follow_symlinks=False)
            right_kind = (
                stat.S_ISDIR(found.st_mode) if directory else stat.S_ISREG(found.st_mode) and found.st_nlink == 1
            )
            if right_kind and found.st_uid == 0 and not found.st_mode & 0o022:
                return False
            os.rename(last, f"{last}.saw-replaced", src_dir_fd=parent, dst_dir_fd=parent)
        except FileNotFoundError:
            pass
        if directory:
            os.mkdir(last, 0o755, dir_fd=parent)
        else:
            _create(parent, last, _nothing(name))
    except OSError as error:
        raise SandboxError(
            f"{spec.home}/{name} cannot be protected: {error.strerror}",
            cure=f"remove {name}.saw-replaced and try again",
        ) from error
    finally:
        os.close(parent)
    return True


def _nothing(name: str) -> bytes:
    """Return what a program reads as a file that says nothing: an empty object where it expects JSON."""
    return b"{}\n" if name.endswith(".json") else b""


def _create(parent: int, name: str, content: bytes) -> None:
    descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW, 0o644, dir_fd=parent)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        os.fchmod(descriptor, 0o644)


def _write(spec: SandboxSpec, name: str, content: bytes) -> bool:
    """Write a file of root's below the home; tell whether it had another content."""
    *parents, last = name.split("/")
    parent = _walk(spec, parents)
    try:
        try:
            descriptor = os.open(last, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        except FileNotFoundError:
            _create(parent, last, content)
            return True
        with os.fdopen(descriptor, "r+b") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != 0 or found.st_mode & 0o022:
                raise SandboxError(f"{spec.home}/{name} is not root's own file", cure="remove it and try again")
            if stream.read(len(content) + 1) == content:
                return False
            stream.seek(0)
            stream.write(content)
            stream.truncate()
    except OSError as error:
        raise SandboxError(
            f"{spec.home}/{name} cannot be written: {error.strerror}", cure="remove what is there"
        ) from error
    finally:
        os.close(parent)
    return True


def _take_back(spec: SandboxSpec, path: str) -> bool:
    """Undo a file that an earlier bundle laid down; tell whether it was there.

    Where a place stays protected it becomes an empty one. A place that is the agent's again, and was changed, is left alone.
    """
    name = str(PurePosixPath(path).relative_to(spec.home))
    if path in spec.protected and name in (*START_FILES, *AGENT_FILES):
        return _write(spec, name, _nothing(name))
    *parents, last = name.split("/")
    try:
        parent = _walk(spec, parents, make=False)
    except SandboxError:
        return False
    try:
        if os.stat(last, dir_fd=parent, follow_symlinks=False).st_uid != 0:
            return False
        os.unlink(last, dir_fd=parent)
    except (FileNotFoundError, IsADirectoryError):
        return False
    finally:
        os.close(parent)
    return True
