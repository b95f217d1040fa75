"""Certificates of the demonstration's far end: an enterprise CA of its own, unrelated to the product's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from saw.files import write_atomic, write_private

LIFE = timedelta(days=365)
RENEW = timedelta(days=30)
"""What ends within this time is made anew."""


def utc_now() -> datetime:
    """Return the time of the machine's clock."""
    return datetime.now(UTC)


def ensure(directory: Path, names: tuple[str, ...], clock: Callable[[], datetime] = utc_now) -> Path:
    """Make CA, server key and server certificate for ``names``; see :func:`servers`."""
    return servers(directory, {"server": names}, clock)


def servers(directory: Path, names_of: Mapping[str, tuple[str, ...]], clock: Callable[[], datetime] = utc_now) -> Path:
    """Make a CA, and for each server a key and a certificate for its names; return the directory.

    What is there is kept while it is whole, has the same names and lasts for :data:`RENEW` more; else all is made anew, with
    another CA. ``ca.pem`` comes last, so what was cut short is made anew, too.
    """
    now = clock()
    if _lasts(directory / "ca.pem", None, now) and all(
        (directory / f"{server}.key").exists() and _lasts(directory / f"{server}.pem", names, now)
        for server, names in names_of.items()
    ):
        return directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "ca.pem").unlink(missing_ok=True)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Example Enterprise CA")])
    ca = (
        _builder(issuer, ca_key.public_key(), issuer, ca_key.public_key(), now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    for server, names in names_of.items():
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = (
            _builder(subject, key.public_key(), issuer, ca_key.public_key(), now)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(ca_key, hashes.SHA256())
        )
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(directory / f"{server}.key", private)
        write_atomic(directory / f"{server}.pem", certificate.public_bytes(serialization.Encoding.PEM))
    write_atomic(directory / "ca.pem", ca.public_bytes(serialization.Encoding.PEM))
    return directory


def _lasts(path: Path, names: tuple[str, ...] | None, now: datetime) -> bool:
    """Tell whether the certificate at ``path`` lasts for :data:`RENEW` more and is for ``names``, where there are any."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        ends = certificate.not_valid_after_utc
        if not certificate.not_valid_before_utc <= now <= ends - RENEW:
            return False
        if names is None:
            return True
        said = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (FileNotFoundError, ValueError, x509.ExtensionNotFound):
        return False
    return tuple(said.get_values_for_type(x509.DNSName)) == names


def _builder(
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePublicKey,
    now: datetime,
) -> x509.CertificateBuilder:
    """Return a certificate of a year without what it is for; it names its key and its issuer's, as RFC 5280, 4.2.1, wants."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + LIFE)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
