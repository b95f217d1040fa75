"""A small image as a build leaves it: a disk with an EFI program in its system partition, bills, provenance."""

from __future__ import annotations

import json
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from saw.attest.verifier import RELEASED_PCRS
from saw.image.disk import ESP_TYPE, MIB, digest_of
from saw.image.expected import expected_pcrs

PARTS = {
    ".text": b"stub" * 100, ".osrel": b"ID=debian\n", ".cmdline": b"root=PARTUUID=1 rw\0", ".uname": b"6.12\0",
    ".sbat": b"sbat,1,SBAT\n",
}  # fmt: skip
EVIDENCE = (
    "sbom/debian.cdx.json", "sbom/debian.spdx.json", "sbom/python.cdx.json", "sbom/npm.cdx.json", "sbom/npm.spdx.json",
    "provenance.json", "baseline.dat",
)  # fmt: skip
LYNIS = """\
report_version_major=1
report_datetime_start=2026-11-29 10:00:00
report_datetime_end=2026-11-29 10:01:00
lynis_version=3.0.8
os_fullname=Debian
lynis_tests_done=250
hardening_index={index}
finish=true
"""


def portable(sections: dict[str, bytes], *, tail: bytes = b"", signatures: bytes = b"") -> bytes:
    """A 64-bit EFI program with these sections, aligned to 512 bytes; then ``tail``, and a table of ``signatures``."""
    begin, headers = 0x80, 0x600
    table, bodies, at = b"", b"", headers
    for name, content in sections.items():
        padded = content.ljust(-(-len(content) // 512) * 512, b"\0")
        table += struct.pack("<8sIIII16x", name.encode(), len(content), 0x1000 + at, len(padded), at)
        bodies += padded
        at += len(padded)
    size = at + len(tail)
    optional = bytearray(112 + 16 * 8)
    struct.pack_into("<H", optional, 0, 0x20B)
    struct.pack_into("<I", optional, 60, headers)
    struct.pack_into("<I", optional, 64, 0xC0FFEE)
    struct.pack_into("<II", optional, 112 + 4 * 8, size if signatures else 0, len(signatures))
    head = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", begin)
    header = struct.pack("<4sHH12xHH", b"PE\0\0", 0x8664, len(sections), len(optional), 0x22)
    return (
        (head.ljust(begin, b"\0") + header + bytes(optional) + table).ljust(headers, b"\0") + bodies + tail + signatures
    )


def kernel(text: bytes = b"kernel") -> bytes:
    """An EFI program in the kernel's place."""
    return portable({".text": text * 200})


def uki(**more: bytes) -> bytes:
    """A unified kernel image."""
    return portable({**PARTS, **{f".{name}": content for name, content in more.items()}, ".linux": kernel()})


@dataclass(frozen=True)
class Golden:
    """An image's folder; ``expected`` are the values that its boot measures without secure boot."""

    folder: Path
    name: str
    sha256: str
    expected: dict[str, str]

    def answer(self, **pcrs: str) -> dict[str, object]:
        """What a reference boot answers, with ``pcrs`` in place of the right ones."""
        values = {str(pcr): f"{pcr:064x}" for pcr in (*RELEASED_PCRS, 14)} | self.expected | pcrs
        return {"image_sha256": self.sha256, "firmware_sha256": "9" * 64, "pcrs": values, "seconds": 1.5}

    def measured(self, name: str, **pcrs: str) -> Path:
        """Write such an answer into the folder."""
        (self.folder / name).write_text(json.dumps(self.answer(**pcrs)) + "\n", encoding="utf-8")
        return self.folder / name


def _run(command: list[str], told: str = "") -> None:
    subprocess.run(command, input=told, text=True, check=True, capture_output=True)


def golden_folder(folder: Path, program: bytes | None = None, *, options: dict[str, str] | None = None) -> Golden:
    """Make the folder."""
    program = uki() if program is None else program
    (folder / "sbom").mkdir(parents=True)
    raw, esp, boot = folder / "raw", folder / "esp", folder / "BOOTX64.EFI"
    boot.write_bytes(program)
    with esp.open("wb") as stream:
        stream.truncate(2 * MIB)
    _run(["mkfs.vfat", "-n", "ESP", str(esp)])
    _run(["mmd", "-i", str(esp), "::/EFI", "::/EFI/BOOT"])
    _run(["mcopy", "-i", str(esp), str(boot), "::/EFI/BOOT/"])
    with raw.open("wb") as stream:
        stream.truncate(5 * MIB)
        stream.seek(MIB)
        stream.write(esp.read_bytes())
    table = f"label: gpt\nunit: sectors\nstart=2048, size=4096, type={ESP_TYPE}\nstart=6144, size=2048\n"
    _run(["sfdisk", "-q", str(raw)], table)
    image = folder / "image.qcow2"
    _run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(image)])
    for scratch in (raw, esp, boot):
        scratch.unlink()
    for name in EVIDENCE:
        text = LYNIS.format(index=74) if name == "baseline.dat" else f'"{name}"'
        (folder / name).write_text(text, encoding="utf-8")
    sha256 = digest_of(image)
    built = {
        "name": f"workspace-{sha256[:12]}", "directory": "/elsewhere", "image": "/elsewhere/image.qcow2", "image_sha256": sha256,
        "inputs_digest": "1" * 64, "created": "2026-11-29T00:10:00+00:00", "seconds": 1.0, "kernel": "6.12",
        "evidence": {name: digest_of(folder / name) for name in EVIDENCE},
    }  # fmt: skip
    inputs = {"digest": "1" * 64, "files": {"uv.lock": "2" * 64}, "options": options or {}}
    (folder / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    (folder / "build.json").write_text(json.dumps(built), encoding="utf-8")
    expected = {pcr: values[0] for pcr, values in expected_pcrs(program).items()}
    return Golden(folder, str(built["name"]), sha256, expected)
