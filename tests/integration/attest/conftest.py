from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "unit" / "attest"))

from swtpm_lab import Machine, SwTpm


@pytest.fixture(scope="session")
def tpm_template(tmp_path_factory):
    """A function that gives the state directory of a newly made TPM."""

    def make(name: str) -> Path:
        state = tmp_path_factory.mktemp(f"swtpm-{name}")
        subprocess.run(
            ["swtpm_setup", "--tpm2", "--tpmstate", str(state), "--pcr-banks", "sha256"],
            check=True,
            capture_output=True,
            timeout=60,
        )
        return state

    return {"first": make("first"), "second": make("second")}


@pytest.fixture
def new_tpm(tpm_template, tmp_path):
    """Start a TPM by template name; all are ended with the test."""
    started = []

    def start(name: str = "first") -> SwTpm:
        directory = tmp_path / f"tpm{len(started)}"
        directory.mkdir()
        swtpm = SwTpm(directory, tpm_template[name])
        started.append(swtpm)
        swtpm.start()
        return swtpm

    yield start
    for swtpm in started:
        swtpm.stop()


@pytest.fixture
def machine(new_tpm, tmp_path):
    return Machine(new_tpm(), tmp_path / "machine")
