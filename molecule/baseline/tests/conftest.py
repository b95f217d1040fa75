"""Playbooks of the collection, run on the hardened host from outside."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


class Run(subprocess.CompletedProcess):
    """A finished run of a playbook."""

    @property
    def changed(self) -> int:
        """How many tasks changed something, or would."""
        return sum(int(count) for count in re.findall(r"changed=(\d+)", self.stdout))

    @property
    def said(self) -> str:
        """All its words, with single spaces."""
        return " ".join((self.stdout + self.stderr).split())


@pytest.fixture(scope="session")
def play() -> Callable[..., Run]:
    """Run a playbook of the collection on the hardened host."""

    def run(name: str, *options: str) -> Run:
        command = [
            "ansible-playbook",
            "--inventory",
            os.environ["MOLECULE_INVENTORY_FILE"],
            ROOT / f"playbooks/{name}.yml",
        ]
        command += ["-e", "baseline_hosts=hardened", *options]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=400, stdin=subprocess.DEVNULL
        )
        return Run(done.args, done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def drift(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], tuple[int, dict[str, Any]]]:
    """Look for drift on the hardened host and return the exit code and the report."""
    variables = tmp_path_factory.mktemp("drift") / "variables.json"
    variables.write_text(json.dumps({"baseline_hosts": "hardened"}))

    def run() -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "saw.cli.main", "drift", "check", "--json", "--variables", str(variables)]
        command += [
            "--inventory",
            os.environ["MOLECULE_INVENTORY_FILE"],
            "--playbook",
            str(ROOT / "playbooks/baseline.yml"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
        return done.returncode, json.loads(done.stdout)

    return run
