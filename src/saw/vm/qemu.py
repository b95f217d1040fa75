"""The qemu driver: one VM = one directory, one swtpm unit, one qemu unit, one private bridge.

``create`` is idempotent and resumable: every artefact is made under a temporary name and renamed when complete. The vTPM is
made exactly once; its endorsement key is read from the certificate that the TPM's maker step writes (TCG EK Credential
Profile, template L-1), and a rebuild keeps it together with the data disk.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from saw import addressing, jsontext
from saw.datadisk.config import ONCE
from saw.files import write_atomic, write_private
from saw.vm import data_disk, devices, golden, released, secure_boot, wiped
from saw.vm.accel import probe
from saw.vm.programs import run
from saw.vm.spec import RUNTIME, STATE, VmError, VmSpec, parse_spec

FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.fd")
FIRMWARE_VARS = Path("/usr/share/OVMF/OVMF_VARS_4M.fd")
SILENCE = 60.0
"""Seconds without a byte on the console after which a start counts as stuck."""


def create(spec: VmSpec, *, renew: bool = False) -> dict[str, Any]:
    """Make every part of the VM that is missing; return ``{changed, ek_pub_pem, directory}``. Nothing is started.

    The image file must have the digest of ``spec``, else :class:`golden.ImageRefusedError`, and a current release record, else
    :class:`saw.vm.trust.RecordRefusedError`; nothing changes then. ``renew`` makes the root disk again and reads the image again.
    """
    directory, changed = spec.directory, False
    encoded = msgspec.json.format(msgspec.json.encode(spec))
    spec_file = directory / "spec.json"
    stored = spec_file.read_bytes() if spec_file.exists() else b""
    if stored != encoded:
        if stored and (old := parse_spec(stored)).number != spec.number:
            raise VmError(
                f"VM {spec.id} has number {old.number}, not {spec.number}", cure="destroy the workspace first"
            )
        if stored:
            wiped.refuse_released(old, spec)
        changed = True
    wiped.refuse_wiped(spec)
    data_disk.refuse(parse_spec(stored) if stored else None, spec)
    devices.refuse_taken(spec)
    released.require(spec)
    golden.verify(spec, again=renew)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    changed |= make_root_disk(spec, renew=renew)
    changed |= data_disk.make(spec)
    changed |= make_tpm(spec)
    changed |= secure_boot.make_variables(spec, FIRMWARE_VARS)
    if stored != encoded:
        write_atomic(spec_file, encoded, mode=0o600)
    return {"changed": changed, "ek_pub_pem": endorsement_key(spec), "directory": str(directory)}


def rebuild(spec: VmSpec, image: str = "", image_sha256: str = "") -> dict[str, Any]:
    """Make the root disk again, from ``image`` when one is given; data disk and vTPM stay. Refused while the VM runs."""
    if active(spec.id):
        raise VmError(f"VM {spec.id} runs", cure="stop the workspace first")
    if bool(image) != bool(image_sha256):
        raise VmError("an image needs its SHA-256 and the other way round", cure="give both or none")
    fresh = msgspec.structs.replace(spec, image=image, image_sha256=image_sha256) if image else spec
    fresh = parse_spec(msgspec.json.encode(fresh))
    return {**create(fresh, renew=True), "changed": True}


def make_root_disk(spec: VmSpec, *, renew: bool = False) -> bool:
    """Make the overlay on the golden image; a different image, or ``renew``, throws old overlay and firmware state away.

    The old ones stay until the new overlay is complete.
    """
    disk, marker = spec.directory / "root.qcow2", spec.directory / "root.image"
    if not renew and root_disk_fits(spec):
        return False
    temporary = spec.directory / "root.qcow2.new"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", spec.image, str(temporary))
    marker.unlink(missing_ok=True)
    os.replace(temporary, disk)
    for part in ("vars.fd", secure_boot.MARKER):
        (spec.directory / part).unlink(missing_ok=True)
    write_atomic(marker, root_disk_of(spec))
    return True


def root_disk_of(spec: VmSpec) -> str:
    """Return what ``root.image`` holds beside a root disk that lies on the image of ``spec``."""
    return f"{spec.image_sha256} {spec.image}\n"


def root_disk_fits(spec: VmSpec) -> bool:
    """Tell whether there is a root disk and it lies on the image of ``spec``."""
    try:
        held = (spec.directory / "root.image").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False
    return held == root_disk_of(spec) and (spec.directory / "root.qcow2").exists()


def startable(spec: VmSpec) -> None:
    """Raise :class:`VmError` unless the root disk is whole and lies on an image file that has the digest of ``spec``, and that
    image has a current release record."""
    if not root_disk_fits(spec):
        raise VmError(
            f"the root disk of {spec.id} was not finished or lies on another image",
            cure="finish what made it: playbook workspace_rebuild (or workspace_create)",
        )
    released.require(spec)
    golden.verify(spec)
    secure_boot.startable(spec)


def make_tpm(spec: VmSpec) -> bool:
    """Manufacture the vTPM once: state, EK and EK certificate, signed by this hypervisor's own swtpm CA."""
    state = spec.directory / "tpm"
    if state.exists():
        return False
    authority = STATE.parent / "swtpm-ca"
    authority.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tpm-", dir=spec.directory) as scratch:
        work = Path(scratch)
        fresh = work / "tpm"
        fresh.mkdir(mode=0o700)
        (work / "localca.conf").write_text(
            f"statedir = {authority}\nsigningkey = {authority}/signkey.pem\n"
            f"issuercert = {authority}/issuercert.pem\ncertserial = {authority}/certserial\n",
            encoding="utf-8",
        )
        (work / "localca.options").write_text(
            "--platform-manufacturer saw\n--platform-version 1\n--platform-model qemu\n", encoding="utf-8"
        )
        (work / "setup.conf").write_text(
            f"create_certs_tool = {shutil.which('swtpm_localca') or '/usr/bin/swtpm_localca'}\n"
            f"create_certs_tool_config = {work}/localca.conf\ncreate_certs_tool_options = {work}/localca.options\n",
            encoding="utf-8",
        )
        run(
            "swtpm_setup", "--tpm2", "--tpmstate", str(fresh), "--create-ek-cert", "--pcr-banks", "sha256",
            "--config", str(work / "setup.conf"), "--write-ek-cert-files", str(fresh), "--vmid", spec.id, timeout=60,
        )  # fmt: skip
        os.replace(fresh, state)
    return True


def endorsement_key(spec: VmSpec) -> str:
    """Return the RSA-2048 EK's public key as PEM SubjectPublicKeyInfo."""
    certificates = sorted((spec.directory / "tpm").glob("ek-rsa2048.*"))
    if not certificates:
        raise VmError(
            f"the vTPM of {spec.id} has no RSA endorsement certificate", cure="destroy and create the workspace"
        )
    raw = certificates[0].read_bytes()
    certificate = (
        x509.load_pem_x509_certificate(raw) if raw.startswith(b"-----") else x509.load_der_x509_certificate(raw)
    )
    key = certificate.public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


def network_up(spec: VmSpec) -> None:
    """Make bridge and tap of the VM's private network; IPv6 is off on both, and ARP tells of no other address of this host."""
    for name, kind in ((spec.bridge, ("type", "bridge", "forward_delay", "0")), (spec.tap, None)):
        if Path("/sys/class/net", name).exists():
            continue
        if kind:
            run("ip", "link", "add", name, *kind)
        else:
            run("ip", "tuntap", "add", "dev", name, "mode", "tap")
    for name in (spec.bridge, spec.tap):
        with contextlib.suppress(OSError):
            Path("/proc/sys/net/ipv6/conf", name, "disable_ipv6").write_text("1", encoding="ascii")
    try:
        Path("/proc/sys/net/ipv4/conf", spec.bridge, "arp_ignore").write_text("1", encoding="ascii")
    except OSError as error:
        raise VmError(
            f"bridge {spec.bridge} would answer ARP for every address of this host: {error}",
            cure="give this host a writable /proc/sys/net",
        ) from error
    run("ip", "link", "set", spec.tap, "master", spec.bridge)
    run("ip", "addr", "replace", f"{spec.gateway}/30", "dev", spec.bridge)
    run("ip", "link", "set", spec.bridge, "up")
    run("ip", "link", "set", spec.tap, "up")


def network_down(spec: VmSpec) -> None:
    """Remove tap and bridge."""
    for name in (spec.tap, spec.bridge):
        if Path("/sys/class/net", name).exists():
            run("ip", "link", "delete", name)


def command_line(spec: VmSpec, accel: str) -> list[str]:
    """Return qemu's argument list. Measured by the firmware: UKI, boot variables; SMBIOS goes into PCR 1 alone."""
    run_dir, directory = spec.runtime, spec.directory
    signed = bool(secure_boot.origin(spec))
    machine = "q35,smm=on,vmport=off" if signed else "q35,smm=off,vmport=off"
    argv = [
        "qemu-system-x86_64", "-name", spec.id, "-machine", machine, "-m", str(spec.memory_mib),
        "-smp", str(spec.cpus), "-display", "none", "-nodefaults", "-no-user-config", "-no-reboot",
        "-chardev", f"file,id=console,path={directory / 'console.log'}", "-serial", "chardev:console",
        "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={secure_boot.FIRMWARE if signed else FIRMWARE}",
        "-drive", f"if=pflash,format=raw,unit=1,file={directory / 'vars.fd'}",
        "-drive", f"if=none,id=root,file={directory / 'root.qcow2'},format=qcow2,cache=writeback,discard=unmap",
        "-device", "nvme,drive=root,serial=root,bootindex=1",
        "-drive", f"if=none,id=data,file={directory / 'data.img'},format=raw,cache=writeback,discard=unmap",
        "-device", "nvme,drive=data,serial=data",
        "-object", "rng-random,id=rng0,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng0",
        "-chardev", f"socket,id=tpm,path={run_dir / 'tpm.sock'}", "-tpmdev", "emulator,id=tpm0,chardev=tpm",
        "-device", "tpm-crb,tpmdev=tpm0",
        "-qmp", f"unix:{run_dir / 'qmp.sock'},server=on,wait=off",
    ]  # fmt: skip
    argv += ["-accel", "kvm", "-cpu", "host"] if accel == "kvm" else ["-accel", "tcg,thread=multi", "-cpu", "max"]
    argv += secure_boot.ARGUMENTS if signed else ()
    argv += devices.arguments(spec)
    if spec.network:
        argv += [
            "-netdev", f"tap,id=net0,ifname={spec.tap},script=no,downscript=no",
            "-device", f"virtio-net-pci,netdev=net0,romfile=,mac={addressing.mac(spec.number)}",
        ]  # fmt: skip
    told = {**spec.credentials, **network_credentials(spec), **data_disk.credentials(spec)}
    for name, value in sorted(told.items()):
        path = credential_file(spec, name)
        write_private(path, f"io.systemd.credential.binary:{name}={base64.b64encode(value.encode()).decode()}")
        argv += ["-smbios", f"type=11,path={path}"]
    return argv


def credential_file(spec: VmSpec, name: str) -> Path:
    """Return the file out of which qemu reads the credential ``name`` when it starts."""
    return spec.runtime / f"credential-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def network_credentials(spec: VmSpec) -> dict[str, str]:
    """Return the systemd credentials that give the VM its name and its address (systemd-network-generator(8))."""
    network = (
        f"[Match]\nName=en*\n[Network]\nAddress={spec.address}/30\nLinkLocalAddressing=no\nIPv6AcceptRA=no\nLLMNR=no\n"
        "MulticastDNS=no\n"
    )
    return (
        {"network.network.50-saw": network, "system.hostname": spec.id}
        if spec.network
        else {"system.hostname": spec.id}
    )


def execute(spec: VmSpec) -> int:
    """Run qemu in the foreground under a watchdog; the unit's main process. A start without console output is killed."""
    startable(spec)
    spec.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    accel = spec.accel
    if accel == "auto":
        found = probe(Path(spec.image).with_name("vmlinuz"), RUNTIME / "accel.json")
        accel = "kvm" if found.name == "kvm" else "tcg"
        print(f"acceleration: {found.name} ({found.reason})", flush=True)
    if spec.network:
        network_up(spec)
    console = spec.directory / "console.log"
    with contextlib.suppress(FileNotFoundError):
        os.replace(console, console.with_suffix(".previous"))
    # A stop ends qemu and waits for it: only then are the disks' locks free and the memory given back.
    signal.signal(signal.SIGTERM, _ended_by_unit)
    try:
        return _watched(spec, subprocess.Popen(command_line(spec, accel), stdin=subprocess.DEVNULL), console)
    finally:
        credential_file(spec, ONCE).unlink(missing_ok=True)


def _watched(spec: VmSpec, child: subprocess.Popen[bytes], console: Path) -> int:
    """Wait for qemu to end; return its status, or 75 when it says nothing on the console and was killed."""
    try:
        deadline = time.monotonic() + SILENCE
        while (status := child.poll()) is None:
            if deadline and console.exists() and console.stat().st_size:
                deadline = 0.0
                data_disk.started(spec)
                credential_file(spec, ONCE).unlink(missing_ok=True)  # qemu has read it, and no later start gets it
            if deadline and time.monotonic() > deadline:
                print(f"no console output within {SILENCE:.0f} s: this start is stuck, ending it", flush=True)
                child.kill()
                child.wait()
                return 75
            time.sleep(0.5 if deadline else 1.0)
    except BaseException:
        child.terminate()
        child.wait(20)
        raise
    if console.exists() and console.stat().st_size:
        data_disk.started(spec)
    return int(status)


def _ended_by_unit(number: int, frame: object) -> None:
    del number, frame
    raise SystemExit(0)


def qmp(spec: VmSpec, *commands: dict[str, Any]) -> list[dict[str, Any]]:
    """Send QMP ``commands`` and return their answers (qemu machine protocol)."""
    answers: list[dict[str, Any]] = []
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(spec.runtime / "qmp.sock"))
        stream = connection.makefile("rwb")
        stream.readline()
        for command in ({"execute": "qmp_capabilities"}, *commands):
            stream.write(msgspec.json.encode(command) + b"\n")
            stream.flush()
            while True:
                answer = jsontext.decode(stream.readline() or b'{"error":"closed"}')
                if "return" in answer or "error" in answer:
                    answers.append(answer)
                    break
    return answers[1:]


def unit(spec_id: str) -> str:
    """Name of the VM's systemd unit."""
    return f"saw-vm@{spec_id}.service"


def active(spec_id: str) -> bool:
    """Tell whether the VM's unit runs."""
    return run("systemctl", "is-active", "--quiet", unit(spec_id), check=False).returncode == 0


def start(spec: VmSpec) -> bool:
    """Start the VM; return whether anything changed."""
    if active(spec.id):
        return False
    wiped.refuse_wiped(spec)
    startable(spec)
    run("systemctl", "reset-failed", unit(spec.id), check=False)
    run("systemctl", "start", unit(spec.id), timeout=120)
    return True


def stop(spec: VmSpec, *, patience: float = 60.0) -> bool:
    """Ask the guest to power off (Ctrl-Alt-Del, which the image maps to power-off), then stop the unit."""
    if not active(spec.id):
        return False
    keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
    with contextlib.suppress(OSError, msgspec.DecodeError):
        qmp(spec, {"execute": "send-key", "arguments": {"keys": keys}})
        deadline = time.monotonic() + patience
        while active(spec.id) and time.monotonic() < deadline:
            time.sleep(0.3)
    power_off(spec)
    return True


def power_off(spec: VmSpec) -> bool:
    """End the VM at once, without asking it (kill)."""
    was = active(spec.id)
    run("systemctl", "stop", unit(spec.id), timeout=60)
    run("systemctl", "reset-failed", unit(spec.id), check=False)
    return was


def destroy(spec: VmSpec) -> bool:
    """End the VM and remove everything of it: disks, vTPM, network.

    The specification goes last: an interrupted removal is found and finished by the next one, so that no later VM of the
    same name finds this one's disk or vTPM. A VM that asks for a wipe is ended and stays until it was wiped: its devices, its
    number and its disks go to nobody.
    """
    power_off(spec)
    wiped.refuse_unwiped(spec)
    data_disk.erase(spec)
    run("systemctl", "stop", f"saw-swtpm@{spec.id}.service", check=False)
    network_down(spec)
    for part in spec.directory.iterdir():
        if part.is_dir():
            shutil.rmtree(part)
        elif part.name not in {"spec.json", wiped.RECORD}:
            part.unlink()
    shutil.rmtree(spec.directory)
    shutil.rmtree(spec.runtime, ignore_errors=True)
    return True


def status(spec: VmSpec) -> dict[str, Any]:
    """Return ``{id, active, number, image_sha256, devices, wipe, accel, secure_boot, console_tail}``."""
    console = spec.directory / "console.log"
    tail = console.read_bytes()[-400:].decode("utf-8", "replace") if console.exists() else ""
    accel = ""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        accel = str(jsontext.decode((RUNTIME / "accel.json").read_bytes()).get("name", ""))
    return {
        "id": spec.id,
        "active": active(spec.id),
        "number": spec.number,
        "image_sha256": spec.image_sha256,
        "devices": list(spec.devices),
        "wipe": spec.wipe,
        "accel": accel or spec.accel,
        "secure_boot": bool(secure_boot.origin(spec)),
        "console_tail": tail,
    }
