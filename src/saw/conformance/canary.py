"""A process of the host beside the target, of the target's user: what a sandbox must not see, read, trace or signal.

``python canary.py MARK KEY FOLDER…`` holds System V shared memory and a private file per folder with the mark, and writes a
line for every SIGURG that it gets. Standard library only; ends with its standard input.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path


def main(mark: str, key: int, places: list[str]) -> int:
    """Hold everything until standard input ends; everything is removed then."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.shmat.restype = ctypes.c_void_p
    handle = libc.shmget(key, 4096, 0o1600)
    if handle >= 0:
        address = libc.shmat(handle, None, 0)
        ctypes.memmove(address, mark.encode(), len(mark))
    files = [Path(place) / mark for place in places]
    for path in files:
        path.write_text(mark, encoding="ascii")
        path.chmod(0o600)
    signal.signal(signal.SIGURG, lambda *_: os.write(1, b"signal\n"))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(1, f"ready {os.getpid()}\n".encode())
    try:
        while os.read(0, 1):
            pass
    finally:
        for path in files:
            with contextlib.suppress(OSError):
                path.unlink()
        if handle >= 0:
            libc.shmctl(handle, 0, None)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
