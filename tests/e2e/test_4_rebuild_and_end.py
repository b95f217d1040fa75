"""Rebuild keeps the user's data and nothing else; destroy and clean leave nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from vm_access import PLACES, Workspace, wait_until

from conftest import run


@pytest.mark.control("P0-06")
def test_a_rebuild_keeps_the_home_and_throws_the_attacker_out(rooted: Workspace, planted: str) -> None:
    before = rooted.host("edge", f"sha256sum {rooted.folder}/tpm/ek-rsa2048.*").split()[0]
    # The root disk is searched as it lies there, by the search that finds all of it now.
    rooted.saw("lab", "stop", timeout=300)
    assert found_on_root_disk(rooted, planted) == dict.fromkeys(PLACES, True)
    rooted.saw("lab", "rebuild", timeout=900)
    assert rooted.show()["state"] == "active"
    wait_until("an allowed call", lambda: rooted.call()[0] == 200, patience=90)
    assert rooted.agent("cat ~/kept-by-user").stdout.strip() == planted, "what the user had is there"
    # The attacker's folder is part of the home; a script in it is run by nobody any more.
    assert (
        rooted.agent(
            "printf 'touch /home/agent/i-was-here' > ~/.implant/after.sh && cat ~/.implant/after.sh"
        ).returncode
        == 0
    )
    rooted.saw("lab", "stop", timeout=300)
    assert found_on_root_disk(rooted, planted) == dict.fromkeys(PLACES, False)
    assert rooted.home_file("agent/.implant/after.sh") == "touch /home/agent/i-was-here", "it was left where it lay"
    assert rooted.home_file("agent/i-was-here") == ""
    assert rooted.host("edge", f"sha256sum {rooted.folder}/tpm/ek-rsa2048.*").split()[0] == before, "the same TPM"


def found_on_root_disk(workspace: Workspace, marker: str) -> dict[str, bool]:
    """Tell for each of ``PLACES`` whether it is on the stopped VM's root disk; ``marker`` must be nowhere when none is."""
    script = f"""
{workspace.open_root_disk()}
for path in {" ".join(PLACES)} /etc/passwd; do
  if debugfs -R "stat $path" "root.raw?offset=$offset" 2>/dev/null | grep -q '^Inode:'; then found=yes; else found=no; fi
  echo $path $found
done
if grep -q -a -F {marker} root.raw; then echo marker yes; else echo marker no; fi
rm root.raw
"""
    answer = dict(line.split() for line in workspace.host("edge", script).strip().splitlines())
    assert answer["/etc/passwd"] == "yes", "the disk can be read"
    found = {path: answer[path] == "yes" for path in PLACES}
    assert (answer["marker"] == "yes") == any(found.values()), answer
    return found


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
