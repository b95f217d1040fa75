"""The role runtime_openshell on a booted host with Landlock. What stands in for OpenShell and Podman is told in packages.py."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("INT-01")
UNITS = ("saw-openshell-podman.service", "saw-openshell.service", "saw-openshell-apply.path")
CONVERGE = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"], "converge.yml")


def converge(*options):
    """Run the role again; return the finished run and its words."""
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], CONVERGE, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    return done, " ".join((done.stdout + done.stderr).split())


def test_the_host_lacks_nothing_and_the_units_run_as_the_account(host):
    looked = host.run("/opt/saw/bin/saw openshell preflight")
    assert looked.rc == 0, looked.stdout + looked.stderr
    for unit in UNITS:
        assert host.service(unit).is_enabled and host.service(unit).is_running, unit
    for unit in UNITS[:2]:
        main = host.run(f"systemctl show --property=MainPID --value {unit}").stdout.strip()
        assert host.run(f"stat -c %U /proc/{main}").stdout.strip() == "saw-openshell"
    for name in ("/etc/subuid", "/etc/subgid"):
        assert "saw-openshell:1000000:65536" in host.file(name).content_string.splitlines()


def test_the_handover_waits_for_a_generation(host):
    assert not host.service("saw-openshell-apply.service").is_running
    assert json.loads(host.file("/etc/saw/openshell.json").content_string)["accept"] == ["governance.persistence"]


def test_a_switch_starts_the_handover_which_does_nothing_where_no_policy_is_in_force(host):
    host.run_expect([0], "mkdir -p /run/saw/generations && touch /run/saw/generations/switched")
    taken = host.run("timeout 60 sh -c 'while [ -e /run/saw/generations/switched ]; do :; done'")
    ended = host.run("systemctl show --property=Result --value saw-openshell-apply.service").stdout.strip()
    assert (taken.rc, ended) == (0, "success"), host.run("systemctl status saw-openshell-apply.service").stdout


def test_an_image_that_is_not_there_keeps_the_gateway_from_starting(host):
    images = "/usr/share/test-podman/images"
    host.run_expect([0], f"cp --preserve=mode {images} /root/images && sed -i /supervisor/d {images}")
    try:
        assert host.run("systemctl restart saw-openshell.service").rc != 0
        assert not host.service("saw-openshell.service").is_running
    finally:
        host.run_expect([0], f"mv /root/images {images}")
    host.run_expect([0], "systemctl reset-failed saw-openshell.service; systemctl restart saw-openshell.service")
    assert host.service("saw-openshell.service").is_running


def test_a_host_that_lacks_something_is_refused_with_the_name_and_one_that_has_it_is_not(host):
    host.run_expect([0], "mv /usr/bin/pasta /root/pasta")
    try:
        refused, words = converge()
        assert refused.returncode == 2, refused.stdout
        assert "OpenShell cannot run here." in words and "install the package passt" in words
    finally:
        host.run_expect([0], "mv /root/pasta /usr/bin/pasta")
    done, words = converge("--check")
    assert done.returncode == 0, words


def test_a_package_of_another_digest_is_not_installed(host, tmp_path):
    (tmp_path / "openshell.deb").write_text("another package\n")
    given = {"runtime_openshell_package": "", "runtime_openshell_deb": str(tmp_path / "openshell.deb")}
    refused, words = converge("-e", json.dumps({**given, "runtime_openshell_deb_sha256": "0" * 64}))
    assert refused.returncode == 2
    assert "is not the file of runtime_openshell_deb_sha256" in words
    assert host.package("openshell").is_installed
