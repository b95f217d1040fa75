"""What a virtual machine is made of: the driver contract's input, read strictly.

Every VM driver takes this specification and offers the same verbs (``create, start, stop, destroy, status``) with the same
JSON answers; ``saw.vm.qemu`` is the driver for plain qemu on a hypervisor host.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from saw import addressing, jsontext
from saw.datadisk.config import CREDENTIAL as DATA_DISK
from saw.datadisk.config import ONCE as DATA_DISK_ONCE
from saw.datadisk.recovery import load_public
from saw.errors import ConfigError, SawError

STATE = Path("/var/lib/saw/vms")
RUNTIME = Path("/run/saw/vm")
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
"""Workspace ids, as the broker's registry takes them: a DNS label, since the id is also the guest's host name."""
NAME_CURE = "use at most 63 lower-case letters, digits and dashes, no dash at either end"
SHA256 = re.compile(r"[0-9a-f]{64}")
PCI_ADDRESS = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]")
CREDENTIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class VmError(SawError):
    """A virtual machine cannot be brought to the wanted state."""

    code = "vm_failed"


class VmSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One virtual machine.

    ``number`` fixes its private network (:mod:`saw.addressing`); ``image`` is a qcow2 golden image on the hypervisor;
    ``credentials`` are systemd credentials handed over through SMBIOS type 11 — public data only, never a secret. ``devices``
    are PCI addresses on the hypervisor, bound to vfio-pci there, that the VM gets for itself, such as a GPU. ``wipe``: nothing of
    the VM is released before the record of a wipe lies beside it (:mod:`saw.vm.wiped`). ``data_disk_recovery_key`` is the
    operator's public key (PEM): where there is one, the guest encrypts its data disk (:mod:`saw.datadisk`), and opens it under
    secure boot alone unless ``data_disk_secure_boot`` says otherwise.
    """

    id: str
    number: int
    image: str
    image_sha256: str
    memory_mib: int = 1536
    cpus: int = 2
    data_disk_mib: int = 2048
    credentials: dict[str, str] = {}
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    network: bool = True
    devices: tuple[str, ...] = ()
    wipe: bool = False
    data_disk_recovery_key: str = ""
    data_disk_secure_boot: bool = True

    @property
    def needs_record(self) -> bool:
        """Whether it runs on released images alone, as every workspace does (:mod:`saw.vm.released`)."""
        return True

    @property
    def directory(self) -> Path:
        """State of this VM on the hypervisor."""
        return STATE / self.id

    @property
    def runtime(self) -> Path:
        """Sockets of this VM while it runs."""
        return RUNTIME / self.id

    @property
    def bridge(self) -> str:
        """Bridge whose address is the VM's only gateway."""
        return addressing.bridge(self.number)

    @property
    def tap(self) -> str:
        """Tap device of the VM."""
        return addressing.tap(self.number)

    @property
    def gateway(self) -> str:
        """The perimeter's address on the VM's network."""
        return addressing.gateway(self.number)

    @property
    def address(self) -> str:
        """The VM's address."""
        return addressing.workspace(self.number)


def parse_spec(raw: bytes) -> VmSpec:
    """Read a specification; raise :class:`ConfigError` that names field, reason and cure."""
    try:
        spec = jsontext.decode(raw, kind=VmSpec)
    except msgspec.DecodeError as error:
        raise ConfigError(f"the VM specification is not valid: {error}", cure="correct the named field") from error
    if not NAME.fullmatch(spec.id):
        raise ConfigError(f"VM id {spec.id!r} is not valid", cure=NAME_CURE)
    addressing.network(spec.number)
    if not SHA256.fullmatch(spec.image_sha256):
        raise ConfigError(
            f"image_sha256 of VM {spec.id} is no SHA-256",
            cure="give 64 lower-case hex digits, as in the image's build.json",
        )
    if not spec.image.startswith("/") or set("\0\n") & set(spec.image):
        raise ConfigError(
            f"image {spec.image!r} of VM {spec.id} is no absolute path", cure="give the path on the hypervisor"
        )
    for name in spec.credentials:
        if not CREDENTIAL.fullmatch(name):
            raise ConfigError(
                f"credential name {name!r} of VM {spec.id} is not valid",
                cure="use letters, digits, dots, dashes and underscores, at most 64",
            )
        if name in {DATA_DISK, DATA_DISK_ONCE}:
            raise ConfigError(
                f"credential {name} of VM {spec.id} is the driver's own", cure="set data_disk_recovery_key instead"
            )
    if spec.data_disk_recovery_key:
        load_public(spec.data_disk_recovery_key)
    for device in spec.devices:
        if not PCI_ADDRESS.fullmatch(device):
            raise ConfigError(
                f"device {device!r} of VM {spec.id} is no PCI address", cure="write it as lspci -D does: 0000:3b:00.0"
            )
    if len(set(spec.devices)) != len(spec.devices):
        raise ConfigError(f"VM {spec.id} gets one device twice", cure="list each PCI address once")
    if spec.devices and not spec.wipe:
        raise ConfigError(
            f"VM {spec.id} gets devices and asks for no wipe",
            cure="set wipe: a device goes to the next user wiped or not at all",
        )
    if spec.memory_mib < 512 or spec.cpus < 1 or spec.data_disk_mib < 64:
        raise ConfigError(f"VM {spec.id} is too small", cure="give at least 512 MiB, 1 CPU and a 64 MiB data disk")
    return spec


def load_spec(vm_id: str) -> VmSpec:
    """Return the stored specification of ``vm_id``; raise :class:`VmError` when there is no such VM."""
    if not NAME.fullmatch(vm_id):
        raise ConfigError(f"VM id {vm_id!r} is not valid", cure=NAME_CURE)
    try:
        return parse_spec((STATE / vm_id / "spec.json").read_bytes())
    except FileNotFoundError as error:
        raise VmError(
            f"there is no VM {vm_id} on this hypervisor", cure="create it with the workspace_create playbook"
        ) from error
