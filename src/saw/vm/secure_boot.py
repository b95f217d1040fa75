"""Secure boot of a VM: firmware that keeps its variables to itself, and a variable store of the image's owner for each VM.

An image that its owner signed has the owner's variable store beside it, in a file with the name below. A VM on such an image gets
a copy of it and the firmware that enforces it; a VM on any other image boots as ever. Nobody gains by putting another store
there, or by taking it away: firmware and keys are measured into PCR 0 and 7, which the broker compares with the signed release
record.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from saw.files import write_private
from saw.vm.spec import VmError, VmSpec

FIRMWARE = Path("/usr/share/OVMF/OVMF_CODE_4M.secboot.fd")
"""OVMF that needs SMM: only its own code, in system management mode, writes the flash, never the guest's kernel."""
TEMPLATE = "secure-boot.fd"
"""The owner's variable store, beside an image."""
MARKER = "vars.origin"
"""Beside ``vars.fd``: SHA-256 of the owner's store that it was made from. No such file: made from the factory's."""
ARGUMENTS = ("-global", "driver=cfi.pflash01,property=secure,value=on", "-global", "ICH9-LPC.disable_s3=1")
"""Flash writes from SMM alone (QEMU, pflash); no sleep to memory, whose way back would leave out what the boot checked."""


def template_of(spec: VmSpec) -> bytes | None:
    """Return the owner's variable store beside the image of ``spec``, None where there is none."""
    try:
        return Path(spec.image).with_name(TEMPLATE).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VmError(
            f"the variable store beside {spec.image} cannot be read: {error.strerror}", cure="copy the image again"
        ) from error


def origin(spec: VmSpec) -> str:
    """Return the SHA-256 of the owner's store that the VM's variables were made from; empty for the factory's."""
    try:
        return (spec.directory / MARKER).read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return ""


def make_variables(spec: VmSpec, factory: Path) -> bool:
    """Make the VM's own variable store where it has none, or one of another owner; return whether it was made."""
    target, marker = spec.directory / "vars.fd", spec.directory / MARKER
    template = template_of(spec)
    wanted = "" if template is None else hashlib.sha256(template).hexdigest()
    if target.exists() and origin(spec) == wanted:
        return False
    # Without the marker it is a store of the factory's; a crash between the steps is noticed by the next creation, or at a start.
    marker.unlink(missing_ok=True)
    write_private(target, factory.read_bytes() if template is None else template)
    if wanted:
        write_private(marker, wanted + "\n")
    return True


def startable(spec: VmSpec) -> None:
    """Raise :class:`VmError` unless the VM has the variables of its image's owner, and this hypervisor the firmware for them."""
    template = template_of(spec)
    wanted = "" if template is None else hashlib.sha256(template).hexdigest()
    if origin(spec) != wanted:
        raise VmError(
            f"the firmware's variables of {spec.id} are not those that lie beside its image",
            cure="copy the image's directory there again, then playbook workspace_rebuild",
        )
    if wanted and not FIRMWARE.exists():
        raise VmError(f"{FIRMWARE} is not on this hypervisor", cure="install the package ovmf")
