"""The owner's key that a boot image is signed with, and the variable store that lets nothing else boot.

Chosen by ``make image SECURE_BOOT_KEY=… SECURE_BOOT_CERTIFICATE=… SECURE_BOOT_VARIABLES=…`` or the environment variables below;
nothing chosen means an unsigned image. The key stays where it is: ``sbsign`` reads it by its path on the build machine, after the
tree was provisioned, so that it is never in the tree, the image, a log or an argument list.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from saw.image.disk import ImageError, digest_of, run
from saw.image.uefi_keys import expected_pcr_7, fingerprint, read_certificate, read_store
from saw.vm.secure_boot import TEMPLATE

VARIABLE = "SAW_IMAGE_SECURE_BOOT"
"""Environment variables begin with this: ``_KEY``, ``_CERTIFICATE`` and ``_VARIABLES``, each a path."""
MAKE = "make them with saw image secure-boot keys and enrol (docs/images.md)"


class SignedBy(msgspec.Struct, frozen=True):
    """Whose an image is: SHA-256 of the certificate (DER) that verifies its boot image, and of the variable store beside it.

    ``pcr_7`` is what a boot of it with that store measures into PCR 7 (SHA-256 bank), computed and not yet seen.
    """

    certificate_sha256: str
    variables_sha256: str
    pcr_7: str


@dataclass(frozen=True)
class OwnerKey:
    """The owner's key for boot images on this machine, by path: private key and certificate (PEM), and the variable store."""

    key: Path
    certificate: Path
    variables: Path

    @property
    def signed_by(self) -> SignedBy:
        """Return what a record says of an image that is signed with this key."""
        mark = fingerprint(read_certificate(self.certificate))
        return SignedBy(mark, digest_of(self.variables), expected_pcr_7(self.variables, mark))

    @property
    def inputs(self) -> dict[str, str]:
        """Return what stands among the inputs of an image: certificate and variable store, and never the key."""
        return {
            "secure-boot-certificate": fingerprint(read_certificate(self.certificate)),
            "secure-boot-variables": digest_of(self.variables),
        }


def chosen(environment: Mapping[str, str] | None = None) -> OwnerKey | None:
    """Return the key that the environment names, None where it names none; raises as :func:`owner_key`."""
    values = os.environ if environment is None else environment
    key, certificate, variables = (values.get(f"{VARIABLE}_{part}", "") for part in ("KEY", "CERTIFICATE", "VARIABLES"))
    return owner_key(key, certificate, variables)


def owner_key(key: str, certificate: str, variables: str) -> OwnerKey | None:
    """Return the checked key, None where nothing is named; raise :class:`ImageError` when its images would boot nowhere.

    Certificate and key have to be a pair, and the store has to let the certificate in, belong to somebody and be switched on.
    """
    if not (key or certificate or variables):
        return None
    for word, value in (("key", key), ("certificate", certificate), ("variables", variables)):
        if not value:
            raise ImageError(f"secure boot needs a {word}, too: SECURE_BOOT_{word.upper()}", cure=MAKE)
        if not Path(value).is_file():
            raise ImageError(f"{value} is no file, and SECURE_BOOT_{word.upper()} names it", cure=MAKE)
    found = OwnerKey(Path(key).resolve(), Path(certificate).resolve(), Path(variables).resolve())
    _pair(found)
    mark, store = fingerprint(read_certificate(found.certificate)), read_store(found.variables)
    if not store.on or not store.pk:
        raise ImageError(
            f"the variable store {variables} has no owner (PK), or secure boot is off in it",
            cure="make it with saw image secure-boot enrol",
        )
    if mark not in store.db:
        raise ImageError(
            f"the variable store {variables} does not let {certificate} in: an image signed with it would not boot",
            cure="enrol the certificate: saw image secure-boot enrol --db",
        )
    return found


def _pair(owner: OwnerKey) -> None:
    try:
        key = serialization.load_pem_private_key(owner.key.read_bytes(), None)
    except OSError as error:
        raise ImageError(f"cannot read {owner.key}: {error.strerror}", cure="let the builder read it") from error
    except (TypeError, ValueError) as error:
        raise ImageError(
            f"{owner.key} is no private key in PEM without a password", cure="give one that no password protects"
        ) from error
    if not isinstance(key, rsa.RSAPrivateKey) or key.key_size < 2048:
        raise ImageError(f"{owner.key} is no RSA key of 2048 bits or more", cure="firmware takes no other: " + MAKE)
    certificate = read_certificate(owner.certificate)
    if b"-----BEGIN" not in owner.certificate.read_bytes():
        raise ImageError(
            f"{owner.certificate} is no certificate in PEM, and sbsign takes no other",
            cure="convert it: openssl x509 -inform DER -in FILE -out FILE.pem",
        )
    if certificate.public_key() != key.public_key():
        raise ImageError(f"{owner.certificate} does not belong to {owner.key}", cure="name the two of one pair")


def sign(boot_image: Path, key: Path, certificate: Path) -> None:
    """Sign the UEFI program ``boot_image`` in place and verify it; raise :class:`ImageError`."""
    signed = boot_image.with_suffix(".signed")
    run("sbsign", "--key", str(key), "--cert", str(certificate), "--output", str(signed), str(boot_image))
    run("sbverify", "--cert", str(certificate), str(signed))
    os.replace(signed, boot_image)


def place_store(owner: OwnerKey, folder: Path, expected: SignedBy) -> dict[str, str]:
    """Copy the variable store beside the image; return its name → SHA-256.

    Raises :class:`ImageError` when certificate or store changed meanwhile.
    """
    (folder / TEMPLATE).write_bytes(owner.variables.read_bytes())
    same = fingerprint(read_certificate(owner.certificate)) == expected.certificate_sha256
    if not same or digest_of(folder / TEMPLATE) != expected.variables_sha256:
        raise ImageError("certificate or variable store changed during the build", cure="build again")
    return {TEMPLATE: expected.variables_sha256}
