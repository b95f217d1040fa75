"""Signs in at a PostgreSQL server in place of a client: TLS first, then SCRAM-SHA-256-PLUS (RFC 5802, 7677, 5929), nothing less.

The secret never leaves as such: the server gets a proof that counts for this TLS connection and this exchange alone, and has to
prove in turn that it knows the secret. A server that asks for the password itself, for an MD5 of it or for nothing is refused.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from scramp import ScramClient, ScramException

from saw.gateway import pg_wire
from saw.gateway.pg_wire import CANNOT_CONNECT, CancelKey, SessionRefused, error_fields, message

MECHANISM = "SCRAM-SHA-256-PLUS"
BINDING = "tls-server-end-point"
SIGN_IN_S = 15.0
"""Longest time until a server is ready (seconds)."""
MOST_ROUNDS = 100_000
"""Most rounds of stretching that a server may ask for. PostgreSQL's own are 4096 where nobody changed them; this many take
some tens of milliseconds, and millions would let a server keep the gatekeeper's processors busy."""
_STRETCHERS = ThreadPoolExecutor(2, thread_name_prefix="saw-scram")
"""Where keys are stretched: a thread that is given up works on, so these are not the threads that everything else shares."""
_MOST_MESSAGES = 256
_OK, _CLEARTEXT, _MD5, _SASL, _CONTINUE, _FINAL = 0, 3, 5, 10, 11, 12
_WHAT = {_CLEARTEXT: "the password itself", _MD5: "an MD5 of the password"}
_SQLSTATE = re.compile(r"[0-9A-Z]{5}\Z")

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Login(msgspec.Struct, frozen=True):
    """As whom ring 2 signs in, and where; ``secret`` is never logged, and ``repr`` does not show it."""

    credential: str
    user: str
    databases: tuple[str, ...]
    secret: str

    def __repr__(self) -> str:
        return f"Login({self.credential!r}, {self.user!r})"


class Ready(msgspec.Struct, frozen=True):
    """A server that waits for statements: what it said of itself until then, and how its process is named."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    said: bytes
    key: CancelKey | None


async def dial(address: str, host: str, ca_file: Path) -> Streams:
    """Return a TLS connection to the server at ``address`` (``ip:port``), whose certificate is checked for ``host``."""
    ip, _, port = address.rpartition(":")
    context = await asyncio.to_thread(ssl.create_default_context, cafile=str(ca_file))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ip.startswith("[") else socket.AF_INET
    raw = socket.socket(family, socket.SOCK_STREAM)
    try:
        raw.setblocking(False)
        await loop.sock_connect(raw, (ip.strip("[]"), int(port)))
        await loop.sock_sendall(raw, pg_wire.SSL_REQUEST)
        # One byte and no more: what somebody sent behind it would be the first thing that TLS refuses.
        if await loop.sock_recv(raw, 1) != b"S":
            raise SessionRefused(CANNOT_CONNECT, "the server offers no TLS", cure="ask its owner to switch ssl on")
        return await asyncio.open_connection(sock=raw, ssl=context, server_hostname=host)
    except BaseException:
        raw.close()
        raise


async def sign_in(
    login: Login, start: pg_wire.Startup, address: str, host: str, ca_file: Path, *, seconds: float = SIGN_IN_S
) -> Ready:
    """Return the server once it is ready for the client of ``start``; raise :class:`SessionRefused` where it never is."""
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(seconds):
            reader, writer = await dial(address, host, ca_file)
            writer.write(pg_wire.startup_packet(login.user, start.database, start.settings))
            await _prove(reader, writer, login)
            said, key = await _until_ready(reader)
            return Ready(reader, writer, said, key)
    except BaseException as error:
        if writer is not None:
            writer.transport.abort()
        if isinstance(error, TimeoutError):
            raise SessionRefused(CANNOT_CONNECT, "the server takes too long") from None
        if isinstance(error, ssl.SSLError):
            raise SessionRefused(CANNOT_CONNECT, "the server's certificate does not count") from None
        if isinstance(error, OSError | asyncio.IncompleteReadError):
            raise SessionRefused(CANNOT_CONNECT, "the server cannot be reached, or ends the connection") from None
        if isinstance(error, ScramException):
            raise SessionRefused(CANNOT_CONNECT, "the server does not prove that it knows the secret") from None
        raise


async def cancel(key: CancelKey, address: str, host: str, ca_file: Path) -> None:
    """Have the server cancel what a session runs; it never says whether it did."""
    async with asyncio.timeout(SIGN_IN_S):
        reader, writer = await dial(address, host, ca_file)
        try:
            writer.write(pg_wire.cancel_packet(key))
            await writer.drain()
            await reader.read(1)
        finally:
            writer.transport.abort()


async def read_message(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return kind and body of the server's next message."""
    head = await reader.readexactly(5)
    (length,) = struct.unpack("!i", head[1:])
    if not 4 <= length <= pg_wire.MAX_MESSAGE:
        raise SessionRefused(CANNOT_CONNECT, "the server sends a message that is too long, or none")
    return head[:1], await reader.readexactly(length - 4)


async def _prove(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, login: Login) -> None:
    """Sign in, and return once the server has proved itself and let us in."""
    client: ScramClient | None = None
    expected = _SASL
    for _ in range(_MOST_MESSAGES):
        kind, body = await read_message(reader)
        if kind == b"N":
            continue
        if kind == b"E":
            raise _refused_by_server(body)
        if kind != b"R" or len(body) < 4:
            raise SessionRefused(CANNOT_CONNECT, "the server says something else than how to sign in")
        (code,) = struct.unpack_from("!i", body)
        if code != expected:
            raise _wrong_way(code)
        told = body[4:]
        if code == _SASL:
            client = _client(told, writer, login)
            first = client.get_client_first().encode()
            answer = MECHANISM.encode() + b"\0" + struct.pack("!i", len(first)) + first
            writer.write(message(b"p", answer))
            expected = _CONTINUE
        elif code == _CONTINUE and client is not None:
            client.set_server_first(told.decode("utf-8", "replace"))
            if client.iterations.value > MOST_ROUNDS:
                raise SessionRefused(
                    CANNOT_CONNECT, f"the server asks for more than {MOST_ROUNDS} rounds",
                    cure="ask its owner for a lower scram_iterations, and to set the password anew",
                )  # fmt: skip
            # The key is stretched beside the decisions on other calls.
            final = await asyncio.get_running_loop().run_in_executor(_STRETCHERS, client.get_client_final)
            writer.write(message(b"p", final.encode()))
            expected = _FINAL
        elif code == _FINAL and client is not None:
            client.set_server_final(told.decode("utf-8", "replace"))
            expected = _OK
        else:
            return
    raise SessionRefused(CANNOT_CONNECT, "the server comes to no end")


def _client(offered: bytes, writer: asyncio.StreamWriter, login: Login) -> ScramClient:
    if MECHANISM.encode() not in offered.split(b"\0"):
        raise SessionRefused(
            CANNOT_CONNECT, f"the server does not offer {MECHANISM}",
            cure="ask its owner for password_encryption = scram-sha-256, TLS, and no pooler in between",
        )  # fmt: skip
    binding = (BINDING, writer.get_extra_info("ssl_object"))
    return ScramClient([MECHANISM], login.user, login.secret, channel_binding=binding)


def _wrong_way(code: int) -> SessionRefused:
    if code == _OK:
        why = "the server lets us in before it has proved that it knows the secret"
    else:
        why = f"the server asks for {_WHAT.get(code, f'another way to sign in ({code})')}"
    return SessionRefused(CANNOT_CONNECT, why, cure=f"ask its owner for {MECHANISM} in pg_hba.conf")


def _refused_by_server(body: bytes) -> SessionRefused:
    """Return what a client is told of a server's refusal: its code, and none of its words, which may name what is not its own."""
    state = error_fields(body).get("C", "")
    return SessionRefused(
        state if _SQLSTATE.match(state) else CANNOT_CONNECT, f"the server refuses the session ({state[:5] or 'no code'})",
        cure="ask the owner of the database, with this code",
    )  # fmt: skip


async def _until_ready(reader: asyncio.StreamReader) -> tuple[bytes, CancelKey | None]:
    """Return all that the server says until it is ready, without the name of its process, and that name."""
    said, key = b"", None
    for _ in range(_MOST_MESSAGES):
        kind, body = await read_message(reader)
        if kind == b"K":
            key = pg_wire.read_backend_key(body)
        elif kind == b"E":
            raise _refused_by_server(body)
        elif kind in {b"S", b"N"}:
            said += message(kind, body)
        elif kind == b"Z":
            return said + message(kind, body), key
        else:
            raise SessionRefused(CANNOT_CONNECT, "the server says something unexpected before it is ready")
        if len(said) > pg_wire.MAX_MESSAGE:
            raise SessionRefused(CANNOT_CONNECT, "the server says too much before it is ready")
    raise SessionRefused(CANNOT_CONNECT, "the server comes to no end")
