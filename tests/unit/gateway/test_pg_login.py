"""Ring 2 signs in at servers of PostgreSQL that lie, ask for too much or fall silent: none hears the password or is believed."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from saw.gateway import pg_wire
from saw.gateway.pg_login import MECHANISM, MOST_ROUNDS, Login, Ready, sign_in
from saw.gateway.pg_wire import SSL_REQUEST, SessionRefused, Startup, message
from saw.identity.x509 import Authority, new_key_and_csr

HOST, SECRET = "db.example.com", "s3cret-of-the-agent"
LOGIN = Login("orders-db", "agent", ("orders",), SECRET)
START = Startup("agent", "orders", (("application_name", "x"),))
READY = message(b"S", b"server_version\x0016\0") + message(b"K", struct.pack("!II", 1, 2)) + message(b"Z", b"I")
Script = Callable[["Far"], None]


def request(code: int, more: bytes = b"") -> bytes:
    return message(b"R", struct.pack("!i", code) + more)


class Far:
    """One connection of ring 2 at a server that does what its script says; ``heard`` is all that ring 2 said inside TLS."""

    def __init__(self, sock: ssl.SSLSocket, certificate: bytes) -> None:
        self.sock = sock
        self.certificate = certificate
        self.heard = b""
        self.nonce = base64.b64encode(b"n" * 18).decode()

    def take(self, count: int) -> bytes:
        found = b""
        while len(found) < count:
            data = self.sock.recv(count - len(found))
            if not data:
                raise ConnectionResetError
            found += data
        self.heard += found
        return found

    def start(self) -> bytes:
        (length,) = struct.unpack("!i", self.take(4))
        return self.take(length - 4)

    def answer(self) -> bytes:
        head = self.take(5)
        return self.take(struct.unpack("!i", head[1:])[0] - 4)

    def scram(self, *, iterations: int = 4096, lie: bool = False, password: str = SECRET) -> None:
        """Prove and have it proved (RFC 5802), with the binding of RFC 5929."""
        self.sock.sendall(request(10, f"{MECHANISM}\0SCRAM-SHA-256\0\0".encode()))
        first = self.answer().partition(b"p=")[2].decode()
        bare = first.split(",,")[1]
        nonce, salt = bare.split("r=")[1] + self.nonce, b"salt" * 4
        server_first = f"r={nonce},s={base64.b64encode(salt).decode()},i={iterations}"
        self.sock.sendall(request(11, server_first.encode()))
        final = self.answer().decode()
        without, _, proof = final.rpartition(",p=")
        binding = b"p=tls-server-end-point,," + hashlib.sha256(self.certificate).digest()
        assert without.startswith("c=" + base64.b64encode(binding).decode())
        salted = hashlib.pbkdf2_hmac("sha256", password.encode(), salt, iterations)
        client_key = hmac.digest(salted, b"Client Key", "sha256")
        told = f"{bare},{server_first},{without}".encode()
        signature = hmac.digest(hashlib.sha256(client_key).digest(), told, "sha256")
        assert base64.b64decode(proof) == bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
        own = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), told, "sha256")
        self.sock.sendall(request(12, b"v=" + base64.b64encode(b"x" * 32 if lie else own)))


class Server:
    """Takes connections of ring 2, one by one; ``script`` says what happens inside TLS."""

    def __init__(self, directory: Path) -> None:
        self.authority = Authority.create(directory / "ca", "corp.test", datetime.now(UTC))
        self.ca_file = directory / "ca" / "ca.pem"
        self._contexts = {name: self._context(directory, name) for name in (HOST, "other.example.com")}
        self.name, self.letter = HOST, b"S"
        self.script: Script = lambda _: None
        self.heard = b""
        self.over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _context(self, directory: Path, name: str) -> tuple[ssl.SSLContext, bytes]:
        key, csr = new_key_and_csr(name, (name,))
        pem = self.authority.issue_server(csr, [name], datetime.now(UTC))
        paths = directory / f"{name}.pem", directory / f"{name}.key"
        for path, content in zip(paths, (pem, key), strict=True):
            path.write_bytes(content)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*paths)
        return context, ssl.PEM_cert_to_DER_cert(
            pem.decode().split("-----END CERTIFICATE-----")[0] + "-----END CERTIFICATE-----"
        )

    def _serve(self) -> None:
        while True:
            try:
                raw, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), raw:
                self._one(raw)
            self.over.set()

    def _one(self, raw: socket.socket) -> None:
        assert raw.recv(8, socket.MSG_WAITALL) == SSL_REQUEST
        raw.sendall(self.letter)
        if self.letter[:1] != b"S":
            return
        context, certificate = self._contexts[self.name]
        with context.wrap_socket(raw, server_side=True) as sock:
            far = Far(sock, certificate)
            try:
                assert far.start() == pg_wire.startup_packet("agent", "orders", START.settings)[4:]
                self.script(far)
                sock.recv(1)
            finally:
                self.heard += far.heard

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("pg"))
    yield server
    server.close()


@pytest.fixture
def server(served: Server) -> Server:
    served.name, served.letter, served.heard = HOST, b"S", b""
    return served


def signed_in(server: Server, script: Script, seconds: float = 60.0) -> tuple[bytes, pg_wire.CancelKey | None]:
    server.script = script
    server.over.clear()

    async def run() -> tuple[bytes, pg_wire.CancelKey | None]:
        ready: Ready = await sign_in(LOGIN, START, server.address, HOST, server.ca_file, seconds=seconds)
        ready.writer.transport.abort()
        await asyncio.sleep(0)
        return ready.said, ready.key

    try:
        return asyncio.run(run())
    finally:
        # What it heard is known once its side is over.
        assert server.address.endswith(":1") or server.over.wait(60)


def good(far: Far) -> None:
    far.sock.sendall(message(b"N", b"SNOTICE\0\0"))
    far.scram()
    far.sock.sendall(request(0) + READY)


@pytest.mark.control("CRED-01")
def test_a_server_that_proves_itself_is_ready_and_never_hears_the_password(server: Server) -> None:
    said, key = signed_in(server, good)
    assert (said, key) == (message(b"S", b"server_version\x0016\0") + message(b"Z", b"I"), pg_wire.CancelKey(1, 2))
    assert SECRET.encode() not in server.heard
    assert SECRET not in repr(LOGIN)


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("rounds", [4096, MOST_ROUNDS])
def test_keys_are_stretched_as_often_as_a_server_may_ask_by_threads_of_their_own(server: Server, rounds: int) -> None:
    def script(far: Far) -> None:
        far.scram(iterations=rounds)
        far.sock.sendall(request(0) + READY)

    assert signed_in(server, script)[1] == pg_wire.CancelKey(1, 2)
    stretching = {thread.name for thread in threading.enumerate() if thread.name.startswith("saw-scram")}
    assert 1 <= len(stretching) <= 2


def after_proof(more: bytes) -> Script:
    def script(far: Far) -> None:
        far.scram()
        far.sock.sendall(more)

    return script


def saying(more: bytes) -> Script:
    return lambda far: far.sock.sendall(more)


def asking(rounds: int) -> Script:
    """Ask for so many rounds, and hear nothing any more."""

    def script(far: Far) -> None:
        far.sock.sendall(request(10, f"{MECHANISM}\0\0".encode()))
        nonce = far.answer().partition(b"r=")[2].decode() + far.nonce
        far.sock.sendall(request(11, f"r={nonce},s={base64.b64encode(b'salt' * 4).decode()},i={rounds}".encode()))
        assert far.sock.recv(1) == b""

    return script


LYING: dict[str, tuple[Script, str]] = {
    "cleartext": (saying(request(3)), "asks for the password itself"),
    "md5": (saying(request(5, b"salt")), "asks for an MD5 of the password"),
    "kerberos": (saying(request(7)), r"another way to sign in \(7\)"),
    "trust": (saying(request(0) + READY), "before it has proved"),
    "without binding": (saying(request(10, b"SCRAM-SHA-256\0\0")), "does not offer SCRAM-SHA-256-PLUS"),
    "a longer name": (saying(request(10, b"xSCRAM-SHA-256-PLUS\0\0")), "does not offer"),
    "a wrong proof": (lambda far: far.scram(lie=True), "does not prove"),
    "too few rounds": (lambda far: far.scram(iterations=1), "does not prove"),
    "too many rounds": (lambda far: far.scram(iterations=2_000_000_000), "does not prove"),
    "ten million rounds": (asking(10_000_000), "asks for more than 100000 rounds"),
    "one round too many": (asking(MOST_ROUNDS + 1), "asks for more than 100000 rounds"),
    "final without proof": (
        saying(request(10, f"{MECHANISM}\0\0".encode()) + request(0) + READY),
        "before it has proved",
    ),
    "cleartext afterwards": (saying(request(10, f"{MECHANISM}\0\0".encode()) + request(3)), "asks for the password"),
    "signs in twice": (after_proof(request(10, f"{MECHANISM}\0\0".encode())), "another way"),
    "data before it is ready": (after_proof(request(0) + message(b"D", b"\0\0")), "unexpected"),
    "asks again when ready": (after_proof(request(0) + request(3)), "unexpected"),
    "a long key": (after_proof(request(0) + message(b"K", b"\0" * 36)), "not of protocol 3.0"),
    "a message without end": (saying(b"R" + struct.pack("!i", 2**31 - 1)), "too long, or none"),
    "a message of no length": (saying(b"R" + struct.pack("!i", 3)), "too long, or none"),
    "notices without end": (saying(message(b"N", b"\0") * 300), "comes to no end"),
    "settings without end": (after_proof(request(0) + message(b"S", b"a\0b\0") * 300), "comes to no end"),
    "much before it is ready": (after_proof(request(0) + message(b"S", b"a" * 30_000) * 4), "too much"),
    "not a message": (saying(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "too long, or none"),
    "ends": (lambda far: far.sock.shutdown(socket.SHUT_RDWR), "cannot be reached, or ends"),
}


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("name", LYING)
def test_any_other_server_is_refused_and_hears_nothing(server: Server, name: str) -> None:
    script, says = LYING[name]
    with pytest.raises(SessionRefused, match=says) as refusal:
        signed_in(server, script)
    assert refusal.value.sqlstate == "08006"
    assert SECRET.encode() not in server.heard
    assert hashlib.md5(f"{SECRET}agent".encode(), usedforsecurity=False).hexdigest().encode() not in server.heard


@pytest.mark.control("CRED-01")
def test_what_the_server_refuses_is_told_by_its_code_alone(server: Server) -> None:
    script = saying(pg_wire.fatal("28P01", "password authentication failed for user secret-name"))
    with pytest.raises(SessionRefused) as refusal:
        signed_in(server, script)
    assert (refusal.value.sqlstate, "secret-name" in str(refusal.value)) == ("28P01", False)
    with pytest.raises(SessionRefused) as refusal:
        signed_in(server, saying(pg_wire.fatal("<b>x", "no")))
    assert refusal.value.sqlstate == "08006"
    with pytest.raises(SessionRefused) as refusal:
        signed_in(server, after_proof(pg_wire.fatal("53300", "too many")))
    assert refusal.value.sqlstate == "53300"


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("letter", "name", "says"),
    [
        (b"N", HOST, "offers no TLS"),
        (b"E", HOST, "offers no TLS"),
        (b"Sextra", HOST, "certificate does not count|cannot be reached"),
        (b"S", "other.example.com", "certificate does not count"),
    ],
    ids=["no TLS", "an error", "bytes before TLS", "another server's certificate"],
)
def test_nothing_is_said_without_tls_to_the_right_server(server: Server, letter: bytes, name: str, says: str) -> None:
    server.letter, server.name = letter, name
    with pytest.raises(SessionRefused, match=says):
        signed_in(server, good)
    assert server.heard == b""


@pytest.mark.control("CRED-01")
def test_a_certificate_of_another_authority_does_not_count(server: Server, tmp_path: Path) -> None:
    Authority.create(tmp_path / "stranger", "corp.test", datetime.now(UTC))
    trusted, server.ca_file = server.ca_file, tmp_path / "stranger" / "ca.pem"
    try:
        with pytest.raises(SessionRefused, match="certificate does not count"):
            signed_in(server, good)
    finally:
        server.ca_file = trusted


def test_a_server_that_falls_silent_or_is_not_there_is_given_up(server: Server) -> None:
    with pytest.raises(SessionRefused, match="takes too long"):
        signed_in(server, lambda _: None, seconds=0.5)
    address, server.address = server.address, "127.0.0.1:1"
    try:
        with pytest.raises(SessionRefused, match="cannot be reached"):
            signed_in(server, good)
    finally:
        server.address = address
