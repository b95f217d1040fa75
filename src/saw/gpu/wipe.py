"""The wipe of one VM when its user goes: memory of its GPUs and its disks, ending in a signed record.

The record is the payload of a DSSE envelope, signed on the hypervisor. It is laid beside the VM's disks last, when all of it was
wiped and read back; the driver releases nothing of a VM that asks for a wipe and has no such record (:mod:`saw.vm.wiped`).

A GPU is reset by the kernel, through its PCI function (``reset`` below ``/sys/bus/pci/devices``), while no VM has it. NVIDIA
documents no promise that a reset clears its memory; the record says what was done, not more.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import rfc8785

from saw import jsontext
from saw.files import write_atomic
from saw.gpu.scratch import Wiped, WipeFailed, wipe
from saw.policy.envelope import EnvelopeRefused, seal, verify_envelope
from saw.policy.keys import PublicKey
from saw.policy.signers import Signer
from saw.vm import wiped
from saw.vm.spec import VmSpec

PAYLOAD_TYPE = "application/vnd.saw.wipe+json"
"""DSSE payload type of a record."""
DISKS = ("data.img", "root.qcow2", "root.qcow2.new", "vars.fd")


class GpuReset(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A GPU that was reset, by PCI address, and how."""

    device: str
    method: Literal["pci-reset"] = "pci-reset"


class WipeRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was wiped of a VM, when (RFC 3339), where and why; ``image_sha256`` is what it ran."""

    format: Literal["saw-wipe/1"]
    workspace: Annotated[str, msgspec.Meta(min_length=1, max_length=63)]
    image_sha256: str
    host: str
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]
    begun: datetime
    ended: datetime
    disks: tuple[Wiped, ...]
    gpus: tuple[GpuReset, ...]


class RecordRefused(WipeFailed):
    """A record of a wipe does not count."""

    code = "wipe_record_refused"


def wipe_vm(
    spec: VmSpec,
    signers: Sequence[Signer],
    reason: str,
    now: Callable[[], datetime],
    *,
    active: Callable[[str], bool],
    sys_dir: Path = Path("/sys"),
) -> bytes:
    """Wipe everything of the VM ``spec`` that its user wrote, and return the signed record, which then lies beside it.

    Raises :class:`WipeFailed` while the VM runs, and when anything could not be wiped; then there is no record. An
    interrupted wipe is begun again.
    """
    if active(spec.id):
        raise WipeFailed(f"VM {spec.id} runs", cure="stop the workspace first")
    if not signers:
        raise WipeFailed("a wipe without a signer leaves no evidence", cure="name a key that signs")
    wiped.marker(spec).unlink(missing_ok=True)
    begun = now()
    wiped.begin(spec)
    gpus = tuple(reset(device, sys_dir) for device in spec.devices)
    disks = tuple(wipe(path) for path in parts(spec))
    record = WipeRecord(
        "saw-wipe/1", spec.id, spec.image_sha256, socket.gethostname(), reason, begun, now(), disks, gpus
    )
    sealed = seal(rfc8785.dumps(msgspec.to_builtins(record)), PAYLOAD_TYPE, signers)
    write_atomic(wiped.marker(spec), sealed, mode=0o600)
    return sealed


def parts(spec: VmSpec) -> list[Path]:
    """Return the files of a VM that hold what its user or its virtual TPM wrote."""
    disks = [spec.directory / name for name in DISKS]
    tpm = sorted(path for path in (spec.directory / "tpm").rglob("*") if path.is_file() and not path.is_symlink())
    return [path for path in (*disks, spec.directory / "console.log", *tpm) if path.exists()]


def reset(device: str, sys_dir: Path = Path("/sys")) -> GpuReset:
    """Reset the GPU at a PCI address; raise :class:`WipeFailed` when the kernel cannot or the device is not there."""
    file = sys_dir / "bus/pci/devices" / device / "reset"
    try:
        with file.open("r+", encoding="ascii") as stream:
            stream.write("1")
    except OSError as error:
        raise WipeFailed(
            f"GPU {device} was not reset: {error.strerror}",
            cure="look whether the device is there and bound to vfio-pci; power-cycle the host where it has no reset",
        ) from error
    return GpuReset(device)


def verify(raw: bytes, keys: dict[str, PublicKey], *, workspace: str = "") -> tuple[WipeRecord, tuple[str, ...]]:
    """Return record and signers of a signed record; raise :class:`RecordRefused` for one that does not count.

    ``workspace``: the one that it has to be of, empty for any.
    """
    try:
        payload, signers = verify_envelope(raw, PAYLOAD_TYPE, keys, 1)
        record = jsontext.decode(payload, kind=WipeRecord)
    except EnvelopeRefused as error:
        raise RecordRefused(f"the record of the wipe does not count: {error.message}", cure=error.cure) from error
    except msgspec.DecodeError as error:
        raise RecordRefused(f"the record of the wipe is not valid: {error}", cure="wipe again") from error
    if workspace and record.workspace != workspace:
        raise RecordRefused(
            f"the record is of workspace {record.workspace}, wanted is {workspace}", cure="pass the record of that one"
        )
    return record, signers
