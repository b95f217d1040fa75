"""The kit against proxies that are no wall: what they let through is heard outside, and who refused is said."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

CASES = ("loopback", "loopback-short", "outside", "outside-number", "outside-hex", "outside-mapped", "metadata")


def connecting(client: socket.socket, authority: str) -> None:
    """Open whatever tunnel is asked for, as a proxy without a policy does, and carry one message each way."""
    host, _, port = authority.rpartition(":")
    if host.startswith("169.254."):
        client.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=20) as far:
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        far.sendall(client.recv(65536))
        client.sendall(far.recv(65536))


def refusing(client: socket.socket, authority: str) -> None:
    """Refuse as a perimeter would that the sandbox's own proxy passed everything on to."""
    body = json.dumps(
        {"error": "policy_denied", "layer": "ring2", "reason": "host_not_allowed", "detail": authority}
    ).encode()
    client.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))


@contextmanager
def proxy(answer: Callable[[socket.socket, str], None]) -> Iterator[str]:
    """Return the address of a proxy that answers each CONNECT with ``answer``."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(client: socket.socket) -> None:
            with client:
                try:
                    head = client.recv(65536).decode("latin-1")
                    answer(client, head.split(" ")[1])
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=serve, args=(client,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def words(address: str) -> list[str]:
    named = [word for name in CASES for word in ("--case", f"address.{name}")]
    return ["--target", f"cmd:env https_proxy={address}", "--recorder", "127.0.0.1", "--ours", "--allowed-url",
            "https://api.example.com/v1/x", *named]  # fmt: skip


@pytest.mark.control("NET-03")
def test_a_tunnel_that_a_proxy_opens_is_heard_at_the_address_in_whatever_form_it_was_asked(kit):
    if os.geteuid() != 0:
        pytest.skip("the recorder needs low ports")
    with proxy(connecting) as address:
        found = kit(*words(address))
    for name in CASES[:-1]:
        case = found.case(f"address.{name}")
        assert (case["result"], case["arrived"]) == ("allowed", True), case
    elsewhere = found.case("address.metadata")
    assert (elsewhere["result"], elsewhere["arrived"]) == ("wrong_reason", None)  # nobody listens there


@pytest.mark.control("NET-03")
def test_a_refusal_by_another_layer_is_a_refusal_and_is_said(kit):
    with proxy(refusing) as address:
        found = kit(*words(address))
    for name in CASES:
        case = found.case(f"address.{name}")
        assert (case["result"], case["reason_ok"], case["layer"], case["layer_ok"]) == ("refused", True, "ring2", False)
        assert case["expected_layer"].startswith("ring 1")
        assert case["arrived"] is (None if name == "metadata" else False)
    assert "~ address.loopback [NET-03] loopback: refused by ring2, expected of ring 1: destination" in found.text
