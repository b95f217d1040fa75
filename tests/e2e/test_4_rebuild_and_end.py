"""Rebuild keeps the user's data and nothing else; destroy and clean leave nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import run
from vm_access import Workspace, wait_until


@pytest.mark.control("P0-06")
def test_a_rebuild_keeps_the_home_and_throws_the_attacker_out(workspace: Workspace) -> None:
    workspace.saw("lab", "rebuild", timeout=900)
    assert workspace.show()["state"] == "active"
    wait_until("an allowed call", lambda: workspace.call()[0] == 200, patience=90)
    assert workspace.agent("cat ~/marker").stdout == "marker-that-is-in-the-vm-4711"
    dropped = "printf 'touch /home/agent/i-was-here' > ~/.implant/x.sh; sleep 5; ls ~/i-was-here"
    assert workspace.agent(dropped).returncode != 0, "the implant is gone"


@pytest.mark.control("ID-04")
def test_a_destroyed_workspace_is_gone_for_good(workspace: Workspace) -> None:
    workspace.saw("lab", "destroy", "--reason", "end of the exercise", timeout=300)
    assert workspace.show()["state"] == "decommissioned"
    assert workspace.host("edge", "ls /var/lib/saw/vms; ls /sys/class/net").split().count(workspace.id) == 0
    again = workspace.saw("workspace", "start", workspace.id, check=False)
    assert again.returncode == 1
    assert "decommissioned" in again.stderr


def leftovers(checkout: Path) -> list[str]:
    """What of the lab is still on this machine."""
    found = []
    processes = subprocess.run(
        ["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    found += [line for line in processes if f"{checkout}/build" in line and "pytest" not in line]
    found += [line for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines() if str(checkout) in line]
    names = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout
    found += [line for line in names.splitlines() if line.startswith(("sawlab", "sawimg", "sawbr", "sawtap"))]
    found += [name for name in ("sawlab", "sawimg") if Path("/run/netns", name).exists()]
    tables = subprocess.run(["nft", "list", "tables"], capture_output=True, text=True, check=False).stdout
    found += [line for line in tables.splitlines() if "saw" in line]
    return found


def test_clean_leaves_nothing_behind(checkout: Path, log: Any) -> None:
    assert leftovers(checkout), "the search finds what is there"
    assert run(checkout, "make", "clean", log=log) == 0
    assert leftovers(checkout) == []
    assert not (checkout / "build").exists()
