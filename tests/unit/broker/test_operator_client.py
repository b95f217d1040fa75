"""The operator's client and the way that ssh makes for it."""

from __future__ import annotations

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from saw.broker.client import BrokerContext, Context, OperatorClient, SshJump
from saw.errors import UnavailableError

SLOW_SSH = """#!{python}
import pathlib, socket, sys, time
local = next(word for word in sys.argv if ":/" in word).partition(":")[0]
way = socket.socket(socket.AF_UNIX)
way.bind(local)
time.sleep(0.5)  # what was bound does not take connections yet
way.listen(8)
while True:
    one, _ = way.accept()
    if one.recv(65536):
        one.sendall(b"HTTP/1.1 200 OK\\r\\ncontent-length: 11\\r\\nconnection: close\\r\\n\\r\\n{{\\"ok\\":true}}")
    one.close()
"""
SILENT_SSH = "#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n"
CONTEXT = Context(broker=BrokerContext(ssh=SshJump(host="control.example.com", user="root")))


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "ssh"
    program.write_text(SLOW_SSH.format(python=sys.executable))
    program.chmod(0o755)
    return program


@pytest.mark.usefixtures("ssh")
def test_a_way_that_is_bound_and_does_not_listen_yet_is_waited_for() -> None:
    assert OperatorClient(CONTEXT).request("GET", "/v1/workspaces") == {"ok": True}


def test_an_ssh_that_gives_up_is_told_in_its_own_words(ssh: Path) -> None:
    ssh.write_text(SILENT_SSH)
    with pytest.raises(UnavailableError, match="Permission denied"):
        OperatorClient(CONTEXT).request("GET", "/v1/workspaces")


def test_threads_that_call_through_one_client_do_not_end_each_others_way(tmp_path: Path) -> None:
    answer = b'HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\n{"ok":true}'
    client = OperatorClient(Context(broker=BrokerContext(socket=str(tmp_path / "broker.sock"))))
    with closing(socket.socket(socket.AF_UNIX)) as broker, ThreadPoolExecutor(2) as pool:
        broker.bind(str(tmp_path / "broker.sock"))
        broker.listen(8)
        broker.settimeout(60)
        calls, ways = [], []
        for _ in range(2):
            calls.append(pool.submit(client.request, "GET", "/v1/workspaces"))
            way, _address = broker.accept()
            way.settimeout(60)
            assert way.recv(65536)
            ways.append(way)
        ways[0].sendall(answer)
        assert calls[0].result(60) == {"ok": True}
        ways[1].sendall(answer)
        assert calls[1].result(60) == {"ok": True}
        for way in ways:
            assert way.recv(1) == b""  # each was closed by who opened it
            way.close()
