"""Ports and sockets of the perimeter that are taken are named with their holder; ring 2's own listeners are no conflict."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ring2_rig import FAR, Rig, wait_for

LISTENER = (
    "import socket, sys; s = socket.create_server((sys.argv[1], int(sys.argv[2]))); print(flush=True); sys.stdin.read()"
)


@contextlib.contextmanager
def stranger(rig: Rig, address: str, port: int) -> Iterator[int]:
    """Have another process listen inside the rig's namespace; give its pid."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = rig.namespace.popen(sys.executable, "-c", LISTENER, address, str(port), **pipes)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"\n"
        yield process.pid
    finally:
        process.communicate()


def gateway(rig: Rig, verb: str) -> Any:
    """Run ``saw gateway VERB`` inside the namespace to its end."""
    command = ["ip", "netns", "exec", rig.namespace.name, sys.executable, "-m", "saw.cli.main", "gateway", verb]
    return subprocess.run(
        [*command, "--config", str(rig.config_path)], capture_output=True, text=True, check=False, timeout=60
    )


def test_ring_2s_own_listeners_are_no_conflict(rig: Rig) -> None:
    done = gateway(rig, "ports")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("address", "port", "what"),
    [
        ("10.210.9.1", 8443, "ring 2"),
        ("10.210.9.1", 8444, "passage to the broker"),
        (FAR, 22007, "ingress of workspace 7"),
        ("0.0.0.0", 22250, "ingress of workspace 250"),
        ("0.0.0.0", 23000, "ingress of workspace 1000"),
    ],
)
def test_a_taken_port_is_named_with_its_holder_and_cure(rig: Rig, address: str, port: int, what: str) -> None:
    if address == "10.210.9.1":
        rig.namespace.ip("addr", "add", f"{address}/32", "dev", "lo")
    try:
        with stranger(rig, address, port) as pid:
            refused = gateway(rig, "ports")
    finally:
        if address == "10.210.9.1":
            rig.namespace.ip("addr", "del", f"{address}/32", "dev", "lo")
    assert refused.returncode == 1
    assert f"(process {pid}) listens on {address}:{port} ({what})" in refused.stderr
    assert "stop these, or bind them to another address" in refused.stderr


@pytest.mark.parametrize("port", [23001, 9000])
def test_a_port_that_no_workspace_needs_is_no_conflict(rig: Rig, port: int) -> None:
    with stranger(rig, FAR, port):
        done = gateway(rig, "ports")
    assert done.returncode == 0, done.stderr


def test_a_second_gatekeeper_leaves_the_first_ones_socket_alone(rig: Rig) -> None:
    assert rig.gatekeeper is not None
    refused = gateway(rig, "serve")
    assert refused.returncode == 1
    assert f"the gatekeeper cannot listen on {rig.config.sockets().authz}: " in refused.stderr
    assert f"(process {rig.gatekeeper.pid}) listens there" in refused.stderr
    assert rig.call().status == 200


def test_a_port_that_is_taken_when_a_workspace_comes_is_in_the_gatekeepers_log(rig: Rig) -> None:
    log = Path(rig.directory / "gatekeeper.log")
    with stranger(rig, FAR, 22003):
        rig.broker.put(
            "ws-3", number=3, state="active", sponsor="mia@example.com", blueprint="coding", ring="stable",
            lease_expires_at=120, policy_digest=rig.digest, released_digest=rig.digest, svid_sha256=None, agent="agent-3",
        )  # fmt: skip
        wait_for(
            lambda: f"ring 2 cannot listen on {FAR}:22003 (ingress of workspace 3)" in log.read_text(), "the message"
        )
    rig.broker.put("ws-3", state="decommissioned")
    rig.settled()
    assert "ws-3" in json.dumps(json.loads((rig.directory / "state/state.json").read_text()))
