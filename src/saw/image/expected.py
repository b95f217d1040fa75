"""What the boot of a golden image must measure, as far as that follows from its bytes: PCR 4 and PCR 11.

Both depend on the unified kernel image (UKI) of the EFI system partition and on nothing of the machine. A reference boot is held
against them, so that a record cannot state what something else measured. Firmware and settings (PCR 0, 2, 3, 7) are the
hypervisor's, and are only read back.

Own code, because the ``systemd-measure`` of Debian 12, where images may be built and recorded, leaves out the sections .uname and
.sbat that the image's own stub measures. A test holds the two against each other on the sections that both know.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from saw.image.disk import ESP_TYPE, ImageError, run

MEASURED = (
    ".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey",
)  # fmt: skip
"""Sections of a UKI in the order in which systemd-stub measures them into PCR 11 (systemd, "TPM2 PCR measurements")."""
_OTHER = frozenset({".profile", ".dtbauto", ".hwids", ".efifw"})
"""Sections of later stubs whose measurement depends on the machine or on a choice at boot; an image of ours has none."""
_CALL = b"Calling EFI Application from Boot Option"
_PE32_PLUS = 0x20B
_MAX_SECTIONS = 96
_SECTOR = 512
_HEAD = 1024 * 1024
"""Bytes of a disk that hold its partition table."""


class _Section(NamedTuple):
    name: str
    size: int
    raw_size: int
    at: int


class _Portable(NamedTuple):
    """The parts of a PE file that matter here: offsets into it, and its sections in their order."""

    checksum: int
    certificates: int
    headers: int
    signatures: int
    sections: tuple[_Section, ...]


def expected_pcrs(uki: bytes) -> dict[str, tuple[str, ...]]:
    """Return PCR → the values (lower-case hex) of which a boot of ``uki`` measures one; raises :class:`ImageError`.

    PCR 4 has two: the stub has the firmware load the kernel, which measures it once more; under secure boot the stub vouches for
    the kernel itself, and a firmware may leave that measurement out. Both follow from ``uki`` alone.
    """
    parts = uki_sections(uki)
    eleven = bytes(32)
    for name in MEASURED:
        if name in parts:
            eleven = _extend(_extend(eleven, _sha256(name.encode() + b"\0")), _sha256(parts[name]))
    started = bytes(32)
    for digest in (_sha256(_CALL), _sha256(bytes(4)), authenticode(uki)):
        started = _extend(started, digest)
    loaded = _extend(started, authenticode(parts[".linux"]))
    return {"4": (loaded.hex(), started.hex()), "11": (eleven.hex(),)}


def differences(expected: Mapping[str, tuple[str, ...]], measured: Mapping[str, str]) -> list[str]:
    """Return for each PCR of ``expected`` that ``measured`` does not meet what was computed and what was measured."""
    return [
        f"PCR {pcr} is {measured.get(pcr, 'missing')}, computed from the image is {' or '.join(values)}"
        for pcr, values in expected.items()
        if measured.get(pcr) not in values
    ]


def unified_kernel(image: Path) -> bytes:
    """Return the UKI at the removable-media path of the EFI system partition of ``image`` (qcow2); raises :class:`ImageError`.

    Nothing is mounted; a sparse copy of the disk's beginning lies in a temporary folder meanwhile.
    """
    size = json.loads(run("qemu-img", "info", "-U", "--output=json", str(image)))["virtual-size"]
    with tempfile.TemporaryDirectory(prefix="saw-uki-") as scratch:
        head, uki = Path(scratch, "head"), Path(scratch, "uki.efi")
        _copy(image, head, _HEAD)
        os.truncate(head, size)  # the table's other copy is missing, which sfdisk says and lives with
        first, count = _system_partition(head)
        _copy(image, head, (first + count) * _SECTOR)
        run("mcopy", "-o", "-i", f"{head}@@{first * _SECTOR}", "::/EFI/BOOT/BOOTX64.EFI", str(uki))
        return uki.read_bytes()


def uki_sections(uki: bytes) -> dict[str, bytes]:
    """Return the sections of ``uki`` that are measured, as they lie in memory; raises :class:`ImageError` for what is no UKI."""
    found: dict[str, bytes] = {}
    for one in _portable(uki).sections:
        if one.name in _OTHER or one.name in found:
            raise _refused(f"its section {one.name} is not one that this can compute with")
        if one.name in MEASURED:
            found[one.name] = uki[one.at : one.at + min(one.size, one.raw_size)].ljust(one.size, b"\0")
    if ".linux" not in found:
        raise _refused("it has no kernel")
    return found


def authenticode(raw: bytes) -> bytes:
    """Return the SHA-256 of a PE file that firmware measures: all of it but checksum and signatures (Authenticode, 2008)."""
    parts = _portable(raw)
    entry = parts.certificates
    digest = hashlib.sha256(raw[: parts.checksum] + raw[parts.checksum + 4 : entry] + raw[entry + 8 : parts.headers])
    seen = parts.headers
    for one in sorted(parts.sections, key=lambda section: section.at):
        if one.raw_size:
            digest.update(raw[one.at : one.at + one.raw_size])
            seen += one.raw_size
    digest.update(raw[seen : len(raw) - parts.signatures])
    return digest.digest()


def _portable(raw: bytes) -> _Portable:
    try:
        (start,) = struct.unpack_from("<I", raw, 0x3C)
        signature, count, optional = struct.unpack_from("<4s2xH12xH", raw, start)
        begin = start + 24
        (magic,) = struct.unpack_from("<H", raw, begin)
        (headers,) = struct.unpack_from("<I", raw, begin + 60)
        certificates = begin + 112 + 4 * 8
        _, signatures = struct.unpack_from("<II", raw, certificates)
        if raw[:2] != b"MZ" or signature != b"PE\0\0" or magic != _PE32_PLUS or not 0 < count <= _MAX_SECTIONS:
            raise _refused("it is no 64-bit EFI program")
        sections = tuple(
            _Section(name.rstrip(b"\0").decode("ascii"), size, raw_size, at)
            for name, size, raw_size, at in (
                struct.unpack_from("<8sI4xII", raw, begin + optional + 40 * index) for index in range(count)
            )
        )
    except (struct.error, UnicodeDecodeError) as error:
        raise _refused("it is cut or no EFI program") from error
    beyond = any(one.at + one.raw_size > len(raw) or one.size > len(raw) for one in sections)
    if beyond or not certificates + 8 <= headers <= len(raw) or signatures > len(raw) - headers:
        raise _refused("it is cut")
    return _Portable(begin + 64, certificates, headers, signatures, sections)


def _system_partition(disk: Path) -> tuple[int, int]:
    """Return first sector and number of sectors of the one EFI system partition."""
    table = json.loads(run("sfdisk", "-J", str(disk)))["partitiontable"]
    found = [one for one in table["partitions"] if str(one["type"]).upper() == ESP_TYPE]
    if len(found) != 1:
        raise ImageError(f"the image has {len(found)} EFI system partitions", cure="build the image again")
    return int(found[0]["start"]), int(found[0]["size"])


def _copy(image: Path, target: Path, size: int) -> None:
    target.unlink(missing_ok=True)
    run(
        "qemu-img", "dd", "-U", "-f", "qcow2", "-O", "raw", f"if={image}", f"of={target}",
        f"bs={_SECTOR * 128}", f"count={-(-size // (_SECTOR * 128))}",
    )  # fmt: skip


def _refused(reason: str) -> ImageError:
    return ImageError(f"the boot program of the image cannot be measured: {reason}", cure="build the image again")


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _extend(value: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(value + digest).digest()
