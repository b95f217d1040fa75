"""Devices of the hypervisor that a VM gets for itself, such as a GPU (VFIO)."""

from __future__ import annotations

from saw.vm import spec as specs
from saw.vm.spec import VmError, VmSpec


def refuse_taken(spec: VmSpec) -> None:
    """Raise :class:`VmError` when another VM of this hypervisor holds one of the devices; it does until it is destroyed."""
    for file in sorted(specs.STATE.glob("*/spec.json")) if spec.devices else ():
        other = specs.parse_spec(file.read_bytes())
        taken = set(other.devices) & set(spec.devices)
        if other.id != spec.id and taken:
            raise VmError(
                f"device {min(taken)} belongs to VM {other.id}", cure="give another device, or destroy that workspace"
            )


def arguments(spec: VmSpec) -> list[str]:
    """Return qemu's arguments for the devices. The kernel refuses one that is not bound to vfio-pci."""
    return [word for device in spec.devices for word in ("-device", f"vfio-pci,host={device}")]
