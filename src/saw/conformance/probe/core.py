"""The frame of the probe: one child process per attempt, one line of JSON per case.

An attempt that returns was allowed. What it raises says how it was refused: ``OSError`` by the kernel, :class:`Refused` by an
answer that was read, :class:`NotPossible` when this place lacks what the attempt needs. Anything else is an error of the probe.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

Attempt = Callable[..., Any]
ATTEMPTS: dict[str, Attempt] = {}
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long
LONGEST = 600
"""Characters of a detail that are kept."""


class Refused(Exception):
    """The attempt was answered with a refusal: HTTP ``status``, and the machine-readable ``reason`` and ``layer`` in its body."""

    def __init__(self, detail: str, *, reason: str = "", status: int = 0, layer: str = "") -> None:
        super().__init__(detail)
        self.reason, self.status, self.layer = reason, status, layer


class NotPossible(Exception):
    """This place lacks what the attempt needs, so that neither refusal nor success would say anything."""


def attempt(name: str) -> Callable[[Attempt], Attempt]:
    """Register a function as the attempt ``name``."""

    def register(function: Attempt) -> Attempt:
        ATTEMPTS[name] = function
        return function

    return register


def syscall(number: int, *arguments: object) -> int:
    """Make one system call; raise ``OSError`` as it answers."""
    words = [
        ctypes.c_long(item) if isinstance(item, int) else item for item in arguments
    ]  # the seventh is on the stack
    answer = LIBC.syscall(ctypes.c_long(number), *words)
    if answer < 0:
        found = ctypes.get_errno()
        raise OSError(found, os.strerror(found))
    return int(answer)


def _timed_out(error: OSError) -> bool:
    return error.errno in (None, errno.ETIMEDOUT) and "timed out" in str(error)  # 3.9 has socket.timeout apart


def perform(case: dict[str, Any]) -> dict[str, Any]:
    """Make the attempt of ``case`` in this process and return what happened."""
    function = ATTEMPTS.get(case["attempt"])
    if function is None:
        return {"outcome": "error", "detail": f"this probe has no attempt {case['attempt']!r}"}
    try:
        detail = function(**case["arguments"])
    except Refused as error:
        told = {"reason": error.reason, "status": error.status, "layer": error.layer[:40]}
        return {"outcome": "refused", "detail": str(error), **told}
    except NotPossible as error:
        return {"outcome": "not_possible", "detail": str(error)}
    except OSError as error:
        name = "timeout" if _timed_out(error) else errno.errorcode.get(error.errno or 0, type(error).__name__)
        return {"outcome": "refused", "detail": str(error), "errno": name}
    except BaseException as error:
        return {"outcome": "error", "detail": f"{type(error).__name__}: {error}"}
    return {"outcome": "allowed", "detail": "" if detail is None else str(detail)}


def _child(case: dict[str, Any], writing: int) -> None:
    os.setsid()
    raw = json.dumps(perform(case)).encode()
    os.write(writing, raw[:60000])


def isolated(case: dict[str, Any]) -> dict[str, Any]:
    """Make the attempt in a child process, bounded by ``case["seconds"]``; nothing of it is left running."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            _child(case, writing)
        finally:
            os._exit(0)
    os.close(writing)
    deadline, raw = time.monotonic() + case["seconds"], b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reading], [], [], left)[0]:
            break
        piece = os.read(reading, 65536)
        if not piece:
            break
        raw += piece
        if raw.endswith(b"}"):
            break  # a descendant may hold the pipe open
    os.close(reading)
    ended = os.waitpid(child, 0 if raw else os.WNOHANG)
    for kill in (os.killpg, os.kill):
        try:
            kill(child, signal.SIGKILL)
        except OSError:
            pass
    status = ended[1] if ended[0] else os.waitpid(child, 0)[1]
    if raw:
        return dict(json.loads(raw))
    if not ended[0] and time.monotonic() >= deadline:
        return {"outcome": "refused", "errno": "timeout", "detail": f"no end within {case['seconds']} s"}
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return {"outcome": "refused", "errno": f"signal:{name}", "detail": f"the process was ended by {name}"}
    return {"outcome": "error", "detail": "the attempt ended without an answer"}


def main(job: dict[str, Any]) -> None:
    """Make every attempt of ``job`` and write ``saw-probe:TOKEN {…}`` per case, then the same with ``{"end": n}``."""
    mark = f"saw-probe:{job['token']} "
    for case in job["cases"]:
        found = isolated(case)
        found["detail"] = str(found.get("detail", ""))[:LONGEST]
        sys.stdout.write(f"{mark}{json.dumps({'id': case['id'], **found})}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{mark}{json.dumps({'end': len(job['cases'])})}\n")
    sys.stdout.flush()
