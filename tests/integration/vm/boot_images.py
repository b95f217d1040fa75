"""Small boot images for tests of secure boot: Debian's kernel behind systemd's boot stub, and a disk that holds nothing else."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STUB = Path("/usr/lib/systemd/boot/efi/linuxx64.efi.stub")
COMMAND_LINE = b"console=ttyS0 panic=-1 ignore_loglevel saw.test=before\0"
MIB = 1024 * 1024


def kernel(scratch: Path) -> bytes:
    """Return a kernel of Debian's: that of a golden image that was built here, or one of the machine's mirror."""
    built = sorted(ROOT.glob("build/images/*/vmlinuz"))
    if built:
        return built[-1].read_bytes()
    scratch.mkdir(parents=True)
    told = subprocess.run(
        ["apt-cache", "depends", "--important", "linux-image-cloud-amd64"], capture_output=True, text=True, check=False
    ).stdout
    names = [line.split()[-1] for line in told.splitlines() if "Depends: linux-image-" in line]
    if not names:
        pytest.skip("no golden image was built here, and apt knows no linux-image-cloud-amd64")
    got = subprocess.run(
        ["apt-get", "download", "-q", names[0]], cwd=scratch, capture_output=True, text=True, check=False
    )
    if got.returncode:
        pytest.skip(f"no golden image was built here, and apt has no kernel: {got.stderr.strip()[-200:]}")
    subprocess.run(["dpkg-deb", "-x", next(scratch.glob("*.deb")), scratch / "tree"], check=True)
    content = next(scratch.glob("tree/boot/vmlinuz-*")).read_bytes()
    shutil.rmtree(scratch)
    return content


def unified(linux: bytes) -> bytes:
    """Return a unified kernel image: the stub with the sections .cmdline and .linux behind its own (PE/COFF, little endian)."""
    image = bytearray(STUB.read_bytes())
    header = struct.unpack_from("<I", image, 0x3C)[0]
    count, optional_size = (
        struct.unpack_from("<H", image, header + 6)[0],
        struct.unpack_from("<H", image, header + 20)[0],
    )
    optional = header + 24
    table = optional + optional_size
    section, file = struct.unpack_from("<II", image, optional + 32)
    step = max(section, 4096)
    ends = (sum(struct.unpack_from("<II", image, table + 40 * number + 8)) for number in range(count))
    address = _up(max(ends), step)
    for name, content in ((b".cmdline", COMMAND_LINE), (b".linux", linux)):
        assert table + 40 * (count + 1) <= struct.unpack_from("<I", image, optional + 60)[0], "the stub has no room"
        image += bytes(_up(len(image), file) - len(image))
        size, raw = len(content), _up(len(content), file)
        struct.pack_into(
            "<8sIIIIIIHHI", image, table + 40 * count, name, size, address, raw, len(image), 0, 0, 0, 0, 0x40000040
        )
        image += content + bytes(raw - size)
        address = _up(address + size, step)
        count += 1
    struct.pack_into("<H", image, header + 6, count)
    struct.pack_into("<I", image, optional + 56, address)
    return bytes(image)


def disk(boot_image: Path, target: Path) -> None:
    """Write a disk (qcow2) whose one file system holds ``boot_image`` where firmware looks for it."""
    raw = target.with_suffix(".raw")
    with raw.open("wb") as stream:
        stream.truncate(_up(boot_image.stat().st_size * 5 // 4, MIB) + 40 * MIB)
    run("mkfs.vfat", "-F", "32", "-n", "ESP", str(raw))
    run("mmd", "-i", str(raw), "::/EFI", "::/EFI/BOOT")
    run("mcopy", "-i", str(raw), str(boot_image), "::/EFI/BOOT/BOOTX64.EFI")
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(target))
    raw.unlink()


def run(*argv: str) -> str:
    """Run a program that has to succeed; return what it printed."""
    done = subprocess.run(argv, capture_output=True, text=True, check=False, env={**os.environ, "LC_ALL": "C"})
    assert done.returncode == 0, f"{argv[0]}: {done.stdout}{done.stderr}"
    return done.stdout


def _up(number: int, step: int) -> int:
    return -(-number // step) * step
