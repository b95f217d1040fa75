"""The data disk of a host that was not told to encrypt one: everything is in place, and nothing of it is used."""

from __future__ import annotations

testinfra_hosts = ["guest"]


def test_what_it_takes_is_installed(host):
    for program in ("cryptsetup", "systemd-cryptenroll", "systemd-cryptsetup", "mkfs.ext4"):
        assert host.run(f"command -v {program}").rc == 0, program
    assert host.run("saw data-disk check-config /etc/saw/data-disk.json").rc == 0
    assert host.file("/etc/systemd/system-generators/saw-data-disk").mode == 0o755


def test_home_is_not_taken_over(host):
    assert host.run("systemctl show --property=ActiveState --value saw-data-disk.service").stdout.strip() == "inactive"
    assert "/dev/mapper/saw-home" not in host.run("systemctl cat home.mount").stdout
    assert host.run("systemctl is-enabled saw-data-disk-trim.timer").stdout.strip() == "enabled"


def test_a_start_without_a_public_key_refuses_and_formats_nothing(host):
    done = host.run("saw data-disk open")
    assert done.rc == 1
    assert "no public key" in done.stderr
