"""Assemble a bootable disk from a finished root tree, without loop devices and without leaving a mount behind.

GPT with two partitions: an EFI system partition that holds one unified kernel image (UKI) at the removable-media path, and
an ext4 root. There is no boot loader and no initrd: the firmware measures the UKI into PCR 4, its systemd-stub the
sections into PCR 11 (TCG PC Client PFP; systemd's "TPM2 PCR measurements").
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path

import msgspec

from saw.errors import SawError
from saw.files import write_atomic
from saw.image.identity import refuse_traces
from saw.image.settle import ENVIRONMENT, EXT4_ENVIRONMENT, settle_ext4, settle_tree, space_of

MIB = 1024 * 1024
ESP_TYPE = "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
ROOT_TYPE = "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709"  # root, x86-64 (Discoverable Partitions Specification)
SPARE_BYTES = 768 * MIB
"""Free space of the root file system, besides a fifth of what it holds."""
COMMAND_LINE = "rw rootfstype=ext4 rootwait console=ttyS0 quiet systemd.show_status=no systemd.firstboot=off panic=10"


class ImageError(SawError):
    """An image cannot be made, found or used."""

    code = "image_failed"


class Disk(msgspec.Struct, frozen=True):
    """What was assembled: file, its SHA-256 (hex), the UKI's SHA-256 and the kernel's release."""

    path: str
    sha256: str
    uki_sha256: str
    kernel: str
    command_line: str


def run(*argv: str, env: dict[str, str] | None = None) -> str:
    """Run ``argv``; raise :class:`ImageError` with the end of its error output."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})
    except FileNotFoundError as error:
        raise ImageError(f"{argv[0]} is not installed", cure=f"install the package that provides {argv[0]}") from error
    if done.returncode:
        raise ImageError(f"`{argv[0]}` failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout


def kernel_release(root: Path) -> str:
    """Return the one kernel release installed in ``root``."""
    kernels = sorted(path.name.removeprefix("vmlinuz-") for path in (root / "boot").glob("vmlinuz-*"))
    if len(kernels) != 1:
        raise ImageError(f"expected one kernel in {root}/boot, found {kernels or 'none'}", cure="clean the image tree")
    return kernels[0]


def build_uki(root: Path, output: Path, root_partition: str) -> str:
    """Build the UKI with the tree's own ukify, in a private mount namespace; return the kernel command line.

    An initrd is part of it where the tree has one for its kernel; Debian's cloud kernel needs none.
    """
    release = kernel_release(root)
    command_line = f"root=PARTUUID={root_partition} {COMMAND_LINE}"
    script = (
        'mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" && '
        'initrd=; if [ -e "$1/boot/initrd.img-$2" ]; then initrd="--initrd=/boot/initrd.img-$2"; fi && '
        'chroot "$1" ukify build --linux="/boot/vmlinuz-$2" $initrd --cmdline="$3" --os-release=@/etc/os-release '
        '--uname="$2" --output=/tmp/uki.efi >/dev/null && cp "$1/tmp/uki.efi" "$4"'
    )
    run(
        "unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh",
        str(root), release, command_line, str(output), env=ENVIRONMENT,
    )  # fmt: skip
    return command_line


def assemble(root: Path, output: Path, *, seed: str, sign: Callable[[Path], None] | None = None) -> Disk:
    """Make ``output`` (qcow2) from ``root``. Identifiers derive from ``seed``: equal trees and seeds give equal bytes.

    ``sign`` signs the boot image in place; a signature that has its time in it makes every build another one.

    Times in ``root`` that are later than that of :mod:`saw.image.settle` become it. The file appears under its final name only
    when it is complete. Raises :class:`ImageError`, and IdentityError for a tree that identifies a machine; a failure leaves
    nothing.
    """
    disk_id, root_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/disk"), uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/root")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assemble-", dir=output.parent) as scratch:
        work = Path(scratch)
        uki, esp, ext4, raw = work / "uki.efi", work / "esp.img", work / "root.img", work / "disk.raw"
        settle_tree(root)
        command_line = build_uki(root, uki, str(root_id))
        refuse_traces(root)
        if sign is not None:
            sign(uki)
        esp_size = max(64 * MIB, -(-uki.stat().st_size * 5 // 4 // MIB) * MIB)
        with esp.open("wb") as stream:
            stream.truncate(esp_size)
        serial = hashlib.sha256(seed.encode()).hexdigest()[:8]
        run("mkfs.vfat", "--invariant", "-F", "32", "-n", "ESP", "-i", serial, str(esp))  # else the label gets a time
        run("mmd", "-i", str(esp), "::/EFI", "::/EFI/BOOT", env=ENVIRONMENT)
        run("mcopy", "-i", str(esp), str(uki), "::/EFI/BOOT/BOOTX64.EFI", env=ENVIRONMENT)
        size = -(-(space_of(root) * 6 // 5 + SPARE_BYTES) // MIB) * MIB
        with ext4.open("wb") as stream:
            stream.truncate(size)
        run(
            "mkfs.ext4", "-q", "-F", "-U", str(root_id), "-L", "saw-root", "-m", "1",
            "-E", f"hash_seed={root_id},lazy_itable_init=1", "-d", str(root), str(ext4), env=EXT4_ENVIRONMENT,
        )  # fmt: skip
        settle_ext4(ext4)
        lay_out(raw, esp, ext4, str(disk_id), str(root_id))
        qcow2 = work / "disk.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2))
        disk = Disk(str(output), digest_of(qcow2), digest_of(uki), kernel_release(root), command_line)
        with qcow2.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(qcow2, output)
    write_atomic(output.with_suffix(".disk.json"), msgspec.json.format(msgspec.json.encode(disk)))
    return disk


def lay_out(raw: Path, esp: Path, ext4: Path, disk_id: str, root_id: str) -> None:
    """Write the GPT and both partitions into the sparse file ``raw``."""
    esp_size, root_size = esp.stat().st_size, ext4.stat().st_size
    esp_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{disk_id}/esp")
    with raw.open("wb") as stream:
        stream.truncate(MIB + esp_size + root_size + MIB)
    table = (
        f"label: gpt\nlabel-id: {disk_id}\nunit: sectors\n"
        f"start={MIB // 512}, size={esp_size // 512}, type={ESP_TYPE}, uuid={esp_id}, name=esp\n"
        f"start={(MIB + esp_size) // 512}, size={root_size // 512}, type={ROOT_TYPE}, uuid={root_id}, name=root\n"
    )
    done = subprocess.run(["sfdisk", "-q", str(raw)], input=table, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"sfdisk failed: {done.stderr.strip()}")
    for part, seek in ((esp, 1), (ext4, 1 + esp_size // MIB)):
        run("dd", f"if={part}", f"of={raw}", "bs=1M", f"seek={seek}", "conv=notrunc,sparse", "status=none")
        with contextlib.suppress(OSError):
            part.unlink()


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def free_space_needed(path: Path, need: int) -> None:
    """Raise :class:`ImageError` unless ``need`` bytes are free where ``path`` lies."""
    path.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path).free
    if free < need:
        raise ImageError(
            f"{path} has {free // MIB} MiB free, {need // MIB} MiB are needed",
            cure="free disk space there, or set SAW_BUILD to a directory on a larger disk",
        )
