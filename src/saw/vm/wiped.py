"""A VM that is to be wiped before anything of it is released: whether it was, by the record beside its disks.

The record itself is made and verified elsewhere (``saw gpu wipe``, ``saw gpu verify``); the driver asks whether there is one.
A wipe takes the disks' content away, so a VM on which one was begun does not start again.
"""

from __future__ import annotations

from pathlib import Path

from saw.files import write_atomic
from saw.vm.spec import VmError, VmSpec

RECORD = "wiped.signed.json"
BEGUN = "wipe.begun"


class NotWipedError(VmError):
    """A VM that asks for a wipe has no record of one."""

    code = "not_wiped"


def marker(spec: VmSpec) -> Path:
    """Return where the signed record of the wipe lies."""
    return spec.directory / RECORD


def begin(spec: VmSpec) -> None:
    """Note that a wipe was begun, before the first byte goes."""
    write_atomic(spec.directory / BEGUN, "begun\n", mode=0o600)


def refuse_unwiped(spec: VmSpec) -> None:
    """Raise :class:`NotWipedError` unless the VM needs no wipe or has the record of one."""
    if spec.wipe and not marker(spec).exists():
        raise NotWipedError(
            f"VM {spec.id} has to be wiped before anything of it is released, and was not",
            cure=f"saw gpu wipe {spec.id} --key KEY --reason WHY; when it fails, mend what it names",
        )


def refuse_released(old: VmSpec, new: VmSpec) -> None:
    """Raise :class:`NotWipedError` when ``new`` gives a device or the wipe itself up, and no wipe was done."""
    if (old.wipe and not new.wipe) or set(old.devices) - set(new.devices):
        refuse_unwiped(old)


def refuse_wiped(spec: VmSpec) -> None:
    """Raise :class:`VmError` when a wipe of the VM was begun: its disks hold nothing, or a part."""
    if (spec.directory / BEGUN).exists() or marker(spec).exists():
        raise VmError(f"a wipe of VM {spec.id} was begun", cure="finish it, then destroy the workspace")
