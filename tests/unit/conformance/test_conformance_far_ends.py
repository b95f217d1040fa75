"""What the probe says of a proxy or a service that answers in its own way: nothing that came through counts as refused."""

from __future__ import annotations

import gzip
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from test_conformance_catalogue import run_probe

from saw.conformance import catalogue
from saw.conformance.probe import core, far
from saw.conformance.verdict import as_expected

CASES = {case.id: case for case in catalogue.attacks()}
SHOWN = b'{"host": "a.example", "x-api-key": "a"}'
LEAKED = b'{"authorization": "Bearer s3cret"}'


@contextmanager
def proxy(answer: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """Return the address of a proxy that treats each connection as ``answer`` does, which ends with the event."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.recv(65536)
                    answer(client, over)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        over.set()
        listener.shutdown(socket.SHUT_RDWR)


def silent(client: socket.socket, over: threading.Event) -> None:
    """Open the tunnel and say no more."""
    client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    over.wait(60)


def resetting(client: socket.socket, _: threading.Event) -> None:
    """End the connection with a reset."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def connected(monkeypatch: pytest.MonkeyPatch, address: str) -> core.Any:
    """Return what the probe says of a case that asks this proxy for a tunnel."""
    monkeypatch.setenv("https_proxy", address)
    arguments = {"authority": "unlisted.invalid:443", "mark": "saw-x"}
    case = {"id": "x", "attempt": "connect", "arguments": arguments, "seconds": CASES["address.unlisted"].seconds}
    return run_probe(sys.executable, case).told["x"]


def test_a_tunnel_that_opens_and_stays_silent_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(silent) as address:
        assert connected(monkeypatch, address).outcome == "allowed"


def test_a_proxy_that_resets_is_not_taken_for_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(resetting) as address:
        found = connected(monkeypatch, address)
    assert (found.outcome, found.reason, found.errno) == ("refused", "closed", "")


@pytest.mark.parametrize(
    ("layer", "right"),
    [("ring1", True), ("ring2", False), ("kernel", False), ("waf", None), ("ring 1", None), ("", None)],
)
def test_a_layer_that_nobody_knows_says_nothing(layer: str, right: bool | None) -> None:
    assert as_expected("ring 1: request", layer) is right


def answer(body: bytes, *headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "", ""]).encode() + body


def chunked(body: bytes) -> bytes:
    half = len(body) // 2
    return b"%x\r\n%s\r\n%X;more\r\n%s\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])


GZIP, CHUNKED = "Content-Encoding: gzip", "Transfer-Encoding: chunked"
FORMS = [
    pytest.param(answer, id="plain"),
    pytest.param(lambda body: answer(gzip.compress(body), GZIP), id="gzip"),
    pytest.param(lambda body: answer(chunked(body), CHUNKED), id="chunked"),
    pytest.param(lambda body: answer(chunked(gzip.compress(body)), GZIP, CHUNKED), id="chunked gzip"),
]
BROKEN = [
    pytest.param(answer(LEAKED, GZIP), id="no gzip"),
    pytest.param(answer(gzip.compress(LEAKED)[:-9], GZIP), id="half of gzip"),
    pytest.param(answer(chunked(LEAKED)[:-12], CHUNKED), id="half of the chunks"),
    pytest.param(answer(b"-1\r\nx", CHUNKED), id="no chunk"),
    pytest.param(answer(gzip.compress(LEAKED)[:10] + b"\xff" * 40, GZIP), id="damaged gzip"),
]


def asked(monkeypatch: pytest.MonkeyPatch, attempt: str, raw: bytes, **more: str) -> dict[str, core.Any]:
    """Return what ``attempt`` says of a service that answers with ``raw``."""
    monkeypatch.setattr(far, "ask", lambda *_: raw)
    arguments = {"authority": "a.example:443", "request": "", "sni": "a.example", **more}
    return core.perform({"attempt": attempt, "arguments": arguments})


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("form", FORMS)
def test_a_credential_that_comes_back_in_whatever_form_is_allowed_and_stars_are_refused(
    monkeypatch: pytest.MonkeyPatch, form: Callable[[bytes], bytes]
) -> None:
    assert asked(monkeypatch, "reflected", form(LEAKED))["outcome"] == "allowed"
    stars = asked(monkeypatch, "reflected", form(LEAKED.replace(b"s3cret", b"******")))
    assert (stars["outcome"], stars["reason"]) == ("refused", "redacted")


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("raw", BROKEN)
def test_an_answer_that_cannot_be_read_says_nothing(monkeypatch: pytest.MonkeyPatch, raw: bytes) -> None:
    for attempt, more in (("reflected", {}), ("one-header", {"name": "x-split"})):
        assert asked(monkeypatch, attempt, raw, **more)["outcome"] == "not_possible"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("shown", "outcome"),
    [
        (SHOWN, "refused"),
        (SHOWN.replace(b"}", b', "x-split": "1"}'), "allowed"),
        (b"Host: a.example\r\nX-Split: 1\r\n", "allowed"),
        (b"Host: a.example\r\n", "refused"),
        (b"welcome", "not_possible"),
        (b'{"host": "other.example"}', "not_possible"),
        (b"", "not_possible"),
    ],
)
def test_a_service_that_shows_no_header_proves_none_absent(
    monkeypatch: pytest.MonkeyPatch, form: Callable[[bytes], bytes], shown: bytes, outcome: str
) -> None:
    assert asked(monkeypatch, "one-header", form(shown), name="x-split")["outcome"] == outcome
