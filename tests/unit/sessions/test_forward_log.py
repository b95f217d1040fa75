"""The log of forwarded ports reads frames however the stream is cut, keeps no content, and refuses what is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.mux import MOST, Frame, Kind, NotForwarding, encode
from saw.sessions.forwarding import ForwardLog

pytestmark = pytest.mark.control("ID-02")
HELLO = Frame(Kind.HELLO, 0, b"\1")
ASKED = b"".join(
    encode(frame)
    for frame in (
        Frame(Kind.OPEN, 1),
        Frame(Kind.DATA, 1, b"GET /secret"),
        Frame(Kind.OPEN, 2),
        Frame(Kind.CREDIT, 1, b"\0\0\0\5"),
        Frame(Kind.END, 1),
        Frame(Kind.DATA, 2, bytes(9000)),
        Frame(Kind.RESET, 2),
        Frame(Kind.OPEN, 3),
    )
)
ANSWERED = b"".join(
    encode(frame) for frame in (HELLO, Frame(Kind.DATA, 1, b"hello"), Frame(Kind.END, 1), Frame(Kind.DATA, 2, b"late"))
)


@given(st.lists(st.integers(0, len(ASKED)), max_size=12))
def test_however_the_stream_is_cut_the_log_is_the_same(cuts: list[int]) -> None:
    log, remarks, before = ForwardLog(3000), [], 0
    for cut in [*sorted(cuts), len(ASKED)]:
        remarks += log.asked(ASKED[before:cut])
        before = cut
    remarks += log.answered(ANSWERED)
    assert remarks == [
        "forward port 3000 connection 1 opened",
        "forward port 3000 connection 2 opened",
        "forward port 3000 connection 2 ended: 9000 bytes in, 0 bytes out (cut)",
        "forward port 3000 connection 3 opened",
        "forward port 3000 connection 1 ended: 11 bytes in, 5 bytes out",
    ]
    assert log.finish() == ["forward port 3000 connection 3 ended: 0 bytes in, 0 bytes out (not ended)"]


def back(log: ForwardLog) -> None:
    log.asked(encode(Frame(Kind.OPEN, 1)))
    log.answered(encode(Frame(Kind.OPEN, 1)))


def many(log: ForwardLog) -> None:
    log.asked(b"".join(encode(Frame(Kind.OPEN, number + 1)) for number in range(2 * MOST + 1)))


WRONG: dict[str, Callable[[ForwardLog], object]] = {
    "text": lambda log: log.asked(b"GET / HTTP/1.1\r\n"),
    "text back": lambda log: log.answered(b"SSH-2.0-x\r\n"),
    "hello from the client": lambda log: log.asked(encode(HELLO)),
    "open from the workspace": lambda log: log.answered(encode(Frame(Kind.OPEN, 1))),
    "open from the workspace too": back,
    "unopened": lambda log: log.asked(encode(Frame(Kind.DATA, 1, b"x"))),
    "unopened back": lambda log: log.answered(encode(Frame(Kind.DATA, 1, b"x"))),
    "twice": lambda log: log.asked(encode(Frame(Kind.OPEN, 1)) * 2),
    "too many": many,
}


@pytest.mark.parametrize("name", sorted(WRONG))
def test_what_is_no_forwarding_is_refused(name: str) -> None:
    log = ForwardLog(3000)
    with pytest.raises(NotForwarding):
        WRONG[name](log)
    assert ForwardLog(3000).answered(encode(HELLO)) == []
