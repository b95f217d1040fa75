"""A light host for real: booted from the cached base tree, reached by SSH, found again, ended without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from saw.lab.nspawn import LabError, LabNetwork, LightHost, known_hosts, login_key_of
from saw.lab.process import gone, recall, start_time

ROOT = Path(__file__).resolve().parents[3]
TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"), key=lambda path: path.stat().st_mtime)
pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to boot a host"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]


def sh(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def processes_of(host: LightHost) -> list[str]:
    """Return the pids of processes that run on the host's tree or were started for it."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            root = (path / "root").readlink()
        except OSError:
            continue
        if str(host.directory).encode() in command or str(root).startswith(str(host.directory)):
            found.append(path.name)
    return found


def control_groups(host: LightHost) -> str:
    """Return the host's directories in the machine's cgroup v2 tree."""
    script = (
        "mount --make-rprivate / && (umount -R /sys/fs/cgroup 2>/dev/null || true) && "
        'mount -t cgroup2 none /sys/fs/cgroup && find /sys/fs/cgroup -maxdepth 1 -name "$1"'
    )
    return sh("unshare", "--mount", "sh", "-ec", script, "sh", host.cgroup)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightHost]:
    """A booted host on a network of its own."""
    number = os.getpid() % 100000
    lan = LabNetwork(f"sawt{number}", f"10.94.{number % 250}")
    made = LightHost("unit", f"{lan.prefix}.10", tmp_path_factory.mktemp("lab"), lan)
    try:
        made.up(TARS[-1], patience=90)
        yield made
    finally:
        made.down(purge=True)
        lan.down()


def ssh(host: LightHost, *command: str) -> str:
    """Run a command on the host; its key must be the one that was written down before the first connection."""
    trusted = known_hosts(host.lab, [host])
    return sh(
        "ssh", "-i", str(login_key_of(host.lab)), "-o", f"UserKnownHostsFile={trusted}", "-o", "BatchMode=yes",
        "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=10", f"root@{host.address}", "--", *command,
    )  # fmt: skip


def test_it_is_a_host_of_its_own_with_a_running_systemd(host: LightHost) -> None:
    assert ssh(host, "cat", "/etc/hostname", "/proc/1/comm").split() == ["unit", "systemd"]
    assert host.address in ssh(host, "ip", "-4", "-o", "addr", "show", "host0")
    assert ssh(host, "ip", "-6", "-o", "route", "show", "default") == ""


def test_bringing_it_up_again_leaves_it_running_and_keeps_its_state(host: LightHost) -> None:
    ssh(host, "touch", "/root/state")
    before = recall(host.pid_file)
    host.up(TARS[-1])
    assert recall(host.pid_file) == before
    assert (host.root / "root/state").exists()


def test_a_dead_host_is_not_believed_and_is_booted_again_with_its_state(host: LightHost) -> None:
    (host.root / "root/state").touch()
    ssh(host, "touch", "/run/of-this-boot")
    pid = recall(host.pid_file)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert gone(pid, 10)
    assert not host.running()
    with pytest.raises(LabError, match="host unit ended while starting") as dead:
        host.answers()
    assert dead.value.cure == "read its console.log"
    host.pid_file.write_text(f"{os.getpid()} 1\n")  # the number went to another process
    assert not host.running()
    host.up(TARS[-1], patience=90)
    assert recall(host.pid_file) not in {None, pid, os.getpid()}
    assert start_time(os.getpid()) is not None
    assert ssh(host, "ls", "/root", "/run/systemd").startswith("/root:\nstate")
    assert "of-this-boot" not in ssh(host, "ls", "/run")  # what answers is not the orphan of the killed one


def test_down_leaves_no_process_cgroup_mount_or_link(host: LightHost) -> None:
    host.up(TARS[-1], patience=90)
    assert processes_of(host)
    assert control_groups(host)
    host.down()
    assert processes_of(host) == []
    assert control_groups(host) == ""
    assert host.root.exists()
    host.down(purge=True)
    host.down(purge=True)
    assert not host.directory.exists()
    assert str(host.lab) not in Path("/proc/self/mounts").read_text()
    host.network.down()
    assert not host.network.exists()
    assert not Path("/sys/class/net", host.network.uplink).exists()
