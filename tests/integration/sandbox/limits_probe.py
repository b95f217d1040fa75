"""What an agent does that wants more than it may have; prints JSON. Runs in the sandbox: standard library only.

limits_probe.py WHAT AMOUNT [PLACE]: ``memory`` (MiB), ``tasks``, ``files`` (descriptors), ``bytes`` (MiB in a file at PLACE),
``inodes`` (files at PLACE). The answer says how much there was and what stopped it; everything is given back at the end.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path


def memory(amount: int) -> int:
    held = []
    for count in range(amount):
        held.append(b"\1" * 1024**2)
        print(f"{count + 1} MiB", file=sys.stderr)
    return len(held)


def tasks(amount: int) -> tuple[int, str]:
    children: list[int] = []
    stopped = ""
    try:
        for _ in range(amount):
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            children.append(child)
    except OSError as error:
        stopped = errno.errorcode[error.errno or 0]
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return len(children), stopped


def files(amount: int) -> tuple[int, str]:
    held: list[int] = []
    stopped = ""
    try:
        for _ in range(amount):
            held.append(os.open("/dev/null", os.O_RDONLY))  # noqa: PERF401 - what is open counts when it ends
    except OSError as error:
        stopped = errno.errorcode[error.errno or 0]
    for handle in held:
        os.close(handle)
    return len(held), stopped


def content(amount: int, place: Path) -> tuple[int, str]:
    count, stopped = 0, ""
    try:
        with place.open("wb", buffering=0) as stream:
            for _ in range(amount * 16):
                count += stream.write(b"\1" * 65536)
    except OSError as error:
        stopped = errno.errorcode[error.errno or 0]
    place.unlink(missing_ok=True)
    return count // 1024**2, stopped


def inodes(amount: int, place: Path) -> tuple[int, str]:
    made: list[Path] = []
    stopped = ""
    try:
        for number in range(amount):
            path = place.with_name(f"{place.name}-{number}")
            path.touch()
            made.append(path)
    except OSError as error:
        stopped = errno.errorcode[error.errno or 0]
    for path in made:
        path.unlink()
    return len(made), stopped


def main(what: str, amount: int, place: str = "") -> None:
    if what == "memory":
        count, stopped = memory(amount), ""
    elif what in {"bytes", "inodes"}:
        count, stopped = {"bytes": content, "inodes": inodes}[what](amount, Path(place))
    else:
        count, stopped = {"tasks": tasks, "files": files}[what](amount)
    print(json.dumps({"count": count, "stopped": stopped}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
