"""Run a function in a child process with private namespaces; what it makes there ends with it."""

from __future__ import annotations

import ctypes
import os
import pickle
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
NEWNS, NEWNET = 0x00020000, 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


def sh(*command: str) -> str:
    """Run a command and return what it printed; a failure shows its words."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


def _isolate(tmpfs: dict[str, str]) -> None:
    if _LIBC.unshare(NEWNS | NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    sh("mount", "--make-rprivate", "/")
    sh("mount", "-t", "sysfs", "sysfs", "/sys")
    sh("ip", "link", "set", "lo", "up")
    Path("/run/netns").mkdir(exist_ok=True)
    for place, size in {"/run/netns": "1m", **tmpfs}.items():
        sh("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place)


def private(function: Callable[[], T], *, tmpfs: dict[str, str] | None = None, uid: int | None = None) -> T:
    """Return ``function()``, run in a child with its own network and mounts, or as user ``uid`` without them.

    ``tmpfs`` maps directories to the size of a file system mounted there. What the function raises is raised here.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        answer: tuple[bool, Any]
        try:
            if uid is None:
                _isolate(tmpfs or {})
            else:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            answer = (True, function())
        except BaseException as error:  # noqa: BLE001 - handed to the parent
            answer = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        with os.fdopen(writer, "wb") as stream:
            pickle.dump(answer, stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        raw = stream.read()
    os.waitpid(child, 0)
    ok, value = pickle.loads(raw)  # noqa: S301 - written by our own child
    assert ok, value
    return value  # type: ignore[no-any-return]
