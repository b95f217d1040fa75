"""The files that a change to the fleet is bound to: everything below the given folders, by content."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from saw.review.gate import BoundFile, GateRefused

MAX_FILES = 8192
"""Most files of one statement."""


def bound_files(roots: Iterable[tuple[Path, str]], exclude: Sequence[str]) -> tuple[BoundFile, ...]:
    """Return every file below ``roots``, sorted by the name that it is shown under.

    A root is a folder or a file, and what its names begin with (empty: nothing). A file or folder whose own name fits one of
    the patterns ``exclude`` (as in a shell) is left out. A link is bound by its target, which must lie below a root, so that its
    content is bound too. Raises :class:`GateRefused` for what cannot be bound, such as a link that leads out.
    """
    pairs = [(path.resolve(), shown) for path, shown in roots]
    found: dict[str, BoundFile] = {}
    for root, shown in pairs:
        for path in _below(root, exclude):
            relative = "" if path == root else path.relative_to(root).as_posix()
            name = "/".join(part for part in (shown, relative) if part) or path.name
            found[name] = _bound(path, name, [item for item, _ in pairs], exclude)
            if len(found) > MAX_FILES:
                raise GateRefused(
                    f"there are more than {MAX_FILES} files below {root}",
                    cure="name fewer paths, or exclude what is not run",
                )
    return tuple(found[name] for name in sorted(found))


def _below(root: Path, exclude: Sequence[str]) -> Iterator[Path]:
    """Yield the files and links below ``root``, not following links below it; ``root`` itself may be one file."""
    if not root.is_dir():
        yield root
        return
    for folder, folders, files in os.walk(root, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not _excluded(name, exclude))
        here = Path(folder)
        yield from (here / name for name in folders if (here / name).is_symlink())
        yield from (here / name for name in sorted(files) if not _excluded(name, exclude))


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)


def _bound(path: Path, name: str, roots: Sequence[Path], exclude: Sequence[str]) -> BoundFile:
    try:
        name.encode()
        found = path.lstat()
        if stat.S_ISLNK(found.st_mode):
            _require_inside(path, roots, exclude)
            return BoundFile(path=name, kind="link", sha256=hashlib.sha256(os.fsencode(path.readlink())).hexdigest())
        if not stat.S_ISREG(found.st_mode):
            raise GateRefused(f"{path} is neither a file nor a link", cure="remove it, or exclude it")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except UnicodeEncodeError as error:
        raise GateRefused("the name of a file is not valid Unicode", cure=f"rename {name!a}") from error
    except OSError as error:
        raise _unreadable(error) from error
    return BoundFile(path=name, kind="program" if found.st_mode & 0o111 else "file", sha256=digest)


def _require_inside(link: Path, roots: Sequence[Path], exclude: Sequence[str]) -> None:
    """A link whose target is bound nowhere would run what nobody was shown."""
    target = Path(os.path.realpath(link))
    for root in roots:
        base = Path(os.path.realpath(root))
        if target.is_relative_to(base) and not any(_excluded(part, exclude) for part in target.relative_to(base).parts):
            return
    raise GateRefused(
        f"the link {link} leads to {target}, which is not bound",
        cure="add its target to the paths, or exclude the link",
    )


def _unreadable(error: OSError) -> GateRefused:
    raise GateRefused(
        f"cannot read {error.filename}: {error.strerror}", cure="make it readable, or exclude it"
    ) from error
