"""NVIDIA's open kernel modules, built by DKMS for the kernels that lie in this root, and signed with the owner's key.

An image is built on a machine that runs another kernel, so the running one is never asked for: a kernel is a folder below
``/usr/lib/modules`` that has headers. The private key is handed to DKMS as a file that exists in memory alone.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from saw.errors import SawError

PACKAGE = "nvidia-current-open"
"""DKMS' name for the source package that Debian's ``nvidia-open-kernel-dkms`` brings."""
MODULES = ("nvidia", "nvidia-modeset", "nvidia-drm", "nvidia-uvm", "nvidia-peermem")
"""What is built, by the names of the built modules. They are installed as ``nvidia-current-open*.ko``."""
KEY_VARIABLE, CERTIFICATE_VARIABLE = "SAW_MODULE_KEY", "SAW_MODULE_CERTIFICATE"
"""Environment variables that DKMS' configuration (role ``gpu_driver``) takes the paths of the key from."""
_BUILD_S = 3600.0


class GpuError(SawError):
    """The driver cannot be built, or what was built is not what was asked for."""

    code = "gpu_failed"


class ModulesRefused(GpuError):
    """A kernel's modules are missing, of another kernel or driver, or not signed with the owner's key."""

    code = "gpu_modules_refused"


class Module(msgspec.Struct, frozen=True):
    """What ``modinfo`` says of one module: its file, the kernel it is for, its version, who signed it, with which key."""

    name: str
    file: str
    kernel: str
    version: str
    signer: str
    sig_key: str


@dataclass(frozen=True)
class Certificate:
    """The owner's certificate for modules: ``signer`` is its issuer's name, ``serial`` its number (hex, as modinfo writes it)."""

    signer: str
    serial: str


def kernels(root: Path = Path("/")) -> list[str]:
    """Return the releases of the kernels below ``root`` that have headers; raise :class:`GpuError` when there is none."""
    folder = root / "usr/lib/modules"
    found = sorted(path.name for path in folder.glob("*") if (path / "kernel").is_dir())
    ready = [name for name in found if os.path.lexists(folder / name / "build")]
    if not ready:
        raise GpuError(
            f"no kernel in {folder} has headers (kernels: {', '.join(found) or 'none'})",
            cure="install the headers package of that kernel, such as linux-headers-cloud-amd64",
        )
    return ready


def driver_version(root: Path = Path("/")) -> str:
    """Return the version of the driver's source below ``root``; raise :class:`GpuError` unless there is exactly one."""
    found = sorted(path.name.removeprefix(f"{PACKAGE}-") for path in (root / "usr/src").glob(f"{PACKAGE}-[0-9]*"))
    if len(found) != 1:
        raise GpuError(
            f"there is {'no' if not found else 'more than one'} source of {PACKAGE}: {', '.join(found) or 'none'}",
            cure="install nvidia-open-kernel-dkms (Debian, component contrib), one version of it",
        )
    return found[0]


def read_certificate(raw: bytes) -> Certificate:
    """Read a certificate (PEM or DER); raise :class:`GpuError` when it is none."""
    try:
        found = _parse(raw)
    except ValueError as error:
        raise GpuError(f"the certificate for modules cannot be read: {error}", cure="give a PEM or DER file") from error
    names = found.issuer.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if not names:
        raise GpuError(
            "the certificate for modules has no common name, so modinfo could not tell whose it is",
            cure="make one with -subj /CN=NAME",
        )
    return Certificate(str(names[0].value), _serial(found.serial_number))


def _parse(raw: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(raw) if raw.startswith(b"-----") else x509.load_der_x509_certificate(raw)


def _serial(number: int) -> str:
    """Return a serial number as the signature of a module carries it: whole bytes, the first without the sign bit (DER)."""
    return number.to_bytes(number.bit_length() // 8 + 1, "big").hex()


def same_pair(key: bytes, certificate: bytes) -> None:
    """Raise :class:`GpuError` unless the private key (PEM, without a password) belongs to the certificate."""
    try:
        ours = load_pem_private_key(key, None).public_key()
        theirs = _parse(certificate).public_key()
    except (TypeError, ValueError) as error:
        raise GpuError(
            f"the key for modules cannot be read: {error}", cure="give a PEM file without a password"
        ) from error
    if ours != theirs:
        raise GpuError("the key for modules does not belong to the certificate", cure="give the two files of one pair")


def read_module(name: str, file: Path) -> Module:
    """Ask ``modinfo`` about ``file``; raise :class:`GpuError` when it cannot read it."""
    return parse_modinfo(name, str(file), ask("modinfo", str(file)))


def ask(*argv: str) -> str:
    """Run a program that tells something; raise :class:`GpuError` with its words when it is missing or fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    except FileNotFoundError as error:
        raise GpuError(
            f"{argv[0]} is not installed", cure="look from inside the image, or on the host itself"
        ) from error
    if done.returncode:
        raise GpuError(f"`{' '.join(argv)}` failed ({done.returncode}): {done.stderr.strip()[-300:]}")
    return done.stdout


def parse_modinfo(name: str, file: str, text: str) -> Module:
    """Read the output of ``modinfo``. A field that is not there is empty."""
    told: dict[str, str] = {}
    for line in text.splitlines():
        field, colon, value = line.partition(":")
        if colon and re.fullmatch(r"[a-z_]+", field):
            told.setdefault(field, value.strip())
    kernel = told.get("vermagic", "").partition(" ")[0]
    key = told.get("sig_key", "").replace(":", "").lower()
    return Module(name, file, kernel, told.get("version", ""), told.get("signer", ""), key)


def installed_file(name: str, kernel: str, root: Path = Path("/")) -> Path:
    """Return where DKMS installed module ``name`` for ``kernel``, whatever it was packed with."""
    base = root / "usr/lib/modules" / kernel / "updates/dkms"
    stem = PACKAGE + name.removeprefix("nvidia")
    for suffix in (".ko", ".ko.xz", ".ko.zst", ".ko.gz"):
        if (path := base / f"{stem}{suffix}").exists():
            return path
    return base / f"{stem}.ko"


def judge(modules: list[Module], kernel: str, version: str, certificate: Certificate) -> list[str]:
    """Return every way in which ``modules`` are not what the image of ``kernel`` is to have."""
    problems = [f"{name} is missing" for name in MODULES if name not in {one.name for one in modules}]
    for one in modules:
        if one.kernel != kernel:
            problems.append(f"{one.name} is for kernel {one.kernel or 'none'}, wanted is {kernel}")
        if one.version != version:
            problems.append(f"{one.name} has version {one.version or 'none'}, wanted is {version}")
        if not one.signer:
            problems.append(f"{one.name} is not signed")
        elif (one.signer, one.sig_key.lstrip("0")) != (certificate.signer, certificate.serial.lstrip("0")):
            problems.append(f"{one.name} is signed by {one.signer} ({one.sig_key}), not with the owner's key")
    return problems


def look(certificate: Certificate, root: Path = Path("/")) -> tuple[list[Module], list[str]]:
    """Return the modules of every kernel below ``root`` and what is wrong with them."""
    version, found, problems = driver_version(root), [], []
    for kernel in kernels_with_modules(root):
        files = {name: installed_file(name, kernel, root) for name in MODULES}
        ours = [read_module(name, file) for name, file in files.items() if file.exists()]
        found += ours
        problems += [f"kernel {kernel}: {problem}" for problem in judge(ours, kernel, version, certificate)]
    return found, problems


def kernels_with_modules(root: Path = Path("/")) -> list[str]:
    """Return the kernels below ``root``; headers may be gone by now. Raise :class:`GpuError` when there is none."""
    found = sorted(path.parent.name for path in (root / "usr/lib/modules").glob("*/kernel") if path.is_dir())
    if not found:
        raise GpuError(f"there is no kernel in {root / 'usr/lib/modules'}", cure="install one, then build the modules")
    return found


def ensure(key: bytes, certificate: bytes, root: Path = Path("/")) -> tuple[bool, list[Module]]:
    """Build, sign and install what is missing or wrong on this host; return whether anything was done, and the modules.

    DKMS works on this host; ``root`` is where its result is looked for. Raises :class:`GpuError` when DKMS fails and
    :class:`ModulesRefused` when its result is not right.
    """
    wanted = read_certificate(certificate)
    found, problems = look(wanted, root)
    if not problems:
        return False, found
    same_pair(key, certificate)
    version = driver_version(root)
    with in_memory(key) as key_file, in_memory(certificate) as certificate_file:
        environment = {**os.environ, KEY_VARIABLE: key_file, CERTIFICATE_VARIABLE: certificate_file}
        for kernel in kernels(root):
            _dkms(["add", f"{PACKAGE}/{version}"], environment, may_fail=True)
            _dkms(["build", f"{PACKAGE}/{version}", "-k", kernel, "--force"], environment)
            _dkms(["install", f"{PACKAGE}/{version}", "-k", kernel, "--force"], environment)
    found, problems = look(wanted, root)
    refuse(problems)
    return True, found


def refuse(problems: list[str]) -> None:
    """Raise :class:`ModulesRefused` when there is a problem."""
    if problems:
        raise ModulesRefused(
            f"the GPU's kernel modules are not as they must be: {'; '.join(problems)}",
            cure="build them with the owner's key: role gpu_driver",
            details={"problems": list(problems)},
        )


def _dkms(words: list[str], environment: dict[str, str], *, may_fail: bool = False) -> None:
    done = subprocess.run(
        ["dkms", *words], capture_output=True, text=True, check=False, timeout=_BUILD_S, env=environment,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode and not may_fail:
        raise GpuError(
            f"`dkms {' '.join(words)}` failed ({done.returncode}): {(done.stdout + done.stderr).strip()[-800:]}",
            cure=f"read /var/lib/dkms/{PACKAGE}/*/build/make.log on that host",
        )


@contextmanager
def in_memory(content: bytes) -> Iterator[str]:
    """Yield a path that root's processes can read ``content`` from while this lasts; no file system ever holds it."""
    descriptor = os.memfd_create("saw-gpu", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/{os.getpid()}/fd/{descriptor}"
    finally:
        os.close(descriptor)
