"""Parts of the light hosts: keys, known_hosts, the tree's removal, the private network, and the lab's files."""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import yaml
from private_ns import private, sh

from saw.errors import SawError
from saw.lab import nspawn, process
from saw.lab.nspawn import LabError, LabNetwork, LightHost, host_key_of, key_pair, known_hosts, login_key_of
from saw.lab.topology import Lab, find_lab

ROOT = Path(__file__).resolve().parents[3]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="makes private namespaces")
LAN = LabNetwork("sawunit", "10.93.7")


def test_a_key_pair_is_made_once_and_is_private(tmp_path: Path) -> None:
    key = key_pair(tmp_path / "ssh/key", "comment")
    first = key.read_bytes()
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert key_pair(tmp_path / "ssh/key", "comment").read_bytes() == first
    assert "comment" in key.with_suffix(".pub").read_text()


def test_a_public_key_left_by_an_interrupted_run_does_not_stop_the_next(tmp_path: Path) -> None:
    (tmp_path / "key.pub").write_text("stale")
    key = key_pair(tmp_path / "key", "c")
    fingerprint = sh("ssh-keygen", "-y", "-f", str(key)).split()[1]
    assert fingerprint in key.with_suffix(".pub").read_text()


def test_known_hosts_names_each_host_by_address_and_name_with_its_own_key(tmp_path: Path) -> None:
    hosts = [LightHost("a", "10.93.7.10", tmp_path, LAN), LightHost("b", "10.93.7.20", tmp_path, LAN)]
    path = known_hosts(tmp_path, hosts)
    for host in hosts:
        key = host_key_of(tmp_path, host.name).with_suffix(".pub").read_text().split()[1]
        for name in (host.name, host.address):
            assert key in sh("ssh-keygen", "-f", str(path), "-F", name)
    assert subprocess.run(["ssh-keygen", "-f", path, "-F", "stranger"], check=False, capture_output=True).returncode


def tree(tmp_path: Path) -> LightHost:
    host = LightHost("h", "10.93.7.10", tmp_path, LAN)
    (host.root / "proc").mkdir(parents=True)
    (host.root / "etc").mkdir()
    (host.directory / "unpacked").write_text("x")
    return host


@root_only
def test_a_tree_with_a_mount_below_is_not_removed(tmp_path: Path) -> None:
    host = tree(tmp_path)

    def attempt() -> tuple[str, str]:
        sh("mount", "-t", "tmpfs", "tmpfs", str(host.root / "proc"))
        with pytest.raises(LabError) as refused:
            host.remove_tree()
        return refused.value.message, refused.value.cure

    message, cure = private(attempt)
    assert message == f"{host.root}/proc is still mounted below {host.root}"
    assert cure == f"umount {host.root}/proc"
    assert (host.root / "etc").exists()
    assert (host.directory / "unpacked").exists()
    private(host.remove_tree)
    assert not host.root.exists()
    assert not (host.directory / "unpacked").exists()


def test_an_interrupted_removal_does_not_look_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = tree(tmp_path)

    def interrupted(*argv: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(nspawn, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        host.remove_tree()
    assert host.root.exists()
    assert not (host.directory / "unpacked").exists()


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A tar with what a host's tree has at the least."""
    source = tmp_path / "source"
    for name in ("etc/ssh", "root", "usr"):
        (source / name).mkdir(parents=True)
    (source / "usr/large").write_bytes(bytes(100_000))
    (source / "etc/ssh/ssh_host_rsa_key").write_text("of the distribution")
    (source / "etc/machine-id").write_text("of the build")
    archive = tmp_path / "tree.tar"
    sh("tar", "-C", str(source), "-cf", str(archive), ".")
    return archive


def test_a_tree_is_unpacked_once_and_gets_its_own_name_keys_and_address(tar: Path, tmp_path: Path) -> None:
    host = LightHost("h", "10.93.7.10", tmp_path / "lab", LAN)
    host.unpack(tar)
    root = host.root
    assert (root / "etc/hostname").read_text() == "h\n"
    assert "Address=10.93.7.10/24" in (root / "etc/systemd/network/10-lab.network").read_text()
    assert [path.name for path in sorted((root / "etc/ssh").iterdir())] == [
        "ssh_host_ed25519_key",
        "ssh_host_ed25519_key.pub",
    ]
    assert (root / "etc/ssh/ssh_host_ed25519_key").read_bytes() == host_key_of(host.lab, "h").read_bytes()
    assert stat.S_IMODE((root / "etc/ssh/ssh_host_ed25519_key").stat().st_mode) == 0o600
    login = login_key_of(host.lab).with_suffix(".pub").read_bytes()
    assert (root / "root/.ssh/authorized_keys").read_bytes() == login
    assert (root / "etc/machine-id").read_text() != "of the build"
    (root / "etc/kept").write_text("state of the host")
    host.unpack(tar)
    assert (root / "etc/kept").exists()


def test_an_interrupted_unpack_is_redone_from_the_start(tar: Path, tmp_path: Path) -> None:
    host = LightHost("h", "10.93.7.10", tmp_path / "lab", LAN)
    (host.root / "etc").mkdir(parents=True)
    (host.root / "etc/half").write_text("of the interrupted run")
    host.unpack(tar)
    assert not (host.root / "etc/half").exists()
    assert (host.root / "usr").is_dir()
    assert (host.directory / "unpacked").exists()


def test_a_damaged_tar_is_an_error_and_never_looks_unpacked(tar: Path, tmp_path: Path) -> None:
    host = LightHost("h", "10.93.7.10", tmp_path / "lab", LAN)
    whole = tar.read_bytes()
    tar.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SawError, match="tar"):
        host.unpack(tar)
    assert not (host.directory / "unpacked").exists()
    tar.write_bytes(whole)
    host.unpack(tar)
    assert (host.directory / "unpacked").exists()


def test_a_tree_for_building_images_stays_as_the_tar_has_it(tar: Path, tmp_path: Path) -> None:
    host = LightHost("h", "10.93.7.10", tmp_path / "lab", LAN, booted=False)
    host.unpack(tar)
    assert (host.root / "etc/machine-id").read_text() == "of the build"
    assert not (host.root / "etc/hostname").exists()


@pytest.mark.parametrize("more", [(), ("SOURCE_DATE_EPOCH=1", "TZ=UTC")], ids=["nothing more", "of a build"])
def test_the_server_of_such_a_tree_sets_what_every_command_gets(tmp_path: Path, more: tuple[str, ...]) -> None:
    host = LightHost("h", "10.93.7.10", tmp_path / "lab", LAN, booted=False, environment=more)
    host.directory.mkdir(parents=True)
    command = shlex.split(host.ssh_server_only()[-1].partition("exec ")[2])
    assert f"SetEnv={' '.join(('SYSTEMD_OFFLINE=1', *more))}" in command


def links() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


@root_only
def test_the_network_comes_up_twice_and_leaves_nothing() -> None:
    def life() -> dict[str, object]:
        before = links()
        LAN.up()
        index = Path("/sys/class/net", LAN.uplink, "ifindex").read_text()
        LAN.up()
        same = Path("/sys/class/net", LAN.uplink, "ifindex").read_text() == index
        address = sh("ip", "-4", "-o", "addr", "show", "dev", LAN.uplink)
        bridge = sh("ip", "-n", LAN.namespace, "link", "show", "lab0")
        LAN.down()
        LAN.down()
        return {
            "same": same, "address": address, "bridge": bridge, "left": [name for name in links() if name not in before],
            "namespaces": sh("ip", "netns", "list"),
        }  # fmt: skip

    seen = private(life)
    assert seen["same"]
    assert f"{LAN.gateway}/24" in str(seen["address"])
    assert "UP" in str(seen["bridge"])
    assert seen["left"] == []
    assert seen["namespaces"] == ""


@root_only
def test_a_network_that_an_interrupted_run_left_half_made_is_made_whole() -> None:
    def life() -> str:
        sh("ip", "netns", "add", LAN.namespace)
        sh("ip", "link", "add", LAN.uplink, "type", "veth", "peer", "name", "uplink", "netns", LAN.namespace)
        LAN.up()
        shown = sh("ip", "-4", "-o", "addr", "show", "dev", LAN.uplink) + sh("ip", "-n", LAN.namespace, "link")
        LAN.down()
        return shown

    shown = private(life)
    assert f"{LAN.gateway}/24" in shown
    assert "lab0" in shown


def test_a_host_that_was_started_otherwise_is_told_from_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = LightHost("h", "10.93.7.10", tmp_path, LAN)
    now = LightHost(
        "h", "10.93.7.10", tmp_path, LAN, system_calls="landlock_create_ruleset", read_only=("/usr:/opt/x",)
    )
    assert "--bind-ro=/usr:/opt/x" in now.arguments()
    assert not now.outdated(), "it does not run"
    running: list[str] = []
    monkeypatch.setattr(nspawn, "recall", lambda _: os.getpid())
    monkeypatch.setattr(nspawn, "command_line", lambda _: running)
    for words, expected in (
        ([*now.arguments(), "--boot"], False),
        ([*before.arguments(), "--boot"], True),
        ([*now.arguments(), "--bind=/dev/kvm", "--boot"], True),
        (["unshare", "--mount", "sh"], False),  # not yet at what it is to become
        ([], False),
    ):
        running[:] = words
        assert now.outdated() is expected, words


def test_the_command_line_of_a_process_is_read_and_is_empty_when_it_has_ended() -> None:
    child = subprocess.Popen(["sleep", "600"])
    try:
        # it has no words yet for a moment while it becomes what it is
        process.wait_for("its words", lambda: process.command_line(child.pid) == ["sleep", "600"], patience=60)
    finally:
        child.kill()
        child.wait()
    assert process.command_line(child.pid) == []


def test_the_command_line_refuses_another_user(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if os.geteuid() == 0:
        assert private(lambda: nspawn.main(["--lab", "/nowhere", "network", "up"]), uid=65534) == 1
    else:
        assert nspawn.main(["--lab", "/nowhere", "network", "up"]) == 1


def test_the_lab_is_found_from_below_and_its_files_hold_what_tools_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAW_BUILD", str(tmp_path / "build"))
    lab = find_lab(ROOT / "src/saw")
    assert lab == Lab(ROOT, tmp_path / "build")
    credentials = lab.credentials()
    assert lab.credentials() == credentials
    lab.write_files({"perimeter_credentials": credentials})
    assert stat.S_IMODE(lab.inventory_file.stat().st_mode) == 0o600
    inventory = yaml.safe_load(lab.inventory_file.read_text())["all"]
    assert inventory["hosts"]["control"] == {"ansible_host": "10.77.0.10"}
    assert "StrictHostKeyChecking=yes" in inventory["vars"]["ansible_ssh_common_args"]
    context = lab.context_file.read_text()
    assert not any(value in context for value in credentials.values())
    assert Path(login_key_of(lab.directory)).exists()
