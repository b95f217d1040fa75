"""A server of PostgreSQL with TLS and SCRAM in a network namespace, and a way for clients to it through ring 2."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from postgres_rig import Server, memory

ROLE, DATABASE, PASSWORD = "agent", "orders", "s3cret-Of-The-Agent-0815"
UPGRADE = (
    b"GET / HTTP/1.1\r\nhost: %s\r\nconnection: upgrade\r\nupgrade: postgres\r\n"
    b"x-saw-ring1: allow\r\nx-saw-binary: %s\r\n\r\n"
)
Connect = Callable[[], socket.socket]


class Database(Server):
    """A server on ``address``:5432 in the namespace of ``rig``, which is asked by SCRAM over TLS and in no other way."""

    def __init__(self, directory: Path, within: Callable[[Callable[[], object]], object], address: str) -> None:
        super().__init__(directory)
        self._within = within
        self._address = address

    def open(self, certificate: Path, key: Path) -> None:
        """Start it, with one role and two databases."""
        for source, name in ((certificate, "server.crt"), (key, "server.key")):
            target = self.data / name
            shutil.copy(source, target)
            target.chmod(0o600)
            if os.getuid() == 0:
                owner = self.data.stat()
                os.chown(target, owner.st_uid, owner.st_gid)
        self.asks("scram-sha-256")
        self._within(lambda: self.start(listen_addresses=self._address, ssl="on"))
        with self.admin() as session:
            session.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'".encode())
            session.execute(f"CREATE DATABASE {DATABASE} OWNER {ROLE}".encode())
            session.execute(b"CREATE DATABASE other")

    def asks(self, how: str, kind: str = "hostssl") -> None:
        """Have the server ask clients of the network in another way from now on."""
        (self.data / "pg_hba.conf").write_text(f"local all all trust\n{kind} all all all {how}\n")
        if self.running:
            self.reload()

    def reload(self) -> None:
        """Have the server read its settings again."""
        with self.admin() as session:
            session.execute(b"SELECT pg_reload_conf()")


@contextmanager
def database(
    within: Callable[[Callable[[], object]], object], address: str, certificate: Path, key: Path
) -> Iterator[Database]:
    """A server, ended and removed afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="saw-db-", dir=memory()))
    directory.chmod(0o755)
    server = Database(directory, within, address)
    try:
        server.open(certificate, key)
        yield server
    finally:
        if server.running:
            server.stop("immediate")
        shutil.rmtree(directory)


class Door:
    """A Unix socket at which clients of PostgreSQL reach ring 2, as the helper in the sandbox gives it to them.

    ``connect`` returns a connection to ring 2. What ring 2 sends is kept in ``heard``, what clients send in ``spoken``.
    """

    def __init__(self, directory: Path, connect: Connect, host: str, binary: str = "/usr/bin/psql") -> None:
        self.directory = directory
        self.host, self.binary = host, binary
        self.heard = self.spoken = b""
        self.refused = b""
        self._connect = connect
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(directory / ".s.PGSQL.5432"))
        self._listener.listen(16)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def opened(self) -> tuple[socket.socket, bytes, bytes]:
        """Ask ring 2 for a session; return the connection, the status and what came behind the answer's head."""
        far = self._connect()
        far.sendall(UPGRADE % (self.host.encode(), self.binary.encode()))
        head = b""
        while b"\r\n\r\n" not in head:
            data = far.recv(65536)
            if not data:
                break
            head += data
        answer, _, rest = head.partition(b"\r\n\r\n")
        return far, answer.split(b" ")[1] if b" " in answer else b"", rest

    def _serve(self, client: socket.socket) -> None:
        with contextlib.closing(client), contextlib.suppress(OSError):
            far, status, rest = self.opened()
            if status != b"101":
                while data := far.recv(65536):
                    rest += data
                    if rest.endswith(b"}"):
                        break
                self.refused = rest
                far.close()
                return
            with contextlib.closing(far):
                self._back(rest, client)
                self._carry(far, client)

    def _carry(self, far: socket.socket, client: socket.socket) -> None:
        """Carry bytes until either side ends, in one thread: OpenSSL does not read and write one connection in two at once."""
        assert isinstance(far, ssl.SSLSocket)
        while True:
            ready = [far] if far.pending() else select.select([far, client], [], [])[0]
            if far in ready:
                far.setblocking(False)
                try:
                    data = far.recv(65536)
                except ssl.SSLWantReadError:  # a ticket of TLS, or a part of a record
                    pass
                else:
                    if not data:
                        return
                    self._back(data, client)
                finally:
                    far.setblocking(True)
            if client in ready:
                data = client.recv(65536)
                if not data:
                    return
                self.spoken += data
                far.sendall(data)

    def _back(self, data: bytes, client: socket.socket) -> None:
        self.heard += data
        client.sendall(data)

    def close(self) -> None:
        """Take no more clients."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
