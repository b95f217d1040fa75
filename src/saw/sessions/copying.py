"""What ``saw cp`` copies from where to where, and the command line of OpenSSH's scp that does it.

scp speaks SFTP, which takes names as they are: no shell at the far end reads them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from saw.errors import SawError
from saw.sessions.ssh_client import host_options

_WORKSPACE = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
#: What SFTP's client would take for a pattern of names there, and the sign that keeps it from that.
_PATTERN = re.compile(r"([\\*?\[\]{}])")


class CopyRefused(SawError):
    """What is to be copied where makes no sense, or is not there."""

    code = "paths_refused"


class SourceMissing(CopyRefused):
    """There is no such file here."""

    code = "source_missing"


class TargetMissing(CopyRefused):
    """The folder that is copied into does not exist here."""

    code = "target_missing"


class FolderRefused(CopyRefused):
    """A folder was named, and only files were asked for."""

    code = "folder_without_r"


class NotCopied(SawError):
    """scp has ended with an error; something may have been copied."""

    code = "not_copied"


class SessionFailed(SawError):
    """The connection was refused or broke: what ``details`` has was said about it."""

    code = "session_failed"


class Copy(msgspec.Struct, frozen=True):
    """``sources`` are copied to ``target``: into ``workspace`` when ``up``, else out of it. Paths are as they were given."""

    workspace: str
    up: bool
    sources: tuple[str, ...]
    target: str


def plan(words: Sequence[str]) -> Copy:
    """Return what ``words`` (sources, then the target) ask for.

    A word with a colon and no slash before it is a path in the workspace whose id stands before the colon. Raises
    :class:`CopyRefused` unless one side is here and the other one in one workspace.
    """
    *sources, target = [_place(word) for word in words]
    there = {workspace for workspace, _ in (*sources, target) if workspace}
    if len(there) > 1:
        raise CopyRefused("a copy goes to or from one workspace", cure="copy to a folder here first, from there on")
    if not there:
        raise CopyRefused("no workspace is named", cure="write WORKSPACE:PATH for a path in one")
    into = bool(target[0])
    if any(bool(workspace) == into for workspace, _ in sources):
        raise CopyRefused("a copy has one side here and one in a workspace", cure="write ./NAME for a file here")
    return Copy(there.pop(), into, tuple(path for _, path in sources), target[1])


def _place(word: str) -> tuple[str, str]:
    """Return the workspace, empty for here, and the path of one argument."""
    before, colon, path = word.partition(":")
    if not colon or "/" in before:
        if not word:
            raise CopyRefused("a path is empty", cure="name a file or a folder")
        return "", word
    if not _WORKSPACE.fullmatch(before):
        raise CopyRefused(f"{before!r} is not a workspace id", cure=f"write ./{word} for a file here")
    return before, path or "."


def check_here(copy: Copy, *, recursive: bool) -> None:
    """Raise a :class:`CopyRefused` for what can be seen here already, before a session is opened."""
    if copy.up:
        for name in copy.sources:
            if not Path(name).exists():
                raise SourceMissing(f"there is no {name}", cure="check the path")
            if Path(name).is_dir() and not recursive:
                raise FolderRefused(f"{name} is a folder", cure="give -r to copy folders")
        return
    target = Path(copy.target)
    if target.is_dir():
        return
    if len(copy.sources) > 1 or copy.target.endswith("/"):
        raise TargetMissing(f"there is no folder {copy.target}", cure="make it first")
    if not target.parent.is_dir():
        raise TargetMissing(f"there is no folder {target.parent}", cure="make it first")


def scp_line(
    directory: Path, alias: str, user: str, address: tuple[str, int], copy: Copy, *, recursive: bool
) -> list[str]:
    """Return the command line of scp; the arguments are those of :func:`saw.sessions.ssh_client.ssh_line`.

    Names are literal on both sides: no pattern is filled in, and none is taken for an option or for another host.
    """
    host, port = address
    line = ["scp", "-s", "-F", "/dev/null", "-P", str(port)]
    if recursive:
        line.append("-r")
    options = {"HostName": host, "User": user, **host_options(directory, alias)}
    for name, value in options.items():
        line += ["-o", f"{name}={value}"]
    here = [copy.target] if not copy.up else list(copy.sources)
    here = [path if path.startswith("/") else f"./{path}" for path in here]
    if copy.up:
        return [*line, "--", *here, f"{copy.workspace}:{copy.target}"]
    return [*line, "--", *(f"{copy.workspace}:{_literal(path)}" for path in copy.sources), *here]


def _literal(path: str) -> str:
    return _PATTERN.sub(r"\\\1", path)


def arrives_at(source: str, target: str) -> Path:
    """Return where ``source`` of a workspace is here, once it was copied to ``target``."""
    into, name = Path(target), Path(os.path.normpath(source)).name
    return into / name if into.is_dir() and name != ".." else into


def files_at(path: str | Path, *, follow: bool = False) -> dict[str, tuple[int, int]]:
    """Return path → (size, when it was written last) of every file at or below ``path``.

    With ``follow`` what links to folders lead to counts too, as scp sends it; it must be known that none leads back.
    """
    top = Path(path)
    if not top.is_dir():
        return {str(top): _seen(top)} if top.is_file() else {}
    found = {}
    for folder, _, names in os.walk(top, followlinks=follow):
        for name in names:
            one = Path(folder, name)
            if one.is_file():
                found[str(one)] = _seen(one)
    return found


def _seen(path: Path) -> tuple[int, int]:
    told = path.stat()
    return told.st_size, told.st_mtime_ns
