"""The MCP packages that the image carries, from npm by the hashes of their lock file, installed once for all tests."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

LOCKED = Path(__file__).resolve().parents[2] / "packer/mcp"


def mcp_packages() -> Path:
    """Return the folder ``node_modules`` of the locked packages; skip the test where they cannot be installed."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("npm and node are needed to install real MCP packages")
    lock = (LOCKED / "package-lock.json").read_bytes()
    folder = Path(f"/var/tmp/saw-test-npm-{hashlib.sha256(lock).hexdigest()[:16]}")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = folder / ".installed"
        if not done.exists():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(LOCKED / name, folder / name)
            options = [
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
                "--cache",
                str(folder / "cache"),
                "--prefix",
                str(folder),
            ]
            answer = subprocess.run(["npm", "ci", *options], capture_output=True, text=True, timeout=240, check=False)
            if answer.returncode != 0:
                pytest.skip(f"npm could not install the packages: {answer.stderr[-300:]}")
            done.touch()
    return folder / "node_modules"
