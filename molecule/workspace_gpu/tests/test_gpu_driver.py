"""The driver's role on a booted host without a GPU; what stands in for Debian's packages is told in packages.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

testinfra_hosts = ["guest"]
pytestmark = pytest.mark.control("GPU-01")
SCENARIO = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"])
KEYS = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"], "build/molecule/workspace_gpu")
MODULES = "/usr/lib/modules/6.12.0-test-cloud-amd64/updates/dkms"
LOOK = "/opt/saw/bin/saw gpu driver --certificate /usr/local/share/saw/gpu-modules.crt --packages --json"


def converge(*options):
    """Run the role again; return the finished run."""
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], SCENARIO / "converge.yml", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)


def test_every_module_is_of_the_kernel_and_signed_by_the_owner(host):
    looked = host.run(LOOK)
    told = json.loads(looked.stdout)
    assert (looked.rc, told["problems"]) == (0, []), told
    assert {one["name"] for one in told["modules"]} == {
        "nvidia", "nvidia-modeset", "nvidia-drm", "nvidia-uvm", "nvidia-peermem",
    }  # fmt: skip
    assert {one["signer"] for one in told["modules"]} == {"Modules of the owner"}
    assert told["firmware"] == ["gsp_ga10x.bin"]


def test_nouveau_cannot_be_loaded_and_the_nodes_belong_to_the_group(host):
    shown = host.run("modprobe --showconfig").stdout.splitlines()
    assert {"blacklist nouveau", "install nouveau /bin/false"} <= set(shown)
    group = host.run("getent group video").stdout.split(":")[2]
    options = next(line for line in shown if line.startswith("options nvidia_current_open"))
    assert f"NVreg_DeviceFileGID={group} NVreg_DeviceFileMode=0660" in options
    assert not [
        line for line in host.file("/etc/modules-load.d/nvidia.conf").content_string.splitlines() if line[:1] != "#"
    ]


def test_no_compiler_and_no_headers_stay_and_the_source_does(host):
    installed = host.run("dpkg-query -W -f '${db:Status-Status} ${Package}\\n'").stdout.splitlines()
    names = {line.split()[1] for line in installed if line.startswith("installed ")}
    assert not {name for name in names if name.startswith(("linux-headers-", "gcc-99", "cpp-99"))}
    assert {"dkms", "nvidia-open-kernel-dkms", "nvidia-smi"} <= names


def test_without_a_gpu_the_units_are_skipped_and_nothing_has_failed(host):
    for unit in ("saw-gpu-check.service", "nvidia-persistenced.service"):
        assert host.service(unit).is_enabled
        host.run_expect([0], f"systemctl start {unit}")
        shown = host.run(f"systemctl show --property=ActiveState,Result,ExecMainStatus --value {unit}").stdout.split()
        assert shown[:1] != ["failed"] and "failed" not in shown, shown
        assert not host.service(unit).is_running
    assert not host.file("/var/lib/saw/gpu/state.json").exists


def test_the_key_is_nowhere_on_the_host(host):
    """Neither in a file of DKMS or of ours, nor in the journal."""
    body = (KEYS / "owner.key").read_text().splitlines()[1]
    found = host.run("grep -rlF -e '%s' /etc /var/lib /var/log /usr/local /usr/src /tmp /var/tmp /root /run/saw", body)
    assert found.stdout == ""
    assert host.run("journalctl --no-pager | grep -cF -e '%s'", body).stdout.strip() == "0"
    assert host.run("ls -A /var/lib/dkms/mok.key /nonexistent").rc != 0


def test_a_module_that_is_not_ours_is_told_and_built_again(host):
    """As after an update by hand: one of the five has lost its signature. Another one's key is no cure."""
    host.run_expect([0], f"truncate --size=-28 {MODULES}/nvidia-current-open-uvm.ko")
    forecast = converge("--check", "--diff")
    assert forecast.returncode == 0, forecast.stdout + forecast.stderr
    assert "nvidia-uvm is not signed" in forecast.stdout
    refused = converge("-e", f"gpu_driver_module_key={KEYS}/stranger.key")
    assert refused.returncode == 2
    assert "does not belong to the certificate" in " ".join((refused.stdout + refused.stderr).split()), refused.stdout
    assert "PRIVATE KEY" not in refused.stdout + refused.stderr
    assert json.loads(host.run(LOOK).stdout)["ok"] is False
    mended = converge()
    assert mended.returncode == 0, mended.stdout + mended.stderr
    assert json.loads(host.run(LOOK).stdout)["problems"] == []
    assert not host.package("gcc-99").is_installed


def test_a_package_of_the_toolkit_that_no_source_has_is_named():
    refused = converge("-e", "gpu_driver_toolkit_package=nvidia-container-toolkit")
    assert refused.returncode == 2
    assert "no suite of Debian has NVIDIA's container toolkit" in " ".join((refused.stdout + refused.stderr).split())
