#!/usr/bin/python3
"""Stands in for DKMS: `dkms install` leaves modules that hold what modinfo reads, signed as scripts/sign-file of the kernel does.

It takes key and certificate from where DKMS' own configuration says (bash, as the real one reads it), and keeps no copy.
"""

import struct
import subprocess
import sys
from pathlib import Path

MODULES = ("", "-modeset", "-drm", "-uvm", "-peermem")


def section(offset, size, name, kind, link=0):
    """A header of an ELF64 section."""
    return struct.pack("<IIQQQQIIQQ", name, kind, 0, 0, offset, size, link, 0, 1, 0)


def module(kernel, version):
    """An ELF file for x86-64 with a section .modinfo and nothing else (elf(5))."""
    told = f"version={version}\0vermagic={kernel} SMP\0license=none\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    body = told + names
    sections = section(0, 0, 0, 0) + section(64, len(told), 1, 1) + section(64 + len(told), len(names), 10, 3)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    return (
        ident + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64, 3, 2) + body + sections
    )


def configured():
    """Return the paths of key and certificate, as the configuration says."""
    script = '. /etc/dkms/framework.conf.d/50-saw-gpu.conf; printf "%s\\n%s" "$mok_signing_key" "$mok_certificate"'
    return subprocess.run(["bash", "-ec", script], check=True, capture_output=True, text=True).stdout.split("\n")


def signature(raw):
    """The signature over a module, and its trailer (struct module_signature: PKCS#7 is 2; the length is big-endian)."""
    key, certificate = configured()
    command = ["openssl", "cms", "-sign", "-binary", "-noattr", "-nocerts", "-md", "sha256", "-outform", "DER"]
    command += ["-inkey", key, "-signer", certificate]
    made = subprocess.run(command, input=raw, check=True, capture_output=True).stdout
    return made + struct.pack(">8BI", 0, 0, 2, 0, 0, 0, 0, 0, len(made)) + b"~Module signature appended~\n"


def main(verb, what, *options):
    """Do what DKMS is asked for."""
    source, version = what.split("/")
    if verb != "install":
        return 0
    for needed in (
        f"/usr/src/{source}-{version}/patches/pci-resize-resource.patch",
        f"/etc/dkms/{source}-{version}.conf",
    ):
        if not Path(needed).exists():
            sys.exit(f"{needed} is missing: nothing would be patched")
    kernel = options[options.index("-k") + 1]
    place = Path("/usr/lib/modules", kernel, "updates/dkms")
    place.mkdir(parents=True, exist_ok=True)
    for name in MODULES:
        raw = module(kernel, version)
        (place / f"{source}{name}.ko").write_bytes(raw + signature(raw))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
