"""The qemu driver makes every part once, keeps what belongs to the user, and says no with a cure. Real qemu-img and swtpm."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from saw.cli import main as saw_main
from saw.errors import ConfigError
from saw.vm import accel, data_disk, qemu
from saw.vm.measure import parse_report
from saw.vm.spec import VmError, VmSpec, load_spec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "lab"))
from private_ns import private

Make = Callable[..., VmSpec]
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="makes private namespaces")


def backing(spec: VmSpec) -> str:
    shown = subprocess.run(
        ["qemu-img", "info", "--output=json", str(spec.directory / "root.qcow2")], capture_output=True, check=True
    )
    return str(json.loads(shown.stdout)["backing-filename"])


def command(*argv: str, capsys: pytest.CaptureFixture[str], expect: int = 0) -> dict[str, Any]:
    """Run ``saw vm … --json`` and return its answer."""
    capsys.readouterr()
    assert saw_main.main(["vm", *argv, "--json"]) == expect
    return dict(json.loads(capsys.readouterr().out))


# --- create, rebuild, destroy ------------------------------------------------------------------------------------------


def test_everything_is_made_once_and_a_second_time_changes_nothing(make_spec: Make) -> None:
    spec = make_spec()
    first = qemu.create(spec)
    assert first["changed"]
    assert first["directory"] == str(spec.directory)
    key = load_pem_public_key(first["ek_pub_pem"].encode())
    assert isinstance(key, rsa.RSAPublicKey)
    assert key.key_size == 2048
    files = {path: path.stat().st_mtime_ns for path in spec.directory.rglob("*") if path.is_file()}
    names = {str(path.relative_to(spec.directory)) for path in files}
    assert {"spec.json", "root.qcow2", "root.image", "image.verified", "data.img", "vars.fd"} <= names
    assert not [name for name in names if name.endswith(".new") or name.startswith(".tpm-")]
    assert stat.S_IMODE(spec.directory.stat().st_mode) == 0o700
    assert backing(spec) == spec.image
    second = qemu.create(spec)
    assert second == {**first, "changed": False}
    assert {path: path.stat().st_mtime_ns for path in spec.directory.rglob("*") if path.is_file()} == files
    label = subprocess.run(
        ["blkid", "-p", "-s", "LABEL", "-o", "value", str(spec.directory / "data.img")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert label.stdout.strip() == "saw-home"


@pytest.mark.control("P0-06")
def test_another_image_makes_the_root_disk_again_and_keeps_data_and_vtpm(make_spec: Make) -> None:
    spec, other = make_spec(tpm=True), make_spec(name="next")
    first = qemu.create(spec)
    (spec.directory / "vars.fd").write_bytes(b"boot entries of the old image")
    root = (spec.directory / "root.qcow2").stat().st_ino
    with (spec.directory / "data.img").open("r+b") as stream:
        stream.seek(40 * 1024 * 1024)
        stream.write(b"the user's work")
    kept = {path: path.read_bytes() for path in [spec.directory / "data.img", *(spec.directory / "tpm").iterdir()]}
    answer = qemu.rebuild(spec, other.image, other.image_sha256)
    assert answer["changed"]
    assert answer["ek_pub_pem"] == first["ek_pub_pem"]
    assert {path: path.read_bytes() for path in kept} == kept
    assert backing(spec) == other.image
    assert (spec.directory / "root.qcow2").stat().st_ino != root
    assert (spec.directory / "vars.fd").read_bytes() == b"factory"
    assert load_spec("ws-t").image_sha256 == other.image_sha256
    assert qemu.create(load_spec("ws-t"))["changed"] is False


def test_a_rebuild_on_the_same_image_throws_the_root_disk_away(make_spec: Make) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    subprocess.run(
        ["qemu-io", "-c", "write 0 64k", str(spec.directory / "root.qcow2")], capture_output=True, check=True
    )
    dirty = (spec.directory / "root.qcow2").stat().st_size
    assert qemu.rebuild(spec)["changed"]
    assert (spec.directory / "root.qcow2").stat().st_size < dirty


def test_refusals_of_a_rebuild_change_nothing(make_spec: Make, hypervisor: Path) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    marker = (spec.directory / "root.image").read_bytes()
    (hypervisor / "active").touch()
    with pytest.raises(VmError, match="VM ws-t runs") as running:
        qemu.rebuild(spec)
    assert running.value.cure == "stop the workspace first"
    (hypervisor / "active").unlink()
    with pytest.raises(VmError, match="needs its SHA-256") as half:
        qemu.rebuild(spec, spec.image)
    assert half.value.cure == "give both or none"
    with pytest.raises(ConfigError, match="no SHA-256"):
        qemu.rebuild(spec, spec.image, "1234")
    with pytest.raises(VmError, match="image /nowhere is not on this hypervisor") as absent:
        qemu.rebuild(spec, "/nowhere", "c" * 64)
    assert absent.value.cure == "run the image_build playbook"
    assert (spec.directory / "root.image").read_bytes() == marker
    assert load_spec("ws-t") == spec


def test_a_vm_keeps_its_number_and_needs_an_image_that_is_there(make_spec: Make) -> None:
    spec = make_spec(tpm=True)
    with pytest.raises(VmError, match="is not on this hypervisor") as absent:
        qemu.create(msgspec.structs.replace(spec, image="/nowhere"))
    assert absent.value.cure == "run the image_build playbook"
    qemu.create(spec)
    with pytest.raises(VmError, match="VM ws-t has number 7, not 8") as other:
        qemu.create(msgspec.structs.replace(spec, number=8))
    assert other.value.cure == "destroy the workspace first"
    assert qemu.create(msgspec.structs.replace(spec, memory_mib=1024))["changed"]


def test_an_interrupted_creation_is_continued(make_spec: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(tpm=True)
    real = qemu.run

    def interrupted(*argv: str, **options: Any) -> Any:
        if argv[0] == "mkfs.ext4":
            raise KeyboardInterrupt
        return real(*argv, **options)

    monkeypatch.setattr(data_disk, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qemu.create(spec)
    assert not (spec.directory / "data.img").exists()
    assert not (spec.directory / "spec.json").exists()
    monkeypatch.setattr(data_disk, "run", real)
    assert qemu.create(spec)["changed"]
    assert not qemu.create(spec)["changed"]


def test_a_vtpm_without_certificate_is_refused_and_not_made_again(make_spec: Make) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    for path in (spec.directory / "tpm").glob("ek-rsa2048.*"):
        path.unlink()
    with pytest.raises(VmError, match="has no RSA endorsement certificate") as refused:
        qemu.create(spec)
    assert refused.value.cure == "destroy and create the workspace"


def test_two_vms_have_different_endorsement_keys(make_spec: Make) -> None:
    one, two = make_spec(id="one", tpm=True), make_spec(id="two")
    two.directory.mkdir()
    assert not qemu.make_tpm(one)
    assert qemu.make_tpm(two)
    assert qemu.endorsement_key(one) != qemu.endorsement_key(two)
    assert [path.name for path in two.directory.iterdir()] == ["tpm"]


def test_destroying_removes_everything_and_an_interrupted_one_is_finished_by_the_next(
    make_spec: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = make_spec(tpm=True)
    qemu.create(spec)
    spec.runtime.mkdir(parents=True)
    real = qemu.shutil.rmtree

    def interrupted(path: Path, **options: Any) -> None:
        if path == spec.directory:
            raise KeyboardInterrupt
        real(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(qemu.shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qemu.destroy(spec)
    assert [path.name for path in spec.directory.iterdir()] == ["spec.json"]
    assert command("destroy", "ws-t", capsys=capsys) == {"ok": True, "changed": True}
    assert not spec.directory.exists()
    assert not spec.runtime.exists()
    assert command("destroy", "ws-t", capsys=capsys) == {"ok": True, "changed": False}


# --- the command line --------------------------------------------------------------------------------------------------


def test_the_verbs_answer_json_and_change_nothing_twice(
    make_spec: Make, hypervisor: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = msgspec.json.encode(make_spec(tpm=True))
    (hypervisor / "spec.json").write_bytes(raw)
    made = command("create", "--spec", str(hypervisor / "spec.json"), capsys=capsys)
    assert set(made) == {"ok", "changed", "ek_pub_pem", "directory"}
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert not command("create", "--spec", "-", capsys=capsys)["changed"]
    for verb, changed in (("start", True), ("start", False), ("poweroff", True), ("poweroff", False), ("stop", False)):
        assert command(verb, "ws-t", capsys=capsys) == {"ok": True, "changed": changed}, verb
    shown = command("status", "ws-t", capsys=capsys)
    told = {"id", "active", "number", "image_sha256", "devices", "wipe", "accel", "secure_boot", "console_tail"}
    assert set(shown) == {"ok", "changed", *told}
    assert (shown["active"], shown["number"]) == (False, 7)
    assert [vm["id"] for vm in command("list", capsys=capsys)["vms"]] == ["ws-t"]
    assert command("rebuild", "ws-t", capsys=capsys)["changed"]
    assert "start saw-vm@ws-t.service" in (hypervisor / "systemctl.log").read_text()


def test_errors_are_json_with_code_and_cure(hypervisor: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = command("status", "absent", capsys=capsys, expect=1)
    assert not answer["ok"]
    assert answer["error"] == {
        "code": "vm_failed", "message": "there is no VM absent on this hypervisor",
        "cure": "create it with the workspace_create playbook", "details": {},
    }  # fmt: skip
    answer = command("create", "--spec", str(hypervisor / "none.json"), capsys=capsys, expect=1)
    assert answer["error"]["code"] == "config_invalid"
    assert "No such file" in answer["error"]["message"]


def test_a_missing_tool_names_the_role_that_installs_it() -> None:
    with pytest.raises(VmError, match="no-such-tool is not installed") as refused:
        qemu.run("no-such-tool")
    assert refused.value.cure == "run the hypervisor role on this host"
    with pytest.raises(VmError, match=r"failed \(2\): broken"):
        qemu.run("sh", "-c", "echo broken >&2; exit 2")
    assert qemu.run("sh", "-c", "exit 2", check=False).returncode == 2


# --- qemu's arguments ----------------------------------------------------------------------------------------------------


def smbios(argv: list[str]) -> dict[str, str]:
    """Return the credentials behind the ``-smbios`` options."""
    found = {}
    for option, value in itertools.pairwise(argv):
        if option == "-smbios":
            kind, _, path = value.partition(",path=")
            assert kind == "type=11"
            name, _, content = Path(path).read_text().removeprefix("io.systemd.credential.binary:").partition("=")
            found[name] = base64.b64decode(content).decode()
    return found


def test_credentials_reach_the_guest_by_file_and_never_by_argument(make_spec: Make) -> None:
    spec = make_spec(credentials={"saw.workspace": '{"workspace_id": "ws-t"}'})
    spec.runtime.mkdir(parents=True, mode=0o700)
    argv = qemu.command_line(spec, "tcg")
    told = smbios(argv)
    assert told["saw.workspace"] == '{"workspace_id": "ws-t"}'
    assert told["system.hostname"] == "ws-t"
    assert "Address=10.210.7.2/30" in told["network.network.50-saw"]
    assert "IPv6AcceptRA=no" in told["network.network.50-saw"]
    assert "workspace_id" not in " ".join(argv)


def test_a_vm_without_network_has_no_network_device(make_spec: Make) -> None:
    with_network, without = make_spec(), make_spec(network=False)
    with_network.runtime.mkdir(parents=True)
    argv = qemu.command_line(with_network, "tcg")
    assert "tap,id=net0,ifname=sawtap7,script=no,downscript=no" in argv
    assert "virtio-net-pci,netdev=net0,romfile=,mac=52:54:00:5a:00:07" in argv
    argv = qemu.command_line(without, "tcg")
    assert "-netdev" not in argv
    assert not [word for word in argv if "net0" in word]
    assert "-nodefaults" in argv
    assert smbios(argv) == {"system.hostname": "ws-t"}


def test_the_accelerator_picks_the_cpu(make_spec: Make) -> None:
    spec = make_spec(network=False)
    spec.runtime.mkdir(parents=True)
    kvm, tcg = (" ".join(qemu.command_line(spec, name)) for name in ("kvm", "tcg"))
    assert "-accel kvm -cpu host" in kvm
    assert "-accel tcg,thread=multi -cpu max" in tcg
    for line in (kvm, tcg):
        assert f"readonly=on,file={qemu.FIRMWARE}" in line
        assert "tpm-crb,tpmdev=tpm0" in line


@pytest.mark.parametrize(("program", "status"), [("exec sleep 60", 75), ("echo hello > {console}; exit 3", 3)])
def test_a_start_without_a_word_on_the_console_is_ended_and_one_with_goes_its_way(
    make_spec: Make, hypervisor: Path, monkeypatch: pytest.MonkeyPatch, program: str, status: int
) -> None:
    spec = make_spec(network=False, accel="tcg", tpm=True)
    qemu.create(spec)
    console = spec.directory / "console.log"
    console.write_text("of the start before")
    machine = hypervisor / "tools/qemu-system-x86_64"
    machine.write_text("#!/bin/sh\n" + program.format(console=console))
    machine.chmod(0o755)
    monkeypatch.setattr(qemu, "SILENCE", 0.2)
    assert qemu.execute(spec) == status
    assert console.with_suffix(".previous").read_text() == "of the start before"
    assert stat.S_IMODE(spec.runtime.stat().st_mode) == 0o700


@root_only
def test_the_private_network_comes_up_twice_without_ipv6_tells_no_other_address_and_goes(make_spec: Make) -> None:
    spec = make_spec()

    def life() -> dict[str, Any]:
        qemu.network_up(spec)
        qemu.network_up(spec)
        addresses = json.loads(subprocess.run(["ip", "-j", "addr"], capture_output=True, check=True).stdout)
        links = {link["ifname"]: link for link in addresses}
        seen = {
            "addresses": [f"{a['local']}/{a['prefixlen']}" for a in links["sawbr7"]["addr_info"]],
            "tap": [a["local"] for a in links["sawtap7"]["addr_info"]],
            "master": links["sawtap7"]["master"],
            "ipv6": [
                Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text().strip()
                for name in ("sawbr7", "sawtap7")
            ],
            "arp": Path("/proc/sys/net/ipv4/conf/sawbr7/arp_ignore").read_text().strip(),
        }
        qemu.network_down(spec)
        qemu.network_down(spec)
        seen["left"] = sorted(path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith("saw"))
        return seen

    assert private(life) == {
        "addresses": ["10.210.7.1/30"], "tap": [], "master": "sawbr7", "ipv6": ["1", "1"], "arp": "1", "left": [],
    }  # fmt: skip


# --- acceleration and measurement ----------------------------------------------------------------------------------------


def kernel() -> Path | None:
    """Return a kernel of this machine that qemu can boot, if there is one."""
    root = Path(__file__).resolve().parents[3]
    found = [*(root / "build/images").glob("*/vmlinuz"), *Path("/boot").glob("vmlinuz-*")]
    return found[0] if found else None


def test_a_probe_says_why_and_is_asked_once_per_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = kernel()
    if image is None or not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("needs /dev/kvm and a kernel")
    cache = tmp_path / "run/accel.json"
    found = accel.probe(image, cache, patience=2.0)
    if found.name == "kvm":
        assert found.reason == "a kernel booted under KVM"
    else:
        assert found.name == "tcg"
        assert "KVM ended with" in found.reason or "/dev/kvm opens, but a kernel printed nothing" in found.reason
    asked: list[Path] = []

    def again(path: Path, patience: float) -> accel.Acceleration:
        asked.append(path)
        return accel.Acceleration("tcg", "asked again")

    monkeypatch.setattr(accel, "try_kvm", again)
    assert accel.probe(image, cache) == found
    assert asked == []
    known = json.loads(cache.read_bytes())
    cache.write_text(json.dumps({**known, "boot_id": "another boot"}))
    assert accel.probe(image, cache).reason == "asked again"
    cache.write_text("{")
    assert accel.probe(image, cache).reason == "asked again"
    assert len(asked) == 2


def test_no_kernel_means_emulation_and_is_not_kept(tmp_path: Path) -> None:
    found = accel.probe(tmp_path / "vmlinuz", tmp_path / "accel.json")
    assert found.name == "tcg"
    assert "software emulation" in found.reason
    assert not (tmp_path / "accel.json").exists()


@root_only
def test_a_missing_device_means_emulation_and_names_the_cure(tmp_path: Path) -> None:
    (tmp_path / "vmlinuz").touch()
    found = private(lambda: accel.try_kvm(tmp_path / "vmlinuz", 1.0), tmpfs={"/dev": "1m"})
    assert (found.name, found.reason) == ("tcg", "/dev/kvm is missing: software emulation")
    assert "about five times slower" in found.cure
    assert "nested" in found.cure
    assert "give a container the device /dev/kvm" in found.cure


@root_only
def test_a_device_that_this_user_may_not_open_is_told_from_a_missing_one(tmp_path: Path) -> None:
    def attempt() -> accel.Acceleration:
        Path("/dev/kvm").touch(mode=0o600)
        os.setuid(65534)
        return accel.try_kvm(Path("/nowhere/vmlinuz"), 1.0)

    found = private(attempt, tmpfs={"/dev": "1m"})
    assert found.reason == "/dev/kvm may not be read and written by this user: software emulation"
    assert found.cure.endswith("give the user, or the container, the device")


@root_only
@pytest.mark.skipif(not shutil.which("qemu-system-x86_64"), reason="needs qemu")
def test_a_device_that_is_no_kvm_means_emulation_with_qemus_word(tmp_path: Path) -> None:
    """The node is there and opens, but what answers is not KVM."""
    image = kernel() or tmp_path / "vmlinuz"
    if not image.exists():
        image.write_bytes(bytes(4096))

    def attempt() -> accel.Acceleration:
        for name, minor in (("kvm", 3), ("null", 3), ("urandom", 9), ("zero", 5)):
            os.mknod(f"/dev/{name}", 0o666 | stat.S_IFCHR, os.makedev(1, minor))
        return accel.try_kvm(image, 20.0)

    found = private(attempt, tmpfs={"/dev": "1m"})
    assert found.name == "tcg"
    assert found.reason.startswith("/dev/kvm is there, but qemu under KVM ended with ")
    assert "nested" in found.cure


REPORT = (
    "noise\r\nSAW-BOOT-REPORT-BEGIN\r\n  sha256:\r\n    0 : 0x{a}\r\n    11: 0x{b}\r\n\x1b[0mSAW-BOOT-REPORT-END\r\n"
)


def test_a_boot_report_is_read_only_when_complete() -> None:
    text = REPORT.format(a="A" * 64, b="1" * 64)
    assert parse_report(text) == {"0": "a" * 64, "11": "1" * 64}
    assert parse_report(text.partition("SAW-BOOT-REPORT-END")[0]) == {}
    assert parse_report("0 : 0x" + "a" * 64) == {}
    assert parse_report(REPORT.format(a="A" * 63, b="1" * 64)) == {"11": "1" * 64}
