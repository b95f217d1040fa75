"""Attempts on files: secrets, controls of the kernel, places from which something would start again, links and descriptors."""

from __future__ import annotations

import errno
import os
import stat
import time

from saw.conformance.probe.core import NotPossible, Refused, attempt


@attempt("read")
def read(path: str, mark: str = "") -> str:
    """Read a file (its first 64 KiB must hold ``mark``), or list a directory."""
    if os.path.isdir(path) and not mark:
        found = os.listdir(path)
        if not found:
            raise NotPossible("the directory is empty")
        return f"{len(found)} entries"
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        content = os.read(handle, 65536)
    finally:
        os.close(handle)
    if mark and mark.encode() not in content:
        raise Refused("the file is another one here", reason="absent")
    return f"read {len(content)} bytes"


@attempt("first-process")
def first_process(name: str) -> str:
    """Read a file of process 1, which is the host's unless this is a PID namespace of our own."""
    if os.getuid() and os.stat("/proc/1").st_uid == os.getuid():
        raise Refused("process 1 is one of our own here", reason="own_namespace")
    return str(read(f"/proc/1/{name}"))


@attempt("open-write")
def open_write(path: str) -> str:
    """Open an existing file or device for writing, and write nothing."""
    os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
    return "opened for writing"


@attempt("create")
def create(path: str) -> str:
    """Create a file in a directory, and remove it again."""
    name = os.path.join(path, f"saw-probe-{os.getpid()}")
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(name)
    return "created and removed"


@attempt("fill")
def fill(path: str, size: int) -> str:
    """Take ``size`` bytes of a directory's file system, and give them back at once."""
    name = os.path.join(path, f"saw-probe-{os.getpid()}")
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.posix_fallocate(handle, 0, size)
    finally:
        os.close(handle)
        os.unlink(name)
    return f"{size} bytes were there"


@attempt("fill-inodes")
def fill_inodes(path: str, count: int, patience: float = 100.0) -> str:
    """Make ``count`` empty files in a directory, and remove them at once."""
    folder = os.path.join(path, f"saw-probe-files-{os.getpid()}")
    os.mkdir(folder, 0o700)
    made, end = 0, time.monotonic() + patience
    try:
        while made < count:
            if time.monotonic() > end:
                raise NotPossible(f"only {made} files were made within {patience} s")
            os.close(os.open(os.path.join(folder, str(made)), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            made += 1
    finally:
        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        os.rmdir(folder)
    return f"{count} files were there"


@attempt("persist")
def persist(path: str, home: bool = False) -> str:
    """Open for appending a file that would be read at a later start; what was missing is made, and removed again."""
    if home:
        base = os.environ.get("HOME") or os.path.expanduser("~")
        path = os.path.join(base, path)
    made: list[str] = []
    try:
        folder = os.path.dirname(path)
        missing = []
        while home and not os.path.isdir(folder):
            missing.append(folder)
            folder = os.path.dirname(folder)
        for name in reversed(missing):
            os.mkdir(name, 0o700)
            made.append(name)
        there = os.path.lexists(path)
        os.close(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        if not there:
            os.unlink(path)
        return "opened for appending" if there else "created and removed"
    finally:
        for name in reversed(made):
            os.rmdir(name)


@attempt("persist-around")
def persist_around(folder: str, path: str) -> str:
    """Move a directory of the home aside, make it anew with a file that would be read at a later start, and undo both."""
    base = os.environ.get("HOME") or os.path.expanduser("~")
    place, aside = os.path.join(base, folder), os.path.join(base, f".saw-probe-aside-{os.getpid()}")
    if not os.path.isdir(place):
        return str(persist(os.path.join(folder, path), home=True))
    os.rename(place, aside)
    try:
        os.mkdir(place, 0o700)
        try:
            return str(persist(os.path.join(place, path), home=True))
        finally:
            os.rmdir(place)
    finally:
        os.rename(aside, place)


@attempt("replace")
def replace(path: str) -> str:
    """Replace a file by itself, which needs the right to replace it and changes nothing."""
    os.lstat(path)
    os.rename(path, path)
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK):
        raise OSError(errno.EACCES, f"{folder} is not writable")
    return "could be replaced"


@attempt("through-link")
def through_link(path: str, kind: str) -> str:
    """Reach a file by a symbolic link or a hard link of our own."""
    name = f"/tmp/saw-probe-link-{os.getpid()}"
    (os.symlink if kind == "symbolic" else os.link)(path, name)
    try:
        handle = os.open(name, os.O_RDONLY)
        os.close(handle)
    finally:
        os.unlink(name)
    return f"opened through a {kind} link"


@attempt("link-race")
def link_race(path: str, rounds: int = 2000) -> str:
    """Open a name of ours while another process turns it from a file into a link to ``path`` and back."""
    name = f"/tmp/saw-probe-race-{os.getpid()}"
    wanted = os.stat(path) if os.path.exists(path) else None
    child = os.fork()
    if child == 0:
        while True:
            try:
                os.symlink(path, name + ".l")
                os.rename(name + ".l", name)
                os.close(os.open(name + ".f", os.O_WRONLY | os.O_CREAT, 0o600))
                os.rename(name + ".f", name)
            except OSError:
                pass
    last = OSError(errno.EACCES, "never opened")
    tries, opened, end = 0, 0, time.monotonic() + 10
    try:
        # On a busy machine the other process may not have begun: go on until the race was one.
        while (tries < rounds or not opened) and time.monotonic() < end:
            tries += 1
            try:
                handle = os.open(name, os.O_RDONLY)
            except OSError as error:
                if error.errno != errno.ENOENT:
                    last = error
                continue
            found = os.fstat(handle)
            os.close(handle)
            opened += 1
            if wanted is not None and (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return "opened the other file"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        for extra in ("", ".l", ".f"):
            if os.path.lexists(name + extra):
                os.unlink(name + extra)
    if wanted is None and last.errno == errno.EACCES and not opened:
        raise NotPossible("the file cannot be told apart here")
    raise last


@attempt("descriptors")
def descriptors(mark: str) -> str:
    """Find a descriptor that the starting process left open, and read the mark in its file."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if int(name) > 2 and mark.encode() in os.pread(int(name), 4096, 0):
                return f"read descriptor {name}"
        except OSError:
            continue
    raise Refused("none was left open", reason="closed")


@attempt("device-node")
def device_node(kind: str) -> str:
    """Make the node of a device, and remove it again."""
    name = f"/tmp/saw-probe-device-{os.getpid()}"
    mode, number = (stat.S_IFCHR, os.makedev(1, 1)) if kind == "memory" else (stat.S_IFBLK, os.makedev(8, 0))
    os.mknod(name, mode | 0o600, number)
    os.unlink(name)
    return "made"


@attempt("give-away")
def give_away(what: str) -> str:
    """Make a file of root's, or one that gives its owner's rights to whoever runs it as root."""
    name = f"/tmp/saw-probe-own-{os.getpid()}"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700))
    try:
        if what == "owner":
            os.chown(name, 0, 0)
        else:
            os.setxattr(name, "security.capability", bytes.fromhex("0100000200000000000000000000000000000000"))
    finally:
        os.unlink(name)
    return "changed"


@attempt("write-own")
def write_own(path: str) -> str:
    """Write, read and remove a file of our own."""
    name = os.path.join(path, f"saw-probe-twin-{os.getpid()}")
    with open(name, "w+", encoding="ascii") as stream:
        stream.write("kept")
        stream.seek(0)
        content = stream.read()
    os.rename(name, name + ".2")
    os.unlink(name + ".2")
    return content


@attempt("write-home")
def write_home() -> str:
    """Write, read and remove a file of our own in the home directory, or in the project when the home is not ours to write."""
    home = os.environ.get("HOME") or os.path.expanduser("~")
    try:
        return str(write_own(home))
    except OSError:
        return str(write_own(os.path.join(home, "project")))


@attempt("own-link")
def own_link(kind: str) -> str:
    """Read a file of our own through a link."""
    base = f"/tmp/saw-probe-twin-{os.getpid()}"
    with open(base, "w", encoding="ascii") as stream:
        stream.write("kept")
    try:
        (os.symlink if kind == "symbolic" else os.link)(base, base + ".l")
        with open(base + ".l", encoding="ascii") as stream:
            content = stream.read()
        os.unlink(base + ".l")
    finally:
        os.unlink(base)
    return content


@attempt("environment")
def environment(words: list[str]) -> str:
    """Look in our own environment for a value that a credential would have."""
    for name, value in os.environ.items():
        if any(value.startswith(word) for word in words):
            return f"{name} holds what looks like a credential"
    raise Refused("no value looks like a credential", reason="none_held")


@attempt("home-secret")
def home_secret(path: str) -> str:
    """Read a file of the home directory in which a credential usually lies; empty ones hold none."""
    full = os.path.join(os.environ.get("HOME") or os.path.expanduser("~"), path)
    with open(full, "rb") as stream:
        if not stream.read(16):
            raise Refused("the file is empty", reason="none_held")
    return f"read {path}"
