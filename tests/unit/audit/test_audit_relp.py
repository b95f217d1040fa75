"""The RELP client against a far end that answers as it is told: what was acknowledged counts, anything odd ends the session."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.audit import relp
from saw.audit.receiver import WINDOW, DeliveryError
from saw.audit.relp import Session

pytestmark = pytest.mark.control("P0-05")

OPEN = b"200 OK\nrelp_version=0\nrelp_software=x\ncommands=syslog"


class FarEnd:
    """Reads frames strictly and answers each by ``answer(number, command, data)``; None ends the connection."""

    def __init__(self, connection: socket.socket, answer, piece: int = 65_536) -> None:
        self.stream = connection.makefile("rb")
        self.connection, self.answer, self.piece = connection, answer, piece
        self.seen: list[tuple[int, bytes, bytes]] = []
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def word(self) -> tuple[bytes, bytes]:
        text = b""
        while (byte := self.stream.read(1)) not in (b" ", b"\n", b""):
            text += byte
        return text, byte

    def run(self) -> None:
        while True:
            number, end = self.word()
            if not end:
                break
            command, _ = self.word()
            size, end = self.word()
            data = self.stream.read(int(size)) if end == b" " else b""
            if end == b" ":
                assert self.stream.read(1) == b"\n"
            self.seen.append((int(number), command, data))
            said = self.answer(int(number), command, data)
            if said is None:
                break
            for start in range(0, len(said), self.piece):
                try:
                    self.connection.sendall(said[start : start + self.piece])
                except OSError:
                    return
        self.stream.close()
        self.connection.close()


def rsp(number: int, data: bytes = b"200 OK") -> bytes:
    return b"%d rsp %d %s\n" % (number, len(data), data)


def good(number: int, command: bytes, _data: bytes) -> bytes:
    return rsp(number, OPEN if command == b"open" else b"200 OK")


@contextmanager
def session(answer, piece: int = 65_536):
    near, far = socket.socketpair()
    near.settimeout(20)
    end = FarEnd(far, answer, piece)
    try:
        opened = Session(near, "siem:1")
        opened._begin()
        yield opened, end
    finally:
        near.close()
        end.thread.join(20)
        far.close()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=2 * WINDOW), st.integers(1, 40))
def test_every_message_arrives_whole_and_in_order_however_answers_are_cut(messages, piece) -> None:
    counts: list[int] = []
    with session(good, piece) as (opened, end):
        opened.deliver(messages, counts.append)
        opened.check()
    assert [data for _, command, data in end.seen if command == b"syslog"] == messages
    assert [number for number, _, _ in end.seen] == list(range(1, len(messages) + 2))
    assert counts == list(range(1, len(messages) + 1))


def test_no_more_than_a_window_is_under_way() -> None:
    silent = threading.Event()

    def slow(number: int, command: bytes, data: bytes) -> bytes | None:
        if number == WINDOW + 2:  # the open frame is number 1
            silent.set()
            return None
        return b"" if command == b"syslog" else good(number, command, data)

    with session(slow) as (opened, end):
        opened._connection.settimeout(0.05)
        with pytest.raises(DeliveryError):
            opened.deliver([b"x"] * (2 * WINDOW), lambda _: None)
    assert not silent.is_set()
    assert len(end.seen) == WINDOW + 1


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (None, "closed the connection"),
        (rsp(9), "sent rsp 9 where the answer to 4 was due"),
        (rsp(4, b"500 no room"), "refuses a message: 500 no room"),
        (rsp(4, b"2000"), "refuses a message"),
        (rsp(4, b""), "refuses a message"),
        (b"0 serverclose 0\n", "ended the session"),
        (b"4 rsp 6 200 OKx", "without its end"),
        (b"4 rsp 6\n", "without its end"),
        (b"4 rsp 999999 " + b"x" * 100, "answers with 999999 bytes"),
        (b"HTTP/1.1 400 Bad Request\r\n", "does not speak RELP"),
        (b"4 rsp " + b"1" * 60, "does not speak RELP"),
    ],
)
def test_an_answer_that_is_none_ends_the_session_and_what_was_acknowledged_before_stays(said, reason) -> None:
    counts: list[int] = []

    def answer(number: int, command: bytes, data: bytes) -> bytes | None:
        return said if number == 4 else good(number, command, data)

    with session(answer) as (opened, _), pytest.raises(DeliveryError, match=reason):
        opened.deliver([b"a", b"b", b"c"], counts.append)
    assert counts == [1, 2]
    with session(good) as (opened, _):
        opened.deliver([b"a", b"b", b"c"], counts.append)
    assert counts == [1, 2, 1, 2, 3]


@pytest.mark.parametrize(
    "offers", [b"200 OK", b"200 OK\nrelp_version=1\ncommands=syslog", b"200 OK\nrelp_version=0\ncommands=other"]
)
def test_a_receiver_that_takes_no_syslog_is_refused_at_the_start(offers) -> None:
    def answer(number: int, _command: bytes, _data: bytes) -> bytes:
        return rsp(number, offers)

    with pytest.raises(DeliveryError, match="does not take syslog"), session(answer):
        raise AssertionError("the session was opened")


def test_a_receiver_that_ends_the_session_while_nothing_is_sent_is_noticed() -> None:
    with session(good) as (opened, end):
        opened.check()
        end.connection.sendall(b"0 serverclose 0\n")
        with pytest.raises(DeliveryError, match="sent serverclose 0 unasked"):
            opened.check()


def test_numbers_go_round_behind_the_largest(monkeypatch) -> None:
    monkeypatch.setattr(relp, "_LAST_NUMBER", 5)
    with session(good) as (opened, end):
        opened.deliver([b"x"] * 7, lambda _: None)
    assert [number for number, _, _ in end.seen] == [1, 2, 3, 4, 5, 1, 2, 3]
