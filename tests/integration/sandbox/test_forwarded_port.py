"""A server of the agent's is reached from outside by its port, in the sandbox's real network; nothing else is."""

from __future__ import annotations

import socket
import subprocess
import sys
import time

import pytest

from conftest import PYTHON
from saw import mux
from saw.mux import Frame, Frames, Kind, encode

pytestmark = pytest.mark.control("NET-02")
SERVER = """
import socket, sys
listener = socket.create_server((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
while True:
    with listener.accept()[0] as client:
        client.sendall(b"hello from the agent")
"""
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10); print('through')"


@pytest.fixture
def server(networked, launch):
    """A server on port 3000 of the sandbox's loopback, confined as all that the agent starts is."""
    words = (PYTHON, "-m", "saw.runtime.launcher", "--launch", launch, "--", PYTHON, "-c", SERVER, "127.0.0.1", "3000")
    process = networked.start(*words, netns=True, user=True, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == "ready\n"
        yield networked
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def reach(machine, first_line: bytes) -> bytes:
    """What one connection through the service brings, as the unit starts it; empty when it was cut."""
    ours, theirs = socket.socketpair()
    process = machine.start(
        *("setpriv", "--reuid=2001", "--regid=2001", "--clear-groups"),
        *(sys.executable, "-m", "saw.cli.main", "sandbox", "forward-serve"),
        netns=True,
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    frames, found, deadline = Frames(), b"", time.monotonic() + 60
    try:
        ours.settimeout(60)
        ours.sendall(first_line + encode(Frame(Kind.OPEN, 1)))
        while piece := ours.recv(65536):
            for frame in frames.feed(piece):
                assert time.monotonic() < deadline
                if frame.kind is Kind.DATA:
                    found += frame.data
                if frame.kind in {Kind.END, Kind.RESET}:
                    return found
        return found
    finally:
        ours.close()
        process.wait(60)


def test_a_server_of_the_agent_is_reached_and_the_agent_itself_cannot(server, launch):
    assert reach(server, b"3000\n") == b"hello from the agent"
    inside = server.confined(launch, PYTHON, "-c", CONNECT, "127.0.0.1", "3000")
    assert "through" not in inside.stdout
    outside = server.run(PYTHON, "-c", CONNECT, "127.0.0.1", "3000")
    assert "through" not in outside.stdout, "the VM has another loopback"


@pytest.mark.parametrize(
    "line", [b"3001\n", b"3128\n", b"22\n", b"70000\n", b"\n", b"3000 \n", b"10.200.0.1:3000\n", b"03000\n"]
)
def test_another_port_or_no_port_reaches_nothing(server, line):
    assert reach(server, line) == b""
    assert reach(server, b"3000\n") == b"hello from the agent"


def test_the_protocol_is_the_one_that_the_command_line_speaks():
    assert encode(Frame(Kind.HELLO, 0, bytes([mux.VERSION]))) == b"\0\0\0\0\0\0\1\1"
