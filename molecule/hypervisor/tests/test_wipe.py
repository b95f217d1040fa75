"""The role gpu_wipe on a real hypervisor's VMs. The GPU is a folder in the form that the kernel documents: none is here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_hypervisor import life, play

testinfra_hosts = ["edge"]
pytestmark = pytest.mark.control("GPU-01")
BUILD = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"], "build/molecule")
GONE = "/var/lib/saw/vms/ws-gone"


def reset(device):
    return f"/sys/bus/pci/devices/{device}/reset"


def test_the_record_that_came_back_says_what_was_done_and_is_signed():
    record = BUILD / "hypervisor/ws-gone.wiped.signed.json"
    command = [Path(sys.executable).with_name("saw"), "gpu", "verify", record, "--workspace", "ws-gone", "--json"]
    done = subprocess.run(
        [*command, "--public", BUILD / "releases/wipe/wipe.pub"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)["record"]
    assert [gpu["device"] for gpu in told["gpus"]] == ["0000:3b:00.0"]
    assert told["reason"] == "sponsor left"
    sizes = {Path(disk["path"]).name: (disk["overwritten"], disk["read_back"]) for disk in told["disks"]}
    assert sizes["data.img"][0] > 0 and sizes["data.img"][1] == 64 * 1024 * 1024, sizes
    assert {"root.qcow2", "vars.fd"} <= sizes.keys()


def test_nothing_of_its_user_is_left_and_the_gpu_was_reset(host):
    host.run_expect([0], f"cmp -n $((64 * 1024 * 1024)) {GONE}/data.img /dev/zero")
    assert host.file(reset("0000:3b:00.0")).content_string == "1"
    assert host.file(f"{GONE}/wiped.signed.json").mode == 0o600


def test_a_gpu_that_cannot_be_reset_is_not_released_and_one_that_can_is(host):
    """The far end of a refusal is a hypervisor that still has everything of the VM."""
    device = "0000:5e:00.0"
    done = play("life.yml", life_steps=[{"state": "created", "changed": True}], life_devices=[device])
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        refused = play("wipe.yml")
        assert refused.returncode == 2
        assert f"GPU {device} was not reset" in " ".join((refused.stdout + refused.stderr).split()), refused.stdout
        assert not host.file("/var/lib/saw/vms/ws-life/wiped.signed.json").exists
        kept = play("life.yml", life_steps=[{"state": "absent", "changed": True}], life_devices=[device])
        assert kept.returncode == 2
        assert "has to be wiped before anything of it is released" in " ".join((kept.stdout + kept.stderr).split()), (
            kept.stdout
        )
        assert host.file("/var/lib/saw/vms/ws-life/data.img").exists
    finally:
        host.run_expect([0], f"touch {reset(device)}")
        wiped = play("wipe.yml")
    assert wiped.returncode == 0, wiped.stdout + wiped.stderr
    assert host.file(reset(device)).content_string == "1"
    life(("absent", True), ("absent", False))
    assert not host.file("/var/lib/saw/vms/ws-life").exists
