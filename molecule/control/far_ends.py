"""Make what those at the other ends give the control host: secrets, and certificates of one authority for three servers.

python far_ends.py FOLDER      PostgreSQL's, the portal's and the identity provider's; everything is new each time
"""

from __future__ import annotations

import secrets
import sys
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from saw.files import write_atomic, write_private

SERVERS = {"database": "127.0.0.1", "pages": "10.79.0.10", "provider": "10.79.0.1"}


def main(folder: str) -> None:
    """Write them into ``folder``."""
    place = Path(folder)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    password = secrets.token_hex(16)
    write_private(place / "database.password", password)
    write_private(place / "broker.pgpass", f"127.0.0.1:5432:saw:saw:{password}\n")
    write_private(place / "oidc.secret", secrets.token_hex(16) + "\n")
    ca_key = ec.generate_private_key(ec.SECP256R1())
    authority = certificate("far ends", ca_key, None, ca_key)
    write_atomic(place / "far-ends.pem", authority.public_bytes(Encoding.PEM))
    for name, address in SERVERS.items():
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomic(place / f"{name}.pem", certificate(name, key, address, ca_key).public_bytes(Encoding.PEM))
        write_private(place / f"{name}.key", key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, address: str | None, ca_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    """One of a server at ``address``, or without one that of the authority itself."""
    now, ca = datetime.now(UTC), address is None
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "far ends")])
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=2)).add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
    )  # fmt: skip
    if address is None:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    else:
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        builder = builder.add_extension(names, critical=False)
    return builder.sign(ca_key, hashes.SHA256())


if __name__ == "__main__":
    main(*sys.argv[1:])
