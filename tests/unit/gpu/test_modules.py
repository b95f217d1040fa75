"""The kernel modules of a GPU's driver: for the kernels of the image, whole, and signed with the owner's key, or refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import given
from hypothesis import strategies as st

from saw.gpu import modules
from saw.gpu.driver import display_packages, driver_of, installed_packages, modprobe_configuration, nouveau
from saw.gpu.modules import MODULES, Certificate, GpuError, Module, ModulesRefused

pytestmark = pytest.mark.control("GPU-01")
KERNEL, VERSION = "6.12.118+deb13-cloud-amd64", "550.163.01"
MODINFO = f"""\
filename:       /lib/modules/{KERNEL}/updates/dkms/nvidia-current-open.ko
alias:          char-major-195-*
version:        {VERSION}
license:        Dual MIT/GPL
name:           nvidia
vermagic:       {KERNEL} SMP preempt mod_unload modversions
sig_id:         PKCS#7
signer:         Example modules
sig_key:        21:25:C0:34
sig_hashalgo:   sha256
signature:      3F:00:11:22:
\t\tFF:FF:FF
parm:           NVreg_DeviceFileUID:int
"""
OWNER = Certificate("Example modules", "2125c034")


def module(name: str = "nvidia", **fields: str) -> Module:
    return Module(**{"name": name, "file": "/f", "kernel": KERNEL, "version": VERSION, "signer": OWNER.signer,
                     "sig_key": OWNER.serial, **fields})  # fmt: skip


Pair = tuple[bytes, bytes]


def make_pair(name: str | None = "Example modules", serial: int = 0x2125C034) -> Pair:
    """A key (PEM) and its certificate (PEM)."""
    key = rsa.generate_private_key(65537, 2048)
    attributes = [x509.NameAttribute(x509.NameOID.COMMON_NAME, name)] if name else []
    subject, begin = x509.Name(attributes), datetime(2026, 1, 1, tzinfo=UTC)
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(serial).not_valid_before(begin).not_valid_after(begin + timedelta(days=400))
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption()), certificate.public_bytes(encoding)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return make_pair()


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """A root tree with kernels (and the headers of some), and with versions of the driver's source."""

    def make(*kernels: str, headers: tuple[str, ...] = (), versions: tuple[str, ...] = (VERSION,)) -> Path:
        for name in kernels:
            (tmp_path / "usr/lib/modules" / name / "kernel").mkdir(parents=True)
        for name in headers:
            (tmp_path / "usr/lib/modules" / name / "build").symlink_to("/usr/src/nowhere")
        for version in versions:
            (tmp_path / f"usr/src/nvidia-current-open-{version}").mkdir(parents=True)
        return tmp_path

    return make


def test_modinfo_is_read_as_it_writes() -> None:
    assert modules.parse_modinfo("nvidia", "/f", MODINFO) == module()
    unsigned = MODINFO.partition("sig_id")[0]
    assert modules.parse_modinfo("nvidia", "/f", unsigned).signer == ""


@given(st.text())
def test_any_text_is_read_without_an_error(text: str) -> None:
    assert modules.parse_modinfo("nvidia", "/f", text).name == "nvidia"


def test_modules_that_are_right_are_taken_and_each_fault_is_named() -> None:
    right = [module(name) for name in MODULES]
    assert modules.judge(right, KERNEL, VERSION, OWNER) == []
    for fault, words in (
        ({"kernel": os.uname().release}, f"nvidia is for kernel {os.uname().release}, wanted is {KERNEL}"),
        ({"version": "570.1"}, "nvidia has version 570.1"),
        ({"signer": "", "sig_key": ""}, "nvidia is not signed"),
        ({"signer": "DKMS module signing key"}, "not with the owner's key"),
        ({"sig_key": "2125c035"}, "not with the owner's key"),
    ):
        (problem,) = modules.judge([module(**fault), *right[1:]], KERNEL, VERSION, OWNER)
        assert words in problem
    assert modules.judge(right[:4], KERNEL, VERSION, OWNER) == ["nvidia-peermem is missing"]


def test_kernels_are_those_of_the_tree_and_never_the_running_one(tree: Callable[..., Path]) -> None:
    root = tree(KERNEL, "6.1.0-old", headers=(KERNEL,))
    assert modules.kernels(root) == [KERNEL]
    assert modules.kernels_with_modules(root) == ["6.1.0-old", KERNEL]
    (root / "usr/lib/modules" / KERNEL / "build").unlink()
    with pytest.raises(GpuError, match="has headers"):
        modules.kernels(root)


@pytest.mark.parametrize(("versions", "words"), [((), "there is no source"), (("550.1", "555.2"), "more than one")])
def test_the_source_of_the_driver_is_one(tree: Callable[..., Path], versions: tuple[str, ...], words: str) -> None:
    with pytest.raises(GpuError, match=words):
        modules.driver_version(tree(KERNEL, versions=versions))


def test_the_version_is_that_of_the_source(tree: Callable[..., Path]) -> None:
    assert modules.driver_version(tree(KERNEL)) == VERSION


def test_a_certificate_says_what_modinfo_will_show(pair: Pair) -> None:
    assert modules.read_certificate(pair[1]) == OWNER
    der = x509.load_pem_x509_certificate(pair[1]).public_bytes(serialization.Encoding.DER)
    assert modules.read_certificate(der) == OWNER
    high = make_pair(serial=0xFF01)
    assert modules.read_certificate(high[1]).serial == "00ff01"
    with pytest.raises(GpuError, match="cannot be read"):
        modules.read_certificate(b"nonsense")
    with pytest.raises(GpuError, match="has no common name"):
        modules.read_certificate(make_pair(name=None)[1])


def test_key_and_certificate_are_one_pair(pair: Pair) -> None:
    modules.same_pair(*pair)
    with pytest.raises(GpuError, match="does not belong"):
        modules.same_pair(make_pair()[0], pair[1])
    with pytest.raises(GpuError, match="cannot be read"):
        modules.same_pair(b"nonsense", pair[1])


def test_a_key_in_memory_is_a_file_for_others_and_gone_afterwards() -> None:
    with modules.in_memory(b"secret") as path:
        assert subprocess.run(["cat", path], capture_output=True, check=True).stdout == b"secret"
        assert subprocess.run(["sh", "-c", f"[ -f {path} ]"], check=False).returncode == 0
    assert not Path(path).exists()


def test_what_dkms_calls_done_is_looked_at_and_it_gets_the_key_by_path_alone(
    tree: Callable[..., Path], tmp_path: Path, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, tools, log = tree(KERNEL, headers=(KERNEL,)), tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    (tools / "dkms").write_text(f'#!/bin/sh\necho "$@" >>{log}\nsha256sum <"$SAW_MODULE_KEY" >>{log}\n')
    (tools / "dkms").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(ModulesRefused, match="nvidia is missing") as refused:
        modules.ensure(*pair, root)
    assert refused.value.details["problems"]
    calls = log.read_text()
    assert f"build nvidia-current-open/{VERSION} -k {KERNEL} --force" in calls
    assert hashlib.sha256(pair[0]).hexdigest() in calls
    assert "PRIVATE" not in calls
    (tools / "dkms").write_text("#!/bin/sh\necho no headers >&2\nexit 21\n")
    with pytest.raises(GpuError, match=r"`dkms build .*failed \(21\): no headers"):
        modules.ensure(*pair, root)


# --- the rest of the driver --------------------------------------------------------------------------------------------------


def test_packages_of_a_display_stack_are_known_by_name() -> None:
    shown = [
        "xserver-xorg-core",
        "libx11-6",
        "libwayland-client0",
        "libgl1",
        "libegl1",
        "nvidia-settings",
        "nvidia-driver",
    ]
    quiet = ["nvidia-smi", "nvidia-persistenced", "nvidia-open-kernel-dkms", "libcuda1", "glx-alternative-nvidia", "update-glx",
             "libxxhash0", "libxtables12", "libglib2.0-0t64", "nvidia-modprobe", "firmware-nvidia-gsp"]  # fmt: skip
    assert display_packages([*quiet, *shown]) == sorted(shown)


def test_a_driver_without_firmware_or_with_a_display_is_not_whole(tree: Callable[..., Path], pair: Pair) -> None:
    root, wanted = tree(KERNEL), modules.read_certificate(pair[1])
    status = root / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    entry = (
        "Package: {}\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\nMaintainer: M <m@example.com>\n"
    )
    entry += "Description: d\n\n"
    status.write_text(entry.format("nvidia-smi") + entry.format("libx11-6"))
    assert installed_packages(root) == ["libx11-6", "nvidia-smi"]
    (root / "etc/modprobe.d").mkdir(parents=True)
    problems = "\n".join(driver_of(wanted, root=root).problems)
    for words in (
        "nvidia-uvm is missing",
        "there is no firmware",
        "libx11-6 belongs to a display stack",
        "nouveau is not blocked",
    ):
        assert words in problems
    status.write_text(entry.format("nvidia-smi"))
    firmware = root / "usr/lib/firmware/nvidia" / VERSION / "gsp_ga10x.bin"
    firmware.parent.mkdir(parents=True)
    firmware.touch()
    (root / "etc/modprobe.d/50.conf").write_text("blacklist nouveau\ninstall nouveau /bin/false\n")
    found = driver_of(wanted, root=root)
    assert found.firmware == ("gsp_ga10x.bin",)
    assert [one for one in found.problems if "is missing" not in one] == []


@pytest.mark.parametrize("line", ["blacklist nouveau", "install nouveau /bin/false"])
def test_nouveau_is_blocked_by_alias_and_by_name(tmp_path: Path, line: str) -> None:
    folder = tmp_path / "etc/modprobe.d"
    folder.mkdir(parents=True)
    (folder / "50.conf").write_text(f"{line}\n")
    assert len(nouveau(modprobe_configuration(tmp_path))) == 1
    (folder / "50.conf").write_text("blacklist nouveau\ninstall nouveau /bin/false\n")
    assert nouveau(modprobe_configuration(tmp_path)) == []
