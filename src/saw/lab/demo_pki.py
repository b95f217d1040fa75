"""Certificates of the demonstration's far end: an enterprise CA of its own, unrelated to the product's."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from saw.files import write_atomic, write_private


def ensure(directory: Path, names: tuple[str, ...]) -> Path:
    """Make CA, server key and server certificate for ``names`` once; return the directory."""
    return servers(directory, {"server": names})


def servers(directory: Path, names_of: Mapping[str, tuple[str, ...]]) -> Path:
    """Make a CA once, and for each server a key and a certificate for its names; return the directory.

    ``ca.pem`` comes last, so what was cut short is made anew. A server that was added later is, too, with a CA of its own.
    """
    made = all((directory / f"{server}.{end}").exists() for server in names_of for end in ("pem", "key"))
    if made and (directory / "ca.pem").exists():
        return directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    (directory / "ca.pem").unlink(missing_ok=True)
    ca_key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Example Enterprise CA")])
    ca = (
        _builder(issuer, ca_key.public_key(), issuer, ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(False, False, False, False, False, True, True, False, False), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    for server, names in names_of.items():
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
        certificate = (
            _builder(subject, key.public_key(), issuer, ca_key.public_key())
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


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, issuer: x509.Name, issuer_key: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    """Return a certificate of a year without what it is for; it names its key and its issuer's, as RFC 5280, 4.2.1, wants."""
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=365))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )
