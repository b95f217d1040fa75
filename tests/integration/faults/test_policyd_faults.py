"""The policy agent cut off from the broker and out of disk: the policy in force counts until the lease ends, and no other.

Killed and stopped it is in tests/integration/policyd/test_policyd_stops.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fault_room import MIB, Room, partitioned
from netns import Namespace
from policyd_lab import ENVOY, GOVERNANCE, Lab, until

from saw.cli.policyd import main
from saw.files import write_atomic
from saw.policy.bundle import describe

PLAIN = GOVERNANCE + 'plaintext: ["api.example.com:443"]\n'
GONE = "lease_expired: the policy agent of this workspace is not running"


class Workspace:
    """``saw policyd`` as a process, ring 1 and the broker in a network namespace, the agent's folders on small disks."""

    def __init__(self, stack: ExitStack) -> None:
        self.namespace = Namespace("policyd")
        stack.callback(self.namespace.close)
        self.run, self.state = (self._room(stack, size) for size in (8 * MIB, 4 * MIB))
        self.lab = self.namespace.run(
            lambda: Lab(self.run.seen, self.state.seen, Path("/run/netns") / self.namespace.name)
        )
        stack.callback(self.lab.stop)
        self.lab.heartbeat._limit = 3.0  # three beats and more: the lab's agent beats five times a second
        self.configure()
        self.lease(3600)
        self.first = self.publish("/v1/**")
        self.said = self.lab.directory / "policyd.log"
        with self.said.open("wb") as log:
            self.process = self._popen(sys.executable, "-m", "saw.cli.main", "policyd", *self.options, stderr=log)
        stack.callback(self._end)
        until((self.lab.run / "generations" / "current").is_symlink, "the agent is ready")
        bootstrap = self.lab.directory / "bootstrap.json"
        main(["render-bootstrap", *self.options, "--output", str(bootstrap)])
        envoy = (str(ENVOY), "-c", str(bootstrap), "--disable-hot-restart", "--concurrency", "1", "-l", "error")
        self.lab.processes.append(self._popen(*envoy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        until(lambda: ("loaded", self.first) in self.lab.words(), "the policy is in force", 120)
        until(lambda: self.call() == "passed", "a call passes ring 1")

    @staticmethod
    def _room(stack: ExitStack, size: int) -> Room:
        room = Room(Path(tempfile.mkdtemp(prefix="saw-room-")), size)
        stack.callback(room.place.rmdir)
        stack.callback(room.close)
        return room

    def configure(self) -> None:
        """Tell agent and proxy the paths that they see: Envoy takes none below /proc."""
        run = self.run.place
        self.lab.configure(
            run_dir=str(run),
            attest_socket=str(run / "attest" / "attest.sock"),
            decide_socket=str(run / "decide" / "authz.sock"),
            system_bundle=str(run / "ca.pem"),
        )
        self.options = ("--config", str(self.lab.directory / "policyd.json"))

    def _popen(self, *command: str, **options: Any) -> subprocess.Popen[bytes]:
        return self.namespace.popen(*self.run.enter, *command, **options)

    def _end(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def lease(self, seconds: float) -> None:
        """Write a lease as attestation does."""
        ends = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        write_atomic(self.lab.run / "svid" / "lease.json", json.dumps({"expires_at": ends}))

    def publish(self, path: str) -> str:
        """Release a policy that allows ``path`` and return its digest."""
        return describe(self.lab.publish(self.lab.bundle(path, governance=PLAIN)))[0]

    def call(self, path: str = "/v1/x") -> str:
        """Call an address; return what ring 1 said, or ``passed`` when it went on to ring 2 (which is not there)."""
        proxy = f"http://127.0.0.1:{self.lab.proxy_port}"
        said = json.loads(self.namespace.sh("curl", "-s", "-x", proxy, f"http://api.example.com:443{path}"))
        return "passed" if said.get("reason") == "no_identity" else f"{said['reason']}: {said['detail']}"

    def runs(self) -> bool:
        """Tell whether the agent's process is there."""
        return self.process.poll() is None

    def parted(self) -> AbstractContextManager[None]:
        """What goes to the broker, or comes from it, is dropped without a word."""
        port = self.lab.broker.port
        return partitioned(self.namespace.name, f"tcp dport {port}", f"tcp sport {port}")


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    with ExitStack() as stack:
        yield Workspace(stack)


@pytest.mark.thorough
@pytest.mark.control("POL-02")
@pytest.mark.control("POL-05")
def test_without_a_way_to_the_broker_the_policy_in_force_counts_until_the_lease_ends(workspace: Workspace) -> None:
    with workspace.parted():
        workspace.lease(20)
        second = workspace.publish("/v2/**")
        assert workspace.call() == "passed"
        assert workspace.call("/v2/x").startswith("method_or_path_not_allowed")
        until(lambda: workspace.call() != "passed" or time.sleep(0.2), "a refusal")
        assert workspace.call().startswith("lease_expired: the lease ended"), "not that the agent stands still"
        assert workspace.lab.current() == workspace.first
        workspace.lease(3600)
        assert workspace.call() == "passed", "on a lease, with the last policy that is known"
    until(lambda: ("loaded", second) in workspace.lab.words(), "the newer policy once the two are joined", 120)
    until(lambda: workspace.call("/v2/x") == "passed", "a call by the newer policy")
    assert workspace.call().startswith("method_or_path_not_allowed")
    assert workspace.runs()


@pytest.mark.control("POL-02")
def test_a_policy_that_cannot_be_kept_is_refused_and_loads_once_there_is_room(workspace: Workspace) -> None:
    before = workspace.state.names()
    workspace.state.fill()
    second = workspace.publish("/v2/**")
    until(lambda: ("refused", "state_not_kept") in workspace.lab.reported("finding"), "the agent tells that", 120)
    assert workspace.lab.told()["reason"] == "state_not_kept"
    assert "No space left" in workspace.lab.told()["detail"]
    assert (workspace.call(), workspace.lab.current()) == ("passed", workspace.first)
    workspace.state.free()
    workspace.lab.broker.sequence += 1
    until(lambda: ("loaded", second) in workspace.lab.words(), "the newer policy once there is room", 120)
    until(lambda: workspace.call("/v2/x") == "passed", "a call by the newer policy")
    assert workspace.runs()
    left = {name for name in workspace.state.names() - before if name.startswith(".")}
    assert not left, "no part of a file is left"


@pytest.mark.control("POL-02")
@pytest.mark.control("POL-05")
def test_with_no_room_to_show_life_in_nothing_is_allowed_until_there_is(workspace: Workspace) -> None:
    workspace.run.fill()
    until(lambda: workspace.call().startswith(GONE), "a refusal")
    second = workspace.publish("/v2/**")
    until(lambda: ("refused", "compile_failed") in workspace.lab.reported("finding"), "the agent tells why", 120)
    assert workspace.call().startswith(GONE)
    assert (workspace.runs(), workspace.lab.current()) == (True, workspace.first)
    workspace.run.free()
    workspace.lab.broker.sequence += 1
    until(lambda: ("loaded", second) in workspace.lab.words(), "the newer policy once there is room", 120)
    until(lambda: workspace.call("/v2/x") == "passed", "a call by the newer policy")
    assert workspace.runs()
