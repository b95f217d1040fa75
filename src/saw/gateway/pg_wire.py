"""The messages of PostgreSQL that ring 2 reads and writes: the start of a session on both sides, and nothing after it.

Source: PostgreSQL's documentation, "Frontend/Backend Protocol", version 3.0. Everything is read with a bound, and whatever does
not have the one form that the documentation gives ends the session.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Literal

import msgspec

from saw.errors import SawError

MAX_START = 10_000
"""Longest first packet of a client (bytes; the server's own bound, MAX_STARTUP_PACKET_LENGTH)."""
MAX_MESSAGE = 64 * 1024
"""Longest message of a server before it is ready (bytes)."""
MAX_SETTINGS = 32
_LONGEST_VALUE = 512
VERSION = 3
CANCEL_CODE, SSL_CODE, GSS_CODE = 80877102, 80877103, 80877104
SSL_REQUEST = struct.pack("!ii", 8, SSL_CODE)
NOT_HERE = b"N"
"""The answer to a client that asks for TLS or GSS encryption: the way to ring 2 is encrypted already."""

SETTINGS = frozenset(
    {
        "application_name", "bytea_output", "client_encoding", "client_min_messages", "datestyle", "extra_float_digits",
        "idle_in_transaction_session_timeout", "intervalstyle", "lock_timeout", "search_path", "statement_timeout", "timezone",
        "default_transaction_isolation", "default_transaction_read_only",
    }
)  # fmt: skip
"""What a client may set when it starts a session, in lower case. All of it could be set by a statement afterwards."""

PROTOCOL_VIOLATION, WRONG_LOGIN, UNKNOWN_DATABASE = "08P01", "28000", "3D000"
NOT_SUPPORTED, TOO_MANY, CANNOT_CONNECT, GOING_DOWN, INTERNAL = "0A000", "53300", "08006", "57P01", "XX000"


class SessionRefused(SawError):
    """A session is not opened. ``sqlstate`` is told to the client (PostgreSQL's documentation, appendix A), with the message."""

    code = "session_refused"

    def __init__(self, sqlstate: str, message: str, *, cure: str = "") -> None:
        super().__init__(message, cure=cure)
        self.sqlstate = sqlstate


class Startup(msgspec.Struct, frozen=True):
    """How a client starts a session: as whom, where, and with which settings. ``unknown`` are extensions that are not spoken."""

    user: str
    database: str
    settings: tuple[tuple[str, str], ...]
    minor: int = 0
    unknown: tuple[str, ...] = ()


class CancelKey(msgspec.Struct, frozen=True):
    """What names a running session to whoever wants its statement cancelled: a process and a secret number (32 bits each)."""

    process: int
    secret: int


Encryption = Literal["ssl", "gss"]


def read_start(body: bytes) -> Startup | CancelKey | Encryption:
    """Return what a client's first packet, without its length, asks for; raise :class:`SessionRefused` for anything else."""
    if len(body) < 4 or len(body) > MAX_START - 4:
        raise _broken("the first packet is too short or too long")
    (code,) = struct.unpack_from("!I", body)
    if code in {SSL_CODE, GSS_CODE}:
        if len(body) != 4:
            raise _broken("a request for encryption has nothing behind it")
        return "ssl" if code == SSL_CODE else "gss"
    if code == CANCEL_CODE:
        if len(body) != 12:
            raise _broken("a request to cancel names one process and one secret")
        return CancelKey(*struct.unpack_from("!II", body, 4))
    if code >> 16 != VERSION:
        raise SessionRefused(NOT_SUPPORTED, f"protocol {code >> 16}.{code & 0xFFFF} is not spoken here; use version 3")
    return _startup(body[4:], code & 0xFFFF)


def _startup(body: bytes, minor: int) -> Startup:
    if not body.endswith(b"\0") or len(body) < 2:
        raise _broken("the list of parameters has no end")
    parts = body[:-1].split(b"\0")
    # Each name and each value has an end of its own, so the split leaves one empty part behind the last.
    if parts.pop() != b"" or len(parts) % 2 or len(parts) > 2 * MAX_SETTINGS:
        raise _broken("the list of parameters is not names with values, or too long")
    found: dict[str, str] = {}
    unknown: list[str] = []
    for raw_name, raw_value in zip(parts[::2], parts[1::2], strict=True):
        name, value = _text(raw_name), _text(raw_value)
        key = name.lower()
        if not name or key in found or name in unknown:
            raise _broken("a parameter has no name, or is there twice")
        if name.startswith("_pq_."):
            unknown.append(name)
        elif key in {"user", "database"} or key in SETTINGS:
            found[key] = value
        elif key == "replication" or value:
            raise SessionRefused(
                NOT_SUPPORTED, f"the parameter {name[:63]!r} may not be set when a session starts",
                cure="leave it out; most settings can be set by a statement",
            )  # fmt: skip
    user, database = found.pop("user", ""), found.pop("database", "")
    if not user:
        raise SessionRefused(WRONG_LOGIN, "the client names no user", cure="name the user that the policy gives")
    return Startup(user, database or user, tuple(found.items()), minor, tuple(unknown))


def _text(raw: bytes) -> str:
    if len(raw) > _LONGEST_VALUE:
        raise _broken(f"a parameter is longer than {_LONGEST_VALUE} bytes")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise _broken("a parameter is not UTF-8") from None
    if any(character < " " or character == "\x7f" for character in text):
        raise _broken("a parameter has a control character in it")
    return text


def _broken(why: str) -> SessionRefused:
    return SessionRefused(PROTOCOL_VIOLATION, why)


def startup_packet(user: str, database: str, settings: Iterable[tuple[str, str]]) -> bytes:
    """Return the packet that starts a session at a server, version 3.0."""
    parts = [part for pair in (("user", user), ("database", database), *settings) for part in pair]
    body = struct.pack("!I", VERSION << 16) + b"".join(part.encode() + b"\0" for part in parts) + b"\0"
    return struct.pack("!i", len(body) + 4) + body


def cancel_packet(key: CancelKey) -> bytes:
    """Return the packet that has a server cancel what a session runs."""
    return struct.pack("!iIII", 16, CANCEL_CODE, key.process, key.secret)


def message(kind: bytes, body: bytes) -> bytes:
    """Return a message of this kind (one byte)."""
    return kind + struct.pack("!i", len(body) + 4) + body


def fatal(sqlstate: str, text: str, hint: str = "") -> bytes:
    """Return an ErrorResponse that ends a session, in words that clients show."""
    fields = {"S": "FATAL", "V": "FATAL", "C": sqlstate, "M": text, **({"H": hint} if hint else {})}
    return message(b"E", b"".join(f"{name}{value}".encode() + b"\0" for name, value in fields.items()) + b"\0")


def negotiation(unknown: Iterable[str]) -> bytes:
    """Return the NegotiateProtocolVersion that answers a newer minor version, or extensions that are not spoken.

    The version in it is a full one, 3.0: libpq takes a bare minor version for one that is older than 3.0.
    """
    names = [name.encode() + b"\0" for name in unknown]
    return message(b"v", struct.pack("!ii", VERSION << 16, len(names)) + b"".join(names))


AUTHENTICATED = message(b"R", struct.pack("!i", 0))
"""AuthenticationOk: a client that came through both rings is asked for no password."""


def backend_key(key: CancelKey) -> bytes:
    """Return the BackendKeyData that tells a client how to name its session."""
    return message(b"K", struct.pack("!II", key.process, key.secret))


def read_backend_key(body: bytes) -> CancelKey:
    """Return what a server's BackendKeyData says; protocol 3.0 has exactly 8 bytes."""
    if len(body) != 8:
        raise SessionRefused(CANNOT_CONNECT, "the server names its process in a form that is not of protocol 3.0")
    return CancelKey(*struct.unpack("!II", body))


def error_fields(body: bytes) -> Mapping[str, str]:
    """Return the fields of a server's ErrorResponse by their letters; what cannot be read is left out."""
    fields = {}
    for part in body.split(b"\0")[:32]:
        if part:
            fields[part[:1].decode("latin-1")] = part[1:].decode("utf-8", "replace")
    return fields
