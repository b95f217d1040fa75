"""The operating guide's walk through a change of policy on the real workspace, its commands as they are written.

Wider by one call, signed by two, loaded by the VM; then broken on purpose, halted, and rolled back by nobody's hand.
"""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from guide_walk import LOADED, WIDER, commands, exit_codes, last
from vm_access import Workspace, facts, wait_until

from saw.broker.client import OperatorClient


class Walk:
    """The checkout of the embedded default, as its operator stands in it."""

    def __init__(self, workspace: Workspace, log: Any) -> None:
        self.workspace, self.log = workspace, log

    def step(self, number: int) -> dict[str, str]:
        """Run a step of the guide; return what each command printed."""
        return {command: self.run(command) for command in commands(number)}

    def run(self, command: str) -> str:
        """Run one command in the checkout; it must end as the guide says."""
        programs = f"{self.workspace.checkout}/.venv/bin:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.workspace.checkout, env={**self.workspace.environment, "PATH": programs},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        self.log.write(f"\n$ {command}\n{done.stdout}{done.stderr}".encode())
        assert done.returncode in exit_codes(command), (
            f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n"
            f"rollouts: {[(number, one['state'], one.get('reason')) for number, one in self.rollouts().items()]}"
        )
        return done.stdout

    def rollouts(self) -> dict[int, dict[str, Any]]:
        """The rollouts of the ring by their revision."""
        operator = OperatorClient.from_context(self.workspace.environment["SAW_CONTEXT"])
        told = operator.request("GET", "/v1/policy/rollouts/stable")
        return {int(one["revision"]): one for one in told["rollouts"]}


@pytest.mark.control("POL-01")
@pytest.mark.control("LIF-03")
def test_a_change_is_seen_signed_by_two_loaded_broken_halted_and_rolled_back(workspace: Workspace, log: Any) -> None:
    walk = Walk(workspace, log)
    before = max(walk.rollouts())
    posted = ("https://api.example.com/v1/items", "--data", "text=hello")
    assert workspace.call(*posted)[1].get("reason") == "method_or_path_not_allowed", "refused before the change"

    assert "allow" in last(walk.step(1), "saw policy explain")
    assert WIDER in last(walk.step(2), "saw policy diff")
    signed = walk.step(3)
    assert len(signed) == 4
    for command, shown in signed.items():
        assert WIDER in shown, command
        assert "WIDENS the reach of" in shown, command
    taken = walk.step(4)
    assert LOADED in last(taken, "saw policy watch")
    assert last(taken, "saw ssh") == "405", "the API itself answers now"
    assert walk.rollouts()[before + 1]["all_loaded"]
    wider = workspace.show()["policy_digest"]

    seen = workspace.last_seq("edge")
    broken = walk.step(5)
    assert "is in escrow" in last(broken, "saw policy escrow")
    assert LOADED in last(broken, "saw policy watch")
    assert workspace.show()["policy_digest"] != wider
    ended = walk.step(6)
    assert LOADED in last(ended, "saw policy watch")
    refused = [e for e in workspace.events("edge", seen) if facts(e).get("reason") == "credential_unavailable"]
    assert len(refused) >= 20, "the mistake showed in calls"
    found = walk.rollouts()
    assert (found[before + 2]["state"], found[before + 2]["rollback"]["state"]) == ("halted", "published")
    assert "max_deny_rate_increase" in found[before + 2]["reason"]
    assert (found[before + 3]["newest"], found[before + 3]["returns_to"]) == (True, before + 1)
    assert workspace.show()["policy_digest"] == found[before + 3]["policy_digest"]
    wait_until("an allowed call", lambda: workspace.call()[0] == 200, patience=60)
