"""What the tests of this scenario share: findings of the host, and plays of the role against it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BOUND_S = 180.0


@pytest.fixture
def subjects(host) -> Callable[[str], list[str]]:
    """What the host's findings of a kind are about."""

    def read(kind: str) -> list[str]:
        found = json.loads(host.run_expect([0], "saw edr findings --json --limit 1000").stdout)["findings"]
        events = [one["event"] for one in found if one["event"]["finding_info"]["types"] == [kind]]
        assert all(event["class_uid"] == 2004 for event in events)
        return [event["unmapped"]["saw"]["subject"] for event in events]

    return read


@pytest.fixture(scope="session")
def until() -> Callable[..., None]:
    """Wait for a state of the host."""

    def wait(condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + BOUND_S
        while not condition():
            assert time.monotonic() < end, f"not within {BOUND_S:.0f} s: {what}"
            time.sleep(0.5)

    return wait


@pytest.fixture(scope="session")
def play(tmp_path_factory) -> Callable[..., subprocess.CompletedProcess]:
    """Run the role on the host with variables of its own."""
    folder = tmp_path_factory.mktemp("play")
    playbook = folder / "play.yml"
    playbook.write_text("- {hosts: hardened, gather_facts: false, roles: [secure_agent.workspace.edr]}\n")

    def run(variables: dict, *options: str) -> subprocess.CompletedProcess:
        (folder / "variables.json").write_text(json.dumps(variables))
        command = ["ansible-playbook", "--inventory", os.environ["MOLECULE_INVENTORY_FILE"], str(playbook)]
        command += ["-e", f"@{folder / 'variables.json'}", *options]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=400, stdin=subprocess.DEVNULL
        )

    return run
