"""Interpreters that are started already: what plays run again and again begins with its imports made.

A module of Ansible is a program of some 0.3 s of which nearly all goes into starting Python and importing the same files. One
server of a test session has them imported; :func:`programs` gives a folder with ``python`` and ``saw`` that hand their files,
arguments, folder and environment to it, and it forks. All else is as it is: Ansible packs the module and sends it, and
``saw`` reads its arguments. What is not a module of Ansible from its standard input, or a command of ``saw``, is run by the
interpreter itself. Not for plays in namespaces of their own, and not where a play is killed with all that it started: what is
forked is below the server.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import marshal
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

#: What most of it imports. Nothing of Ansible's own side: it would take a module for a part of the controller.
IMPORTS = (
    "ansible.module_utils.basic",
    "ansible.module_utils.common.file",
    "ansible.module_utils._internal._ansiballz._loader",
    "zipfile",
    "saw.broker.client",
    "saw.cli.main",
    "saw.cli.policy",
    "saw.policy.bundle",
    "saw.policy.casefile",
    "saw.policy.loader",
    "saw.policy.matcher",
    "saw.policy.reach_html",
    "saw.policy.signers",
    "saw.policy.tuf_reach",
    "saw.policy.tuf_repository",
    "saw.policy.tuf_rings",
    "saw.policy.tuf_statements",
)

#: Takes 10 ms: neither site nor socket is imported. The answer is the exit status; without one, the server is gone.
CLIENT = """\
#!{python} -IS
import array, marshal, posix, sys
import _socket
way = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
way.connect({address!r})
mask = posix.umask(0o077)
said = marshal.dumps((sys.argv, posix.getcwd(), mask, dict(posix.environ)))
way.sendmsg([b"1"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))])
while said:
    said = said[way.send(said):]
way.shutdown(_socket.SHUT_WR)
status = way.recv(1)
posix._exit(status[0] if status else 70)
"""

_running: dict[str, Any] = {}


def programs() -> Path:
    """The folder of the programs; the server behind them starts with the first call and ends with this process."""
    if "folder" not in _running:
        folder = Path(tempfile.mkdtemp(prefix="saw-warm-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        address = str(folder / "socket")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(64)
        for name in ("python", "saw"):
            (folder / name).write_text(CLIENT.format(python=sys.executable, address=address))
            (folder / name).chmod(0o700)
        # The server ends when this end of its standard input is closed, however this process ends.
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())], stdin=subprocess.PIPE, pass_fds=[listener.fileno()]
        )
        listener.close()
        atexit.register(process.wait)
        assert process.stdin is not None
        atexit.register(process.stdin.close)
        _running["folder"] = folder
    found: Path = _running["folder"]
    return found


class Server:
    """Takes what the programs hand over, forks for each and tells them how it ended."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._children: dict[int, socket.socket] = {}
        self._path = os.environ.get("PYTHONPATH")

    def serve(self) -> None:
        """Until standard input ends."""
        told, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        with selectors.DefaultSelector() as waiting:
            for one in (0, told, self._listener):
                waiting.register(one, selectors.EVENT_READ)
            while True:
                for key, _ in waiting.select():
                    if key.fileobj == 0:
                        return
                    if key.fileobj == told:
                        os.read(told, 4096)
                        self._reap()
                    else:
                        self._take()

    def _reap(self) -> None:
        while self._children:
            child, status = os.waitpid(-1, os.WNOHANG)
            if not child:
                return
            with self._children.pop(child) as way:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):  # whoever asked has gone
                    way.send(bytes([code if code >= 0 else 128 - code]))

    def _take(self) -> None:
        way, _ = self._listener.accept()
        _, files, _, _ = socket.recv_fds(way, 1, 3)
        said = b"".join(iter(lambda: way.recv(65536), b""))
        child = os.fork()
        if child == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _become(files, marshal.loads(said), self._path)  # noqa: S302 - from our own program, on a private socket
        for file in files:
            os.close(file)
        self._children[child] = way


def _become(files: list[int], said: tuple[list[str], str, int, dict[bytes, bytes]], path: str | None) -> None:
    """Be the program that was asked for; does not return."""
    argv, folder, mask, environ = said
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 4096)
    os.chdir(folder)
    os.umask(mask)
    os.environb.clear()
    os.environb.update(environ)
    tempfile.tempdir = None
    saw = Path(argv[0]).name == "saw"
    if os.environ.get("PYTHONPATH") != path or (not saw and argv[1:] not in ([], ["-"])):
        name = [str(Path(sys.executable).with_name("saw"))] if saw else [sys.executable]
        os.execv(name[0], [*name, *argv[1:]])  # noqa: S606 - as it was asked for
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(kind(io.FileIO(number, mode, closefd=False)), encoding="utf-8", write_through=number == 2)
        for number, mode, kind in (
            (0, "r", io.BufferedReader),
            (1, "w", io.BufferedWriter),
            (2, "w", io.BufferedWriter),
        )
    )
    sys.argv = [str(Path(sys.executable).with_name("saw")), *argv[1:]] if saw else ["-"]
    os._exit(_run(saw))


def _run(saw: bool) -> int:
    code: Any = 0
    try:
        if saw:
            from saw.cli.main import main

            code = main()
        else:
            module = types.ModuleType("__main__")
            sys.modules["__main__"] = module
            exec(compile(sys.stdin.buffer.read(), "<stdin>", "exec"), module.__dict__)  # noqa: S102 - as an interpreter does
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001 - as an interpreter does
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    return (code or 0) & 0xFF


def main() -> None:
    """``warm.py DESCRIPTOR``: serve on a socket that listens."""
    import gc
    import importlib

    sys.path.pop(0)
    for name in IMPORTS:
        importlib.import_module(name)
    assert not any(name.startswith("ansible._internal") for name in sys.modules)
    gc.collect()
    gc.freeze()
    Server(socket.socket(fileno=int(sys.argv[1]))).serve()


if __name__ == "__main__":
    main()
