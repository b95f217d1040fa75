"""Reference boot of a golden image: what the firmware and the boot stub really measure on this hypervisor.

The image's ``saw-boot-report.service`` runs only when the systemd credential ``saw.measure`` is present; it prints the PCR
values and the firmware's variable SecureBoot between two marker lines on the console and powers off. A workspace never gets that
credential.

Its disks lie outside the folder of the workspaces, whose names are free: one may be called ``measure``.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from saw.vm import golden, qemu, secure_boot
from saw.vm.accel import probe
from saw.vm.spec import RUNTIME, VmError, VmSpec

PLACE = Path("/var/lib/saw/measure")
RUNTIME_PLACE = Path("/run/saw/measure")
#: Ends swtpm and qemu with this process, however it ends.
BOUND = ("setpriv", "--pdeathsig", "KILL")
LINE = re.compile(r"^\s*(\d{1,2})\s*:\s*0x([0-9A-Fa-f]{64})\s*$")
SECURE_LINE = re.compile(r"^\s*SecureBoot\s*:\s*1\s*$")


def parse_report(console: str) -> dict[str, str]:
    """Return ``{pcr: lower-case hex}`` out of the console text, or an empty mapping while the report is not complete."""
    return {match[1]: match[2].lower() for line in _report(console) if (match := LINE.match(line))}


def saw_secure_boot(console: str) -> bool:
    """Tell whether the system that ran read SecureBoot as 1 out of the firmware's variables (UEFI 2.10, 3.3)."""
    return any(SECURE_LINE.match(line) for line in _report(console))


def _report(console: str) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.replace("\r", ""))
    _, marker, rest = text.partition("SAW-BOOT-REPORT-BEGIN")
    body, end, _ = rest.partition("SAW-BOOT-REPORT-END")
    return body.splitlines() if marker and end else []


class ReferenceVm(VmSpec, frozen=True, forbid_unknown_fields=True):
    """The VM of a reference boot: no workspace, so it lies in none of the workspaces' places. It is there to make a record."""

    @property
    def needs_record(self) -> bool:
        """No: it has no network, and ends when it has reported."""
        return False

    @property
    def directory(self) -> Path:
        """Its disks and its vTPM."""
        return PLACE / "vm"

    @property
    def runtime(self) -> Path:
        """Its sockets."""
        return RUNTIME_PLACE


@contextmanager
def alone(patience: float) -> Iterator[None]:
    """Hold the hypervisor's one place for reference boots; raise :class:`VmError` when it is not free in ``patience`` seconds."""
    try:
        PLACE.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(PLACE / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except PermissionError as error:
        raise VmError(f"a reference boot needs {PLACE}: {error.strerror}", cure="run it as root") from error
    try:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise VmError(
                        "another reference boot runs on this hypervisor", cure="run this again when it has ended"
                    ) from error
            time.sleep(0.1)
        yield
    finally:
        os.close(lock)


def firmware_sha256() -> str:
    """Return the digest (hex) of the firmware and its factory settings on this machine, which PCR 0 to 3 and 7 depend on; of the
    one for secure boot too, where it is there."""
    whole = hashlib.sha256()
    secure = (secure_boot.FIRMWARE,) if secure_boot.FIRMWARE.exists() else ()
    for part in (qemu.FIRMWARE, qemu.FIRMWARE_VARS, *secure):
        try:
            whole.update(hashlib.sha256(part.read_bytes()).digest())
        except OSError as error:
            raise VmError(f"cannot read {part}: {error.strerror}", cure="install the package ovmf") from error
    return whole.hexdigest()


def reference_boot(image: Path, *, patience: float) -> dict[str, Any]:
    """Boot ``image`` with a fresh vTPM; raises :class:`VmError`.

    Returns ``{image_sha256, firmware_sha256, pcrs, secure_boot, seconds, accel}``. An image with its owner's variable store
    beside it boots with that store, and has to see that secure boot is on. ``patience`` in seconds holds for each attempt, and
    for another reference boot to end.
    """
    firmware = firmware_sha256()
    with alone(patience), ExitStack() as cleanup:
        hashed = golden.hash_image(image)
        golden.matches(hashed, hashed.sha256)
        spec = ReferenceVm(
            id="reference-boot", number=250, image=str(image), image_sha256=hashed.sha256, data_disk_mib=64,
            credentials={"saw.measure": "1"}, network=False,
        )  # fmt: skip
        shutil.rmtree(spec.directory, ignore_errors=True)
        cleanup.callback(shutil.rmtree, spec.directory, ignore_errors=True)
        cleanup.callback(shutil.rmtree, spec.runtime, ignore_errors=True)
        golden.remember(spec, hashed)
        qemu.create(spec)
        secure_boot.startable(spec)
        signed = bool(secure_boot.origin(spec))
        spec.runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
        accel = probe(image.with_name("vmlinuz"), RUNTIME / "accel.json")
        for attempt in (1, 2):
            started = time.monotonic()
            report = one_boot(spec, accel.name, patience)
            if report:
                if signed and not saw_secure_boot(_console(spec)):
                    raise VmError(
                        "the image booted with its owner's keys, and its system does not see secure boot",
                        cure="make the variable store anew: saw image secure-boot enrol; build and measure again",
                    )
                kept = {number: report[number] for number in sorted(report, key=int) if int(number) <= 14}
                return {
                    "image_sha256": spec.image_sha256,
                    "firmware_sha256": firmware,
                    "pcrs": kept,
                    "secure_boot": signed,
                    "seconds": round(time.monotonic() - started, 1),
                    "accel": msgspec.to_builtins(accel),
                }
            print(f"reference boot {attempt}: no report; console kept in the error below", file=sys.stderr)
        console = _console(spec)[-1500:]
        if signed and ("Access Denied" in console or "Security Violation" in console):
            raise VmError(
                f"the firmware refuses the image; its console ends with:\n{console}",
                cure="sign it with a key whose certificate is in db of the store beside it (docs/images.md)",
            )
        raise VmError(f"the image did not report its boot measurements; its console ends with:\n{console}")


def _console(spec: VmSpec) -> str:
    console = spec.directory / "console.log"
    return console.read_bytes().decode("utf-8", "replace") if console.exists() else ""


def one_boot(spec: VmSpec, accel: str, patience: float) -> dict[str, str]:
    """Start swtpm and qemu once, wait for the report or the end of ``patience``, and end both."""
    socket_path = spec.runtime / "tpm.sock"
    socket_path.unlink(missing_ok=True)
    console = spec.directory / "console.log"
    console.unlink(missing_ok=True)
    tpm = subprocess.Popen(
        [
            *BOUND,
            "swtpm",
            "socket",
            "--tpm2",
            "--tpmstate",
            f"dir={spec.directory / 'tpm'}",
            "--ctrl",
            f"type=unixio,path={socket_path}",
        ],
        stdin=subprocess.DEVNULL,
    )
    try:
        while not socket_path.exists() and tpm.poll() is None:
            time.sleep(0.05)
        machine = subprocess.Popen([*BOUND, *qemu.command_line(spec, accel)], stdin=subprocess.DEVNULL)
        try:
            begin = time.monotonic()
            while time.monotonic() - begin < patience:
                text = _console(spec)
                report = parse_report(text)
                if report or machine.poll() is not None:
                    return report
                if not text and time.monotonic() - begin > qemu.SILENCE:
                    return {}
                time.sleep(0.3)
            return {}
        finally:
            machine.kill()
            machine.wait()
    finally:
        tpm.terminate()
        tpm.wait()
