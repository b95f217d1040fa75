"""A real OpenSSH client on a terminal of its own, read and written by the event loop; its key goes with it."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from saw.errors import UnavailableError
from saw.files import write_private
from saw.sessions.ssh_client import ssh_line

READ_BYTES = 16 * 1024
_PREFIX = "term-"
_WINDOW = struct.Struct("HHHH")


class Size(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How large a terminal is, in characters."""

    columns: int
    rows: int


class Way(msgspec.Struct, frozen=True):
    """The bastion as this host reaches it: a numeric address, and by which address of this host."""

    host: str
    port: int
    user: str
    source: str


def way_to(host: str, port: int, user: str, source: str | None) -> Way:
    """Look the bastion up; ``source`` None finds out by which address of this host it is reached. Blocks.

    Raises :class:`UnavailableError` when there is no way.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: the kernel only chooses the way
            own = str(probe.getsockname()[0])
    except OSError as error:
        raise UnavailableError(
            f"the bastion {host} is not reached: {error.strerror or error}",
            cure="tell the operator: terminal.bastion of the broker, and the network of the control host",
        ) from error
    return Way(str(address[0]), port, user, source or own)


def prepare(directory: Path) -> None:
    """Make the private folder of all terminals, and remove what a broker that was killed has left in it."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise UnavailableError(f"{directory} is not a private folder of the broker", cure="remove it")
    for left in directory.glob(f"{_PREFIX}*"):
        shutil.rmtree(left)


class Key:
    """A new key in a private folder below ``directory``, for one connection. :meth:`remove` ends both."""

    def __init__(self, directory: Path) -> None:
        key = Ed25519PrivateKey.generate()
        try:
            self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=directory))
            write_private(self.folder / "key", key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        except OSError as error:
            raise UnavailableError(
                f"there is no room for keys in {directory}: {error.strerror}", cure="tell the operator"
            ) from error
        self.public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    def certified(self, certificate: str, host_ca: str) -> None:
        """Put beside the key what ssh needs."""
        write_private(self.folder / "key-cert.pub", certificate + "\n")
        write_private(self.folder / "known_hosts", f"@cert-authority * {host_ca}\n")

    def remove(self) -> None:
        """Remove the folder with everything in it."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Client:
    """A running ssh. Nothing of its output is read before somebody asks for it, so it waits when nobody does."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self._loop = asyncio.get_running_loop()

    @classmethod
    def start(cls, key: Key, way: Way, host_name: str, size: Size) -> Client:
        """Start ssh to the bastion. Called by the thread that outlives it: the kernel ends ssh with that thread."""
        line = ssh_line(key.folder, host_name, way.user, (way.host, way.port), (), terminal=True)
        line = [sys.executable, "-I", "-m", "saw.broker.terminal.child", str(key.folder), str(way.port), "--", *line]
        master, slave = os.openpty()
        try:
            _set_size(master, size)
            environment = {
                "PATH": "/usr/bin:/bin",
                "TERM": "xterm-256color",
                "HOME": str(key.folder),
                "LC_ALL": "C.UTF-8",
            }
            process = subprocess.Popen(
                line, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
            )
        except OSError as error:
            os.close(master)
            raise UnavailableError(
                f"ssh cannot be started: {error.strerror}", cure="install openssh-client on the control host"
            ) from error
        finally:
            os.close(slave)
        os.set_blocking(master, False)
        return cls(process, master)

    async def read(self) -> bytes:
        """Return what ssh shows next; empty when it has ended."""
        while True:
            try:
                return os.read(self._master, READ_BYTES)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except OSError as error:
                # A terminal whose other side is closed answers EIO.
                if error.errno != errno.EIO:
                    raise
                return b""

    async def write(self, data: bytes) -> None:
        """Type ``data``; return when all of it has been taken. What is typed into one that has ended is lost."""
        while data:
            try:
                data = data[os.write(self._master, data) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return

    def resize(self, size: Size) -> None:
        """Tell ssh how large the terminal is now."""
        _set_size(self._master, size)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGWINCH)

    def stop(self, patience_s: float = 0.0) -> int:
        """Give ssh ``patience_s`` to end, end it, and return its exit code (255 when it was ended). Blocks that long."""
        try:
            code = self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        if self._master >= 0:
            # Its number is somebody else's from here on.
            os.close(self._master)
            self._master = -1
        return code if code >= 0 else 255

    async def _ready(self, add: Callable[[int, Callable[[], None]], object], remove: Callable[[int], object]) -> None:
        waited = asyncio.Event()
        add(self._master, waited.set)
        try:
            await waited.wait()
        finally:
            remove(self._master)


def _set_size(descriptor: int, size: Size) -> None:
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, _WINDOW.pack(size.rows, size.columns, 0, 0))
