"""The log of SFTP reads packets however the stream is cut, and refuses what is no SFTP."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.sessions.sftp import NotSftp, SftpLog

pytestmark = pytest.mark.control("ID-02")


def text(raw: bytes) -> bytes:
    return struct.pack(">I", len(raw)) + raw


def packet(kind: int, *parts: bytes) -> bytes:
    body = bytes([kind]) + b"".join(parts)
    return struct.pack(">I", len(body)) + body


def number(value: int) -> bytes:
    return struct.pack(">I", value)


ASKED = (
    packet(1, number(3))
    + packet(3, number(1), text(b"/data/up"), number(26), number(0))
    + packet(6, number(2), text(b"h1"), bytes(8), text(b"x" * 30_000))
    + packet(6, number(3), text(b"h1"), bytes(8), text(b"y" * 500))
    + packet(4, number(4), text(b"h1"))
    + packet(18, number(5), text(b"/data/up"), text(b"/data/\x1b[2Jnew"))
)


def log_of(cuts: list[int]) -> list[str]:
    log = SftpLog()
    log.asked(packet(1, number(3)))
    remarks: list[str] = []
    # The answer that opens the file comes before what is written to it.
    first = len(packet(1, number(3)) + packet(3, number(1), text(b"/data/up"), number(26), number(0)))
    remarks += log.asked(ASKED[len(packet(1, number(3))) : first])
    remarks += log.answered(packet(2, number(3)) + packet(102, number(1), text(b"h1")))
    rest, before = ASKED[first:], 0
    for cut in [*sorted(cuts), len(rest)]:
        remarks += log.asked(rest[before:cut])
        before = max(before, cut)
    return remarks


@given(st.lists(st.integers(0, 31_000), max_size=12))
def test_however_the_stream_is_cut_the_log_is_the_same(cuts: list[int]) -> None:
    assert log_of(cuts) == [
        "sftp file /data/up read 0 written 30500 bytes",
        "sftp rename /data/up /data/?[2Jnew",
    ]


def test_what_was_read_and_not_closed_is_told_at_the_end() -> None:
    log = SftpLog()
    log.asked(packet(3, number(7), text(b"/etc/hosts"), number(1), number(0)))
    log.answered(packet(102, number(7), text(b"h")))
    log.asked(packet(5, number(8), text(b"h"), bytes(8), number(100)))
    log.answered(packet(103, number(8), text(b"z" * 77)))
    assert log.finish() == ["sftp file /etc/hosts read 77 written 0 bytes (not closed)"]


@pytest.mark.parametrize(
    "raw",
    [
        b"uname -a; id\n",
        packet(99, number(1)),
        packet(3),
        packet(3, number(1), number(2**31)),
        b"\0\0\0\0\0",
        b"\xff" * 9,
    ],
    ids=["shell", "unknown", "cut", "long-name", "empty", "long"],
)
def test_what_is_no_sftp_is_refused(raw: bytes) -> None:
    with pytest.raises(NotSftp):
        SftpLog().asked(raw)
    with pytest.raises(NotSftp):
        SftpLog().answered(raw if raw[4:5] != b"\x03" else b"$ id\n")
    assert SftpLog().asked(ASKED[: len(packet(1, number(3)))]) == []


@given(st.binary(max_size=400))
def test_nothing_but_a_refusal_comes_of_any_bytes(raw: bytes) -> None:
    for feed in (SftpLog().asked, SftpLog().answered):
        try:
            feed(raw)
        except NotSftp:
            continue
