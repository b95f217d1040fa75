"""A VM with its owner's keys boots what they signed and nothing else: real firmware, kernel, signatures and TPM, emulated."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID

from saw.image import secure_boot as image_secure_boot
from saw.image import uefi_keys
from saw.vm import qemu, secure_boot

sys.path.insert(0, str(Path(__file__).resolve().parent))
import boot_images
import golden_vm

NEEDED = (secure_boot.FIRMWARE, uefi_keys.FACTORY, boot_images.STUB)
pytestmark = [
    pytest.mark.skipif(
        any(not path.exists() for path in NEEDED),
        reason="the packages ovmf (with secboot) and systemd-boot-efi are missing",
    ),
    pytest.mark.control("IMG-01"),
]
REFUSED = ("Access Denied", "Security Violation")
ENDED = "Kernel panic"
"""There is no root file system: a kernel that was let in comes this far."""


@dataclass(frozen=True)
class Shop:
    """One owner's keys, certificate for kernel modules, variable store, and boot images by what became of them."""

    keys: Path
    store: Path
    images: dict[str, Path]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    place = tmp_path_factory.mktemp("shop")
    for owner in ("ours", "theirs", "modules"):
        uefi_keys.make_keys(place / owner, owner)
    ours = place / "ours"
    store = place / "owner.fd"
    uefi_keys.enrol(ours / "PK.crt", [ours / "KEK.crt"], [ours / "db.crt", place / "modules/db.crt"], store)
    images = {name: place / f"{name}.efi" for name in ("unsigned", "signed", "other", "tampered")}
    images["unsigned"].write_bytes(boot_images.unified(boot_images.kernel(place / "kernel")))
    for name, keys in (("signed", ours), ("other", place / "theirs")):
        shutil.copyfile(images["unsigned"], images[name])
        image_secure_boot.sign(images[name], keys / "db.key", keys / "db.crt")
    content = images["signed"].read_bytes()
    changed = content.replace(b"saw.test=before", b"saw.test=beyond", 1)
    assert changed != content
    images["tampered"].write_bytes(changed)
    return Shop(place, store, images)


Boot = Callable[..., str]


@pytest.fixture
def boot(tmp_path: Path, shop: Shop) -> Iterator[Boot]:
    """Boot an image as the driver does and return the console; ``store``: with the owner's variable store beside it."""

    def run(name: str, *, store: bool = True) -> str:
        folder = tmp_path / "image"
        folder.mkdir()
        boot_images.disk(shop.images[name], folder / "image.qcow2")
        if store:
            shutil.copyfile(shop.store, folder / secure_boot.TEMPLATE)
        vm = golden_vm.blank(folder / "image.qcow2", memory_mib=512, cpus=1, data_disk_mib=64)
        console = golden_vm.boot(vm, lambda text: any(word in text for word in (*REFUSED, ENDED)))
        assert qemu.status(vm)["secure_boot"] is store
        return console

    with golden_vm.driver(tmp_path):
        yield run


def test_what_the_owner_signed_boots_and_its_kernel_sees_secure_boot_and_the_key_for_modules(
    shop: Shop, boot: Boot
) -> None:
    console = boot("signed")
    assert not any(word in console for word in REFUSED), console[-2000:]
    assert "secureboot: Secure boot enabled" in console, console[-2000:]
    assert "Kernel is locked down from EFI Secure Boot" in console
    certificate = x509.load_pem_x509_certificate((shop.keys / "modules/db.crt").read_bytes())
    name = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
    assert f"integrity: Loaded X.509 cert '{name}: " in console


@pytest.mark.parametrize("name", ["unsigned", "other", "tampered"])
def test_the_firmware_refuses_what_the_owner_did_not_sign(boot: Boot, name: str) -> None:
    console = boot(name)
    assert "Linux version" not in console
    refusals = [line for line in console.splitlines() if "failed to load" in line and "NVMe" in line]
    assert refusals, console[-2000:]
    assert all(any(word in line for word in REFUSED) for line in refusals)


@pytest.mark.thorough
def test_without_the_owners_store_the_same_unsigned_image_boots_as_ever(boot: Boot) -> None:
    console = boot("unsigned", store=False)
    assert "Linux version" in console, console[-2000:]
    assert "Secure boot enabled" not in console
