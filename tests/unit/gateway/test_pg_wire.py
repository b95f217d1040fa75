"""The start of a session of PostgreSQL, read strictly: what is taken and refused, and that nothing else comes of any bytes."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.gateway import pg_wire
from saw.gateway.pg_wire import CancelKey, SessionRefused, Startup, read_start, startup_packet

THREE = struct.pack("!I", 3 << 16)


def body(*pairs: tuple[str, str], version: bytes = THREE, end: bytes = b"\0") -> bytes:
    return version + b"".join(f"{name}\0{value}\0".encode() for name, value in pairs) + end


@pytest.mark.control("POL-04")
def test_a_start_is_read_as_the_documentation_gives_it() -> None:
    told = read_start(
        body(("user", "agent"), ("database", "orders"), ("application_name", "psql"), ("TimeZone", "UTC"))
    )
    assert told == Startup("agent", "orders", (("application_name", "psql"), ("timezone", "UTC")))
    assert read_start(body(("user", "agent"))) == Startup("agent", "agent", ())
    assert read_start(body(("user", "agent"), ("options", ""))) == Startup("agent", "agent", ())
    newer = read_start(body(("user", "a"), ("_pq_.x", "1"), version=struct.pack("!I", (3 << 16) + 2)))
    assert newer == Startup("a", "a", (), 2, ("_pq_.x",))
    assert read_start(struct.pack("!I", pg_wire.SSL_CODE)) == "ssl"
    assert read_start(struct.pack("!I", pg_wire.GSS_CODE)) == "gss"
    key = CancelKey(7, 2**32 - 1)
    assert read_start(pg_wire.cancel_packet(key)[4:]) == key


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    ("sent", "state"),
    [
        (b"", "08P01"),
        (THREE, "08P01"),
        (body(("user", "a"), end=b""), "08P01"),
        (body(("user", "a"), end=b"\0\0"), "08P01"),
        (body(("user", "a")) + b"x", "08P01"),
        (body(("user", "a"), ("user", "b")), "08P01"),
        (body(("user", "a"), ("USER", "b")), "08P01"),
        (body(("", "a")), "08P01"),
        (body(("user", "a\nb")), "08P01"),
        (THREE + b"user\0\xff\0\0", "08P01"),
        (body(("user", "a" * 513)), "08P01"),
        (body(("user", "a"), *((f"_pq_.{n}", "") for n in range(32))), "08P01"),
        (body(("user", "")), "28000"),
        (body(("database", "orders")), "28000"),
        (body(("user", "a"), ("replication", "false")), "0A000"),
        (body(("user", "a"), ("replication", "")), "0A000"),
        (body(("user", "a"), ("options", "-c x=y")), "0A000"),
        (body(("user", "a"), ("session_authorization", "postgres")), "0A000"),
        (body(("user", "a"), ("role", "postgres")), "0A000"),
        (body(("user", "a"), version=struct.pack("!I", 2 << 16)), "0A000"),
        (body(("user", "a"), version=struct.pack("!I", 4 << 16)), "0A000"),
        (struct.pack("!I", pg_wire.SSL_CODE) + b"x", "08P01"),
        (struct.pack("!II", pg_wire.CANCEL_CODE, 1), "08P01"),
        (struct.pack("!IIIB", pg_wire.CANCEL_CODE, 1, 2, 3), "08P01"),
        (body(("user", "a")) + b"\0" * 10_000, "08P01"),
    ],
)
def test_anything_else_is_refused(sent: bytes, state: str) -> None:
    with pytest.raises(SessionRefused) as refusal:
        read_start(sent)
    assert refusal.value.sqlstate == state


@pytest.mark.control("POL-04")
@given(st.one_of(st.binary(max_size=300), st.builds(lambda tail: THREE + b"user\0a\0" + tail, st.binary(max_size=300))))
def test_no_bytes_lead_to_anything_but_a_start_or_a_refusal(sent: bytes) -> None:
    try:
        found = read_start(sent)
    except SessionRefused:
        return
    if isinstance(found, Startup):
        # What is sent on says the same when it is read again, and nothing more.
        again = read_start(startup_packet(found.user, found.database, found.settings)[4:])
        assert again == Startup(found.user, found.database, found.settings)
        assert {name for name, _ in found.settings} <= pg_wire.SETTINGS
    else:
        assert found in {"ssl", "gss"} or isinstance(found, CancelKey)


def test_what_clients_are_told_is_in_their_own_form() -> None:
    told = pg_wire.fatal("28000", "no", "ask")
    assert told[:1] == b"E" and struct.unpack("!i", told[1:5])[0] == len(told) - 1
    assert pg_wire.error_fields(told[5:]) == {"S": "FATAL", "V": "FATAL", "C": "28000", "M": "no", "H": "ask"}
    assert pg_wire.negotiation(("_pq_.x",)) == b"v" + struct.pack("!iii", 19, 3 << 16, 1) + b"_pq_.x\0"
    key = CancelKey(5, 6)
    assert pg_wire.read_backend_key(pg_wire.backend_key(key)[5:]) == key
    with pytest.raises(SessionRefused, match=r"not of protocol 3\.0"):
        pg_wire.read_backend_key(b"\0" * 36)
