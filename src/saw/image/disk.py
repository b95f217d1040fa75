"""Assemble a bootable disk from a finished root tree, without loop devices and without leaving a mount behind.

GPT with two partitions: an EFI system partition that holds one unified kernel image (UKI) at the removable-media path, and
an ext4 root. There is no boot loader and no initrd: the firmware measures the UKI into PCR 4, its systemd-stub the
sections into PCR 11 (TCG PC Client PFP; systemd's "TPM2 PCR measurements"). With a verified root there are more of both
(:mod:`saw.image.verified_root`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

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
WORDS = "console=ttyS0 quiet systemd.show_status=no systemd.firstboot=off panic=10"
"""What every image's kernel command line ends with."""


class ImageError(SawError):
    """An image cannot be made, found or used."""

    code = "image_failed"


class Disk(msgspec.Struct, frozen=True):
    """What was assembled: file, its SHA-256 (hex), the UKI's SHA-256 and the kernel's release.

    ``root_hash`` is that of a verified root (lower-case hex), and empty without one.
    """

    path: str
    sha256: str
    uki_sha256: str
    kernel: str
    command_line: str
    root_hash: str = ""


class Part(NamedTuple):
    """A partition: the file with its content (whole MiB), its type and identifier (GUIDs) and its name."""

    file: Path
    kind: str
    guid: str
    name: str


class Roots(NamedTuple):
    """What a root tree became: its partitions, the root's first, and how the kernel finds them."""

    parts: tuple[Part, ...]
    command_line: str
    initrd: Path | None = None
    root_hash: str = ""


Layout = Callable[[Path, Path, str], Roots]
"""Makes partitions of a tree, in a folder, with identifiers that derive from a seed."""


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


def build_uki(root: Path, output: Path, command_line: str, initrd: Path | None = None) -> None:
    """Build the UKI with the tree's own ukify, in a private mount namespace.

    An initrd is part of it where one is given, or the tree has one for its kernel; Debian's cloud kernel needs none.
    """
    script = (
        'mount -t proc proc "$1/proc" && mount -t tmpfs tmpfs "$1/tmp" && '
        'initrd=; if [ -n "$5" ]; then cp "$5" "$1/tmp/initrd"; initrd="--initrd=/tmp/initrd"; '
        'elif [ -e "$1/boot/initrd.img-$2" ]; then initrd="--initrd=/boot/initrd.img-$2"; fi && '
        'chroot "$1" ukify build --linux="/boot/vmlinuz-$2" $initrd --cmdline="$3" --os-release=@/etc/os-release '
        '--uname="$2" --output=/tmp/uki.efi >/dev/null && cp "$1/tmp/uki.efi" "$4"'
    )
    run(
        "unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh",
        str(root), kernel_release(root), command_line, str(output), str(initrd or ""), env=ENVIRONMENT,
    )  # fmt: skip


def assemble(
    root: Path, output: Path, *, seed: str, sign: Callable[[Path], None] | None = None, layout: Layout | None = None
) -> Disk:
    """Make ``output`` (qcow2) from ``root``. Identifiers derive from ``seed``: equal trees and seeds give equal bytes.

    ``sign`` signs the boot image in place; a signature that has its time in it makes every build another one. ``layout`` makes
    the partitions of the tree, :func:`writable_root` where none is given.

    Times in ``root`` that are later than that of :mod:`saw.image.settle` become it. The file appears under its final name only
    when it is complete. Raises :class:`ImageError`, and IdentityError for a tree that identifies a machine; a failure leaves
    nothing.
    """
    disk_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/disk")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".assemble-", dir=output.parent) as scratch:
        work = Path(scratch)
        uki, esp, raw = work / "uki.efi", work / "esp.img", work / "disk.raw"
        release = kernel_release(root)
        settle_tree(root)
        refuse_traces(root)
        roots = (layout or writable_root)(root, work, seed)
        build_uki(root, uki, roots.command_line, roots.initrd)
        if sign is not None:
            sign(uki)
        esp_size = max(64 * MIB, -(-uki.stat().st_size * 5 // 4 // MIB) * MIB)
        with esp.open("wb") as stream:
            stream.truncate(esp_size)
        serial = hashlib.sha256(seed.encode()).hexdigest()[:8]
        run("mkfs.vfat", "--invariant", "-F", "32", "-n", "ESP", "-i", serial, str(esp))  # else the label gets a time
        run("mmd", "-i", str(esp), "::/EFI", "::/EFI/BOOT", env=ENVIRONMENT)
        run("mcopy", "-i", str(esp), str(uki), "::/EFI/BOOT/BOOTX64.EFI", env=ENVIRONMENT)
        first, *more = roots.parts
        lay_out(raw, esp, first.file, str(disk_id), first.guid, more=more)
        qcow2 = work / "disk.qcow2"
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(qcow2))
        disk = Disk(str(output), digest_of(qcow2), digest_of(uki), release, roots.command_line, roots.root_hash)
        with qcow2.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(qcow2, output)
    write_atomic(output.with_suffix(".disk.json"), msgspec.json.format(msgspec.json.encode(disk)))
    return disk


def writable_root(root: Path, work: Path, seed: str) -> Roots:
    """Make one ext4 partition of the whole tree, which the kernel mounts for writing."""
    guid, file = uuid.uuid5(uuid.NAMESPACE_OID, f"{seed}/root"), work / "root.img"
    make_ext4(root, file, space_of(root) * 6 // 5 + SPARE_BYTES, guid, "saw-root", "-m", "1")
    line = f"root=PARTUUID={guid} rw rootfstype=ext4 rootwait {WORDS}"
    return Roots((Part(file, ROOT_TYPE, str(guid), "root"),), line)


def make_ext4(tree: Path, file: Path, size: int, guid: uuid.UUID, label: str, *options: str, hide: str = "") -> None:
    """Make a file system of ``size`` bytes, rounded up to whole MiB, that holds ``tree``; its folder ``hide`` is empty there."""
    with file.open("wb") as stream:
        stream.truncate(-(-size // MIB) * MIB)
    command = (
        "mkfs.ext4", "-q", "-F", "-U", str(guid), "-L", label, *options,
        "-E", f"hash_seed={guid},lazy_itable_init=1", "-d", str(tree), str(file),
    )  # fmt: skip
    if hide:
        script = 'hide=$1; shift; mount -t tmpfs -o mode=0755 tmpfs "$hide"; touch -d "@$SOURCE_DATE_EPOCH" "$hide"; exec "$@"'
        command = (
            "unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", str(tree / hide), *command,
        )  # fmt: skip
    run(*command, env=EXT4_ENVIRONMENT)
    settle_ext4(file)


def lay_out(raw: Path, esp: Path, root: Path, disk_id: str, root_id: str, *, more: Sequence[Part] = ()) -> None:
    """Write the GPT and its partitions into the sparse file ``raw``: system, root, and ``more`` behind them."""
    esp_id = uuid.uuid5(uuid.NAMESPACE_OID, f"{disk_id}/esp")
    parts = [Part(esp, ESP_TYPE, str(esp_id), "esp"), Part(root, ROOT_TYPE, root_id, "root"), *more]
    table, place = f"label: gpt\nlabel-id: {disk_id}\nunit: sectors\n", MIB
    for part in parts:
        size = part.file.stat().st_size
        table += f"start={place // 512}, size={size // 512}, type={part.kind}, uuid={part.guid}, name={part.name}\n"
        place += size
    with raw.open("wb") as stream:
        stream.truncate(place + MIB)
    done = subprocess.run(["sfdisk", "-q", str(raw)], input=table, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ImageError(f"sfdisk failed: {done.stderr.strip()}")
    seek = 1
    for part in parts:
        size = part.file.stat().st_size
        run("dd", f"if={part.file}", f"of={raw}", "bs=1M", f"seek={seek}", "conv=notrunc,sparse", "status=none")
        seek += size // MIB
        with contextlib.suppress(OSError):
            part.file.unlink()


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
