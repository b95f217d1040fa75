"""WebSockets through ring 1: which may be opened, and which frames a client may send on them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
import websocket_ends
from ring1_rig import GOVERNANCE, POLICY, PROXY, Rig, until
from websocket_ends import BINARY, CLOSE, PING, TEXT, VIOLATION, frame

HELLO = frame(TEXT, b"hello", masked=False).hex()
SECOND_REQUEST = b"GET /rooms/../admin HTTP/1.1\r\nhost: chat.example.com\r\n\r\n"


class Client:
    """A WebSocket of the sandbox."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.status = self.line()

    def line(self) -> str:
        return self._process.stdout.readline().strip()

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self._process.stdin.write(piece.hex() + "\n")
        self._process.stdin.flush()


@contextlib.contextmanager
def client(rig: Rig, url: str, *headers: str) -> Iterator[Client]:
    process = subprocess.Popen(
        [
            "ip",
            "netns",
            "exec",
            rig.sandbox,
            sys.executable,
            websocket_ends.__file__,
            PROXY,
            str(rig.ca_bundle),
            url,
            *headers,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield Client(process)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def opened(rig: Rig, count: int) -> websocket_ends.Stream:
    return until(lambda: len(rig.service.streams) > count and rig.service.streams[-1], "the WebSocket arrives")


@pytest.mark.control("RUN-01")
def test_a_websocket_of_the_policy_is_opened_and_carries_text_both_ways(rig: Rig) -> None:
    before = len(rig.service.streams)
    with client(rig, "wss://chat.example.com/rooms/1", "sec-websocket-extensions: permessage-deflate") as asked:
        assert asked.status == "101"
        assert asked.line() == HELLO
        stream = opened(rig, before)
        sent = frame(TEXT, b"a" * 70_000) + frame(PING, b"p") + frame(TEXT, b"b", final=False) + frame(0, b"c")
        asked.send(*(sent[place : place + 1] for place in range(40)), sent[40:])
        until(lambda: stream.data == sent, "what was sent arrives as it was")
    assert stream.header("sec-websocket-extensions") is None
    assert stream.header("host") == "chat.example.com"
    assert stream.header("x-saw-binary")
    assert [stream.header(name) for name in ("x-saw-frames", "x-saw-i-upgrade")] == [None, None]
    until(lambda: stream.ended, "the end at the service")


@pytest.mark.thorough
@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("url", "passes", "refused"),
    [
        ("wss://news.example.com/feed", frame(PING, b"p"), frame(TEXT, b"out")),
        ("wss://news.example.com/feed", b"", frame(BINARY, b"out")),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), frame(BINARY, b"out")),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), frame(0, b"no message was begun")),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in", final=False), frame(TEXT, b"a second one inside")),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), frame(TEXT, b"compressed", reserved=0x40)),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), frame(TEXT, b"not masked", masked=False)),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), frame(PING, b"x" * 126)),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), frame(11, b"a kind that nobody knows")),
        ("wss://chat.example.com/rooms/1", frame(TEXT, b"in"), b"\x81\xff" + b"\xff" * 12),
        ("wss://chat.example.com/rooms/1", b"", SECOND_REQUEST),
        ("wss://raw.example.com/any", frame(BINARY, b"in") + frame(TEXT, b"in"), frame(3, b"out")),
    ],
    ids=[
        "text on read-only", "binary on read-only", "binary", "continues nothing", "inside another", "compressed", "not masked",
        "long ping", "unknown kind", "longest", "second request", "reserved kind",
    ],
)  # fmt: skip
def test_the_first_frame_that_may_not_pass_ends_the_websocket_and_nothing_after_it_arrives(
    rig: Rig, url: str, passes: bytes, refused: bytes
) -> None:
    before = len(rig.service.streams)
    with client(rig, url) as asked:
        assert (asked.status, asked.line()) == ("101", HELLO)
        stream = opened(rig, before)
        asked.send(passes + refused + frame(TEXT, b"later"), frame(TEXT, b"still later"))
        assert asked.line() == frame(CLOSE, b"\x03\xf0", masked=False).hex()
        assert asked.line() == "end"
    assert stream.data == passes + VIOLATION


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("wss://chat.example.com/elsewhere", ()),
        ("wss://chat.example.com/rooms/%2e%2e/admin", ()),
        ("wss://python.example.com/rest", ()),
        ("wss://other.example.com:8443/", ()),
        ("wss://unlisted.example.com/", ()),
        ("wss://asks.example.com/", ()),
        ("wss://chat.example.com/rooms/1", ("x-http-method-override: POST",)),
    ],
)
def test_no_other_websocket_is_opened(rig: Rig, url: str, headers: tuple[str, ...]) -> None:
    before = len(rig.service.streams)
    with client(rig, url, *headers) as asked:
        assert asked.status == "403"
    assert len(rig.service.streams) == before


@pytest.mark.control("RUN-01")
def test_an_endpoint_for_websockets_takes_no_other_call(rig: Rig) -> None:
    script = (
        "import urllib.request as r\n"
        "try: print(r.urlopen('https://chat.example.com/rooms/1').status)\n"
        "except r.HTTPError as error: print(error.code)\n"
    )
    assert rig.inside(sys.executable, "-c", script).stdout.strip() == "403"
    with client(rig, "wss://chat.example.com/rooms/1") as asked:
        assert asked.status == "101"


@pytest.mark.control("RUN-01")
def test_a_websocket_ends_with_the_policy_that_allowed_it(rig: Rig) -> None:
    before = len(rig.service.streams)
    with client(rig, "wss://chat.example.com/rooms/1") as asked:
        assert (asked.status, asked.line()) == ("101", HELLO)
        stream = opened(rig, before)
        rig.activate(POLICY, GOVERNANCE + "\n", revision=2)
        assert asked.line() == "end"
        until(lambda: stream.ended, "the end at the service")
    with client(rig, "wss://chat.example.com/rooms/1") as asked:
        assert asked.status == "101"
