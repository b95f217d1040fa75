"""The hypervisor's part in a data disk: made once, handed over blank to be encrypted by the guest, and erased at the end.

The hypervisor is never given the key of an encrypted disk: the guest makes it and seals it to its vTPM. Whoever is root here has
both disk and vTPM, and is not kept out by it.
"""

from __future__ import annotations

import os
import shutil
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import msgspec

from saw import jsontext
from saw.datadisk import luks2, recovery
from saw.datadisk.config import CREDENTIAL, ONCE, Told
from saw.files import load_json, write_private
from saw.vm import secure_boot
from saw.vm.programs import run
from saw.vm.spec import STATE, VmError, VmSpec

DISK = "data.img"
ONE_START = "data-disk.once"
"""Beside the disk: the recovery key for the next start that runs, and gone with its first words on the console."""


class Erasure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Evidence that the key slots of a workspace's data disk are gone: where, when (RFC 3339), and what was overwritten.

    With the state ``erasing`` it tells what was begun: bytes may be overwritten, and nothing was read back yet.
    """

    format: str
    workspace: str
    host: str
    at: datetime
    erased: luks2.Erased
    state: Literal["erasing", "erased"] = "erased"


def refuse(stored: VmSpec | None, spec: VmSpec) -> None:
    """Raise :class:`VmError` for a disk that would have to change from plain to encrypted or back, or to another recovery key,
    and for a VM that has to have secure boot and whose image has no owner's keys."""
    if stored and encrypted(stored) != encrypted(spec):
        was, asked = ("encrypted", "plain") if encrypted(stored) else ("plain", "encrypted")
        raise VmError(
            f"the data disk of {spec.id} is {was}, asked for is {asked}; a disk with data stays as it is",
            cure="leave the recovery key as it was, or copy the data away and create another workspace",
        )
    if stored and encrypted(spec) and (spec.directory / DISK).exists() and _key_id(stored) != _key_id(spec):
        raise VmError(
            f"the data disk of {spec.id} is for the recovery key {_key_id(stored)[:16]}, asked for is {_key_id(spec)[:16]}",
            cure="leave the recovery key as it was, or create another workspace",
        )
    if encrypted(spec) and spec.data_disk_secure_boot and secure_boot.template_of(spec) is None:
        raise VmError(
            f"the data disk of {spec.id} is to be opened by what its owner signed, and its image has no owner's keys",
            cure="take an image built with SECURE_BOOT_KEY (docs/images.md), or allow any boot: data_disk_secure_boot: false",
        )


def encrypted(spec: VmSpec) -> bool:
    """Tell whether the guest encrypts its data disk."""
    return bool(spec.data_disk_recovery_key)


def _key_id(spec: VmSpec) -> str:
    return recovery.key_id(recovery.load_public(spec.data_disk_recovery_key))


def make(spec: VmSpec) -> bool:
    """Make the data disk once (ext4, label saw-home, or blank for the guest to encrypt); ``destroy`` alone touches it again."""
    disk = spec.directory / DISK
    if disk.exists():
        return False
    free = shutil.disk_usage(spec.directory).free
    if free < 64 * 1024 * 1024:
        raise VmError(f"{spec.directory} has {free // 1048576} MiB free", cure="free disk space on the hypervisor")
    temporary = spec.directory / f"{DISK}.new"
    with temporary.open("wb") as stream:
        stream.truncate(spec.data_disk_mib * 1024 * 1024)
    if not encrypted(spec):
        lazy = "lazy_itable_init=1,lazy_journal_init=1"
        run("mkfs.ext4", "-q", "-F", "-L", "saw-home", "-m", "0", "-E", lazy, str(temporary))
    os.replace(temporary, disk)
    return True


def credentials(spec: VmSpec) -> dict[str, str]:
    """Return the systemd credentials that tell the guest to encrypt its data disk; none for a plain one.

    A recovery key that waits for the next start is among them; it waits until :func:`started`.
    """
    if not encrypted(spec):
        return {}
    how = Told(spec.data_disk_recovery_key, "required" if spec.data_disk_secure_boot else "any")
    told = {CREDENTIAL: msgspec.json.encode(how).decode()}
    once = spec.directory / ONE_START
    if once.exists():
        told[ONCE] = once.read_text(encoding="ascii")
    return told


def started(spec: VmSpec) -> None:
    """Take the recovery key away from beside the disk: a start that runs has it, and no later one gets it."""
    (spec.directory / ONE_START).unlink(missing_ok=True)


def unlock(spec: VmSpec, key: str) -> None:
    """Keep the recovery key for the next start alone, where it opens the disk and the vTPM gets a new key."""
    header(spec)
    if not recovery.KEY.fullmatch(key):
        raise VmError("that is no recovery key", cure="pass what saw data-disk recovery-key printed on standard input")
    write_private(spec.directory / ONE_START, key)


def escrow(spec: VmSpec) -> recovery.Escrow:
    """Return the sealed recovery key in the header of the VM's data disk."""
    found = header(spec)
    return recovery.escrow_of(found.uuid, found.tokens)


def header(spec: VmSpec) -> luks2.Header:
    """Return the header of the VM's encrypted data disk; raise :class:`VmError` when it has none."""
    found = luks2.read_header(spec.directory / DISK) if encrypted(spec) else None
    if found is None:
        raise VmError(
            f"VM {spec.id} has no encrypted data disk" + (" yet" if encrypted(spec) else ""),
            cure="start the workspace: its first start makes it" if encrypted(spec) else "nothing to do",
        )
    return found


def erase(spec: VmSpec) -> Erasure | None:
    """Take the key slots of the data disk away for good; return the evidence, which stays on the hypervisor (0600).

    What is to be done is written down before the first byte goes, so that one that was cut off is known and gone on with. Where
    the disk is an encrypted one without a readable header, the place of headers and key slots goes all the same. None when it is
    plain. The VM must not run.
    """
    disk, before = spec.directory / DISK, _erasure(spec)
    if not disk.exists():
        return None
    planned = luks2.plan(disk)
    if planned is None and before is not None:
        if before.state == "erased" and luks2.zeros(disk, before.erased.overwritten):
            return before
        if before.state == "erasing":
            planned = before.erased
    if planned is None and encrypted(spec):
        planned = luks2.plan(disk, unreadable=True)
    if planned is None:
        return None
    _keep(spec, found := Erasure("saw-erasure/1", spec.id, socket.gethostname(), datetime.now(UTC), planned, "erasing"))
    done = luks2.erase(disk, planned)
    found = msgspec.structs.replace(found, at=datetime.now(UTC), erased=done, state="erased")
    _keep(spec, found)
    return found


def _keep(spec: VmSpec, found: Erasure) -> None:
    place = evidence_of(spec)
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_private(place, msgspec.json.format(msgspec.json.encode(found)))


def _erasure(spec: VmSpec) -> Erasure | None:
    place = evidence_of(spec)
    return load_json(place, Erasure) if place.exists() else None


def evidence_of(spec: VmSpec) -> Path:
    """Return where the evidence of an erasure lies; the id of a workspace is never used again."""
    return STATE.parent / "erased" / f"{spec.id}.json"


def evidence(spec: VmSpec) -> dict[str, Any]:
    """Return ``{erased: evidence}`` where there is some, for the answer of ``destroy``."""
    place = evidence_of(spec)
    return {"erased": jsontext.decode(place.read_bytes())} if place.exists() else {}
