"""A hypervisor after its roles: a VM that was made lies there whole, and one goes through all its states."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

testinfra_hosts = ["edge"]
SCENARIO = Path(os.environ["MOLECULE_SCENARIO_DIRECTORY"])
UNITS = ("saw-vm@ws-life.service", "saw-swtpm@ws-life.service")


def play(name, *options, **variables):
    """Run a playbook of this scenario; return the finished run."""
    command = ["ansible-playbook", "-i", os.environ["MOLECULE_INVENTORY_FILE"], SCENARIO / name, *options]
    return subprocess.run(
        [*command, "-e", json.dumps(variables)], capture_output=True, text=True, check=False, timeout=300
    )


def life(*steps, check=False):
    """Take ws-life through ``(state, whether that is a change)`` by its role."""
    wanted = [{"state": state, "changed": changed} for state, changed in steps]
    done = play("life.yml", *(["--check"] if check else []), life_steps=wanted)
    assert done.returncode == 0, done.stdout + done.stderr


def stored(host, name):
    return json.loads(host.file(f"/var/lib/saw/vms/{name}/spec.json").content_string)


def test_the_made_vm_is_whole_private_and_not_running(host):
    place = host.file("/var/lib/saw/vms/ws-made")
    assert (place.user, place.mode) == ("root", 0o700)
    parts = set(host.run("ls /var/lib/saw/vms/ws-made").stdout.split())
    assert {"spec.json", "root.qcow2", "image.verified", "data.img", "vars.fd", "tpm"} <= parts
    backing = json.loads(host.run("qemu-img info --output=json /var/lib/saw/vms/ws-made/root.qcow2").stdout)
    assert backing["backing-filename"] == stored(host, "ws-made")["image"]
    assert host.run("blkid -p -s LABEL -o value /var/lib/saw/vms/ws-made/data.img").stdout.strip() == "saw-home"
    assert host.run("systemctl is-active saw-vm@ws-made.service").stdout.strip() == "inactive"


@pytest.mark.control("ISO-01")
def test_a_vm_starts_in_its_own_network_with_its_own_tpm_and_goes_without_a_trace(host):
    life(("started", True), check=True)
    life(("started", True), ("started", False))
    try:
        for unit in UNITS:
            assert host.run(f"systemctl is-active {unit}").stdout.strip() == "active", host.run(
                f"journalctl -u {unit} --no-pager -n 30"
            ).stdout
        assert host.process.filter(comm="swtpm")
        links = {link["ifname"]: link for link in json.loads(host.run("ip -j addr").stdout)}
        assert [f"{a['local']}/{a['prefixlen']}" for a in links["sawbr8"]["addr_info"]] == ["10.210.8.1/30"]
        assert (links["sawtap8"]["master"], links["sawtap8"]["addr_info"]) == ("sawbr8", [])
        for link in ("sawbr8", "sawtap8"):
            assert host.file(f"/proc/sys/net/ipv6/conf/{link}/disable_ipv6").content_string.strip() == "1"
        life(("killed", True))
        assert host.run(f"systemctl is-active {' '.join(UNITS)}").stdout.split() == ["inactive", "inactive"]
    finally:
        life(("absent", True), ("absent", False))
    assert not host.file("/var/lib/saw/vms/ws-life").exists
    assert not host.file("/sys/class/net/sawbr8").exists
    assert not host.file("/sys/class/net/sawtap8").exists
    assert host.file("/var/lib/saw/vms/ws-made/data.img").exists


@pytest.mark.control("P0-04")
def test_an_image_of_another_digest_is_not_used(host):
    wrong = "0" * 64
    refused = play(
        "life.yml", life_steps=[{"state": "started", "changed": True}], life_image="other", life_sha256=wrong
    )
    assert refused.returncode != 0
    found = host.run("sha256sum /var/lib/saw/images/other/image.qcow2").stdout.split()[0]
    told = " ".join((refused.stdout + refused.stderr).split())
    assert f"has SHA-256 {found}, wanted is {wrong}" in told, told
    assert not host.file("/var/lib/saw/vms/ws-life").exists


@pytest.mark.control("P0-04")
def test_an_image_without_a_record_is_not_started_by_hand_and_one_with_it_is(host):
    record = "/var/lib/saw/images/tiny/tiny.release.signed.json"
    life(("created", True))
    try:
        host.run_expect([0], f"mv {record} /root/kept")
        refused = host.run("/opt/saw/bin/saw vm start ws-life --json")
        assert (refused.rc, json.loads(refused.stdout)["error"]["code"]) == (1, "record_missing"), refused.stdout
        # Nor by its unit, past the command: it ends with the reason, and no emulator runs.
        host.run("systemctl start saw-vm@ws-life.service")
        host.run_expect(
            [0], "timeout 120 sh -c 'until systemctl is-failed -q saw-vm@ws-life.service; do sleep 0.5; done'"
        )
        assert "has no signed release record" in host.run("journalctl -u saw-vm@ws-life.service --no-pager").stdout
        assert not host.file("/run/saw/vm/ws-life/qmp.sock").exists
        host.run_expect([0], f"mv /root/kept {record}")
        assert host.run("/opt/saw/bin/saw vm start ws-life --json").rc == 0
        host.run_expect([0], "timeout 120 sh -c 'until [ -S /run/saw/vm/ws-life/qmp.sock ]; do sleep 0.5; done'")
    finally:
        host.run(f"mv /root/kept {record}")
        life(("absent", True))


@pytest.mark.control("P0-04")
def test_the_pinned_root_is_not_overwritten(host):
    before = host.file("/var/lib/saw/trust/root.json").content
    place = Path(os.environ["MOLECULE_PROJECT_DIRECTORY"], "build/molecule/releases")
    other = str(place / "strangers/repository/metadata/1.root.json")
    refused = play("converge.yml", hypervisor_trusted_root=other)
    assert refused.returncode != 0
    assert "is not the one that this hypervisor trusts" in " ".join((refused.stdout + refused.stderr).split())
    assert host.file("/var/lib/saw/trust/root.json").content == before
    assert json.loads(host.file("/etc/saw/hypervisor.json").content_string) == {"image_records": "required"}


@pytest.mark.control("P0-01")
def test_what_a_killed_run_left_undone_is_done_by_the_next(host):
    """As after a kill between a new unit file and systemd's reading of it: the file looks right, the reload is still owed."""
    shown = "systemctl show --property=UnitsLoadTimestampMonotonic --value"
    unit = host.file("/etc/systemd/system/saw-vm@.service").content_string
    host.run_expect([0], "mkdir -p /var/lib/saw/component && touch /var/lib/saw/component/daemon-reload")
    before = int(host.run(shown).stdout)
    done = play("converge.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=1 " in done.stdout, done.stdout
    assert int(host.run(shown).stdout) > before
    assert host.file("/etc/systemd/system/saw-vm@.service").content_string == unit
    assert not host.file("/var/lib/saw/component").exists
