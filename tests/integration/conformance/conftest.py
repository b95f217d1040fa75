"""Runs of the conformance kit on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "ring1"))
RECORDER = Path("/var/tmp/saw-test-kit-recorder.lock")


@contextmanager
def recorder_alone() -> Iterator[None]:
    """Be the one on this machine whose recorder listens: its ports are fixed."""
    with RECORDER.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


@pytest.fixture
def recording() -> Iterator[None]:
    """Let no other test's recorder listen meanwhile."""
    with recorder_alone():
        yield


@dataclass
class Run:
    """What a run of the command left behind."""

    code: int
    text: str
    report: dict[str, Any]

    def case(self, name: str) -> dict[str, Any]:
        """Return one case of the report."""
        return next(case for case in self.report["cases"] if case["id"] == name)

    def by(self, **wanted: str) -> dict[str, str]:
        """Return result by case id where the fields are as wanted."""
        return {c["id"]: c["result"] for c in self.report["cases"] if all(c[k] == v for k, v in wanted.items())}

    def findings(self) -> list[str]:
        """Return the cases that were tried and not refused for the right reason with a working twin."""
        return [
            f"{c['id']}: {c['result']} {c['twin']} {c['evidence']}"
            for c in self.report["cases"]
            if c["result"] != "not_applicable"
            and (c["result"] != "refused" or c["reason_ok"] is False or c["twin"]["result"] == "broken")
        ]


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """Run ``saw conformance run`` with the arguments that are given."""
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")

    def run(*arguments: str) -> Run:
        folder = tmp_path_factory.mktemp("conformance")
        words = [sys.executable, "-m", "saw.cli.main", "conformance", "run", "--output", str(folder), *arguments]
        with recorder_alone() if "--recorder" in arguments else nullcontext():
            done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=480)
        path = folder / "report.json"
        report = json.loads(path.read_bytes()) if path.exists() else {}
        return Run(done.returncode, done.stdout + done.stderr, report)

    return run
