"""People who sign in on the command line and open sessions with their workspaces as ``saw ssh`` does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from session_rig import Bastion
from sso_rig import SsoLab, command_login

SAW = [sys.executable, "-m", "saw.cli.main"]


def sign_in(lab: SsoLab, home: Path, person: str) -> dict[str, str]:
    """Sign a command line in; return the environment in which it is."""
    home.mkdir()
    command_login(lab, home, person)
    return {**os.environ, "XDG_CONFIG_HOME": str(home)}


def context_of(bastion: Bastion, environment: dict[str, str]) -> Path:
    """Write and return the context file of whoever is signed in: no socket, as they need no operator."""
    file = Path(environment["XDG_CONFIG_HOME"]) / "context.json"
    told = {
        "broker": {"socket": "/nonexistent", "ssh": None},
        "bastion": {"host": "127.0.0.1", "port": bastion.port, "user": "root", "sign_in": True},
    }
    file.write_text(json.dumps(told))
    return file


def connect(bastion: Bastion, environment: dict[str, str], *command: str) -> list[str]:
    """The line of ``saw ssh`` for whoever is signed in."""
    named = f"XDG_CONFIG_HOME={environment['XDG_CONFIG_HOME']}"
    line = ["env", named, *SAW, "ssh", "ws-a", "--context", str(context_of(bastion, environment))]
    return [*line, *(["--", *command] if command else [])]


def certify(bastion: Bastion, environment: dict[str, str], kept: Path) -> Path:
    """Have a certificate made for whoever is signed in; return the folder of its key, below ``kept``."""
    line = [*SAW, "ssh", "--certify", "ws-a", "--context", str(context_of(bastion, environment))]
    there = {**environment, "SAW_SSH_KEYS": str(kept)}
    subprocess.run(line, env=there, check=True, capture_output=True, timeout=60)
    return kept / "ws-a"
