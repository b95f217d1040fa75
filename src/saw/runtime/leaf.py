"""The local certificate authority of ring 1, made at each boot, and the one leaf certificate per policy generation.

The authority's key never leaves ``/run`` (memory) and only the sandbox trusts it, so it can speak for nothing outside this
workspace. The leaf names exactly the hosts of the policy (RFC 5280 section 4.2.1.6, RFC 6125 section 6.4.3).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import pkcs12
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from saw.errors import ConfigError
from saw.files import write_atomic, write_private

_BACKDATE = timedelta(hours=1)
_LIFETIME = timedelta(days=397)
_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----")


class LeafAuthority:
    """Signs leaf certificates for ring 1; ``ca_pem`` is what the sandbox trusts."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def ensure(cls, directory: Path, now: datetime) -> LeafAuthority:
        """Load the authority in ``directory``, or make a new one there (key readable by its owner alone)."""
        key_file, certificate_file = directory / "ca.key", directory / "ca.pem"
        if key_file.exists() and certificate_file.exists():
            key = serialization.load_pem_private_key(key_file.read_bytes(), None)
            certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
            if isinstance(key, ec.EllipticCurvePrivateKey) and key.public_key() == certificate.public_key():
                return cls(key, certificate)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "workspace egress inspection")])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(now + _LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        authority = cls(key, certificate)
        write_private(key_file, _private_pem(key))
        write_atomic(certificate_file, authority.ca_pem)
        return authority

    def issue(self, hosts: Iterable[str], now: datetime) -> tuple[bytes, bytes]:
        """Return ``(certificate_pem, key_pem)`` of a server certificate for ``hosts`` (names; globs as SAN wildcards)."""
        names = sorted({san for host in hosts if (san := san_of(host))})
        if not names:
            names = ["ring1.saw.internal"]
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "ring 1")]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _BACKDATE)
            .not_valid_after(min(now + _LIFETIME, self._certificate.not_valid_after_utc))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM), _private_pem(key)

    def issued(self, certificate_pem: bytes) -> bool:
        """Tell whether this authority signed the certificate."""
        try:
            x509.load_pem_x509_certificate(certificate_pem).verify_directly_issued_by(self._certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True


def san_of(host: str) -> str | None:
    """Return the SAN for a policy host, or None where none exists (an address).

    ``**`` becomes ``*``, which covers one label only: deeper names fail at the client, never the other way round.
    """
    if not host or ":" in host or host.replace(".", "").isdigit():
        return None
    return host.lower().replace("**", "*")


def publish_bundle(system_bundle: Path, authority: LeafAuthority, target: Path) -> None:
    """Write the sandbox's trust bundle, the system's authorities and ring 1's.

    Beside it lie the same for Java (``.p12``), and ring 1's alone (``ring1-ca.pem``).
    """
    try:
        system = system_bundle.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read the system's certificate bundle {system_bundle}: {error.strerror}",
            cure="install ca-certificates",
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    wanted = system.rstrip(b"\n") + b"\n" + authority.ca_pem
    for_java = target.with_suffix(".p12")
    alone = target.with_name("ring1-ca.pem")
    if not target.exists() or target.read_bytes() != wanted or not for_java.exists() or not alone.exists():
        write_atomic(for_java, _java_trust(wanted))
        write_atomic(alone, authority.ca_pem)
        write_atomic(target, wanted)


def _java_trust(bundle: bytes) -> bytes:
    """Return a PKCS #12 file (RFC 7292) of the certificates of ``bundle``, marked as Java marks what it trusts.

    It has no password, as it holds nothing secret: ring 1's authority may be read by all, and nobody in the sandbox may write it.
    """
    certificates: dict[bytes, x509.Certificate] = {}
    for block in _PEM.findall(bundle):
        try:
            with warnings.catch_warnings():
                # An old authority with a serial number that RFC 5280 does not know is the distribution's matter.
                warnings.simplefilter("ignore", CryptographyDeprecationWarning)
                certificate = x509.load_pem_x509_certificate(block)
        except ValueError:
            continue  # what cannot be read cannot be trusted; the others can
        certificates[certificate.fingerprint(hashes.SHA256())] = certificate
    named = [
        pkcs12.PKCS12Certificate(certificate, f"authority-{number}".encode())
        for number, certificate in enumerate(certificates.values())
    ]
    return pkcs12.serialize_java_truststore(named, serialization.NoEncryption())


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )
