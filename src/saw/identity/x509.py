"""The X.509 authority: workspace SVIDs, server and perimeter certificates, and their strict reading.

Certificates follow X.509-SVID (SPIFFE) and RFC 5280: one URI SAN names the holder, the subject is informative only. An
SVID lives at most ten minutes and carries the attested policy digest in a non-critical extension.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal, Self

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from saw.files import write_atomic, write_private
from saw.identity.names import (
    BACKDATE,
    AuthorityExistsError,
    IdentityError,
    SpiffeId,
    check_trust_domain,
    lifetime,
    parse_spiffe_id,
    private_directory,
    read_private,
    utc,
)

__all__ = [
    "Authority",
    "IdentityError",
    "SpiffeId",
    "Svid",
    "load_csr",
    "new_key_and_csr",
    "parse_spiffe_id",
    "parse_svid",
    "verify_peer",
    "verify_svid",
]

POLICY_DIGEST_OID = x509.ObjectIdentifier("1.3.6.1.4.1.61509.1.1")
SVID_TTL = timedelta(minutes=10)
SERVER_TTL = timedelta(days=90)
AUTHORITY_TTL = timedelta(days=5 * 365)
MAX_PEM = 16 * 1024

_DIGEST = re.compile(r"[0-9a-f]{64}")
_UTF8_STRING = 0x0C
_KEY_FILE = "ca-key.pem"
_CERTIFICATE_FILE = "ca.pem"


class Svid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a workspace SVID says: its holder, the attested policy digest (hex), its end and its own identity.

    ``sha256`` is the lower-case hex SHA-256 of the DER certificate.
    """

    workspace_id: str
    policy_digest: str
    not_after: datetime
    sha256: str
    serial: int
    trust_domain: str


class Authority:
    """The certificate authority of one trust domain. Whoever keeps its key asks for it by :meth:`key_pem`."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate, trust_domain: str) -> None:
        self._key = key
        self._certificate = certificate
        self.trust_domain = trust_domain
        self.ca_pem = certificate.public_bytes(serialization.Encoding.PEM)

    @classmethod
    def create(cls, directory: Path | str, trust_domain: str, now: datetime) -> Self:
        """Make a new authority in ``directory`` (0700, key 0600); raise :class:`AuthorityExistsError` if one is there."""
        check_trust_domain(trust_domain)
        directory = private_directory(Path(directory))
        if (directory / _KEY_FILE).exists():
            raise AuthorityExistsError(
                f"{directory} already holds an authority", cure="load it, or choose another directory"
            )
        made = cls.make(trust_domain, now)
        write_private(directory / _KEY_FILE, made.key_pem())
        write_atomic(directory / _CERTIFICATE_FILE, made.ca_pem)
        return made

    @classmethod
    def make(cls, trust_domain: str, now: datetime) -> Self:
        """Make a new authority that lies nowhere yet."""
        check_trust_domain(trust_domain)
        key = ec.generate_private_key(ec.SECP256R1())
        start = utc(now)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{trust_domain} workspace authority"[:64])])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - BACKDATE)
            .not_valid_after(start + AUTHORITY_TTL)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(authority=True), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]),
                critical=False,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        return cls(key, certificate, trust_domain)

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Read the authority of ``directory``; raise :class:`IdentityError` when key or certificate cannot be used."""
        directory = Path(directory)
        try:
            certificate = (directory / _CERTIFICATE_FILE).read_bytes()
        except OSError as error:
            raise IdentityError(f"{directory} holds no usable authority", cure="restore it from its backup") from error
        return cls.parse(read_private(directory / _KEY_FILE), certificate, str(directory))

    @classmethod
    def parse(cls, key_pem: bytes, ca_pem: bytes, place: str) -> Self:
        """Read an authority; raise :class:`IdentityError` that says that it came from ``place``."""
        try:
            key = serialization.load_pem_private_key(key_pem, None)
            certificate = x509.load_pem_x509_certificate(ca_pem)
            names = _uris(certificate)
        except (ValueError, TypeError, x509.ExtensionNotFound) as error:
            raise IdentityError(f"{place} holds no usable authority", cure="restore it from its backup") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise IdentityError(f"key and certificate in {place} do not belong together", cure="restore both")
        if len(names) != 1 or not names[0].startswith("spiffe://"):
            raise IdentityError(f"the certificate in {place} names no trust domain", cure="restore it")
        return cls(key, certificate, check_trust_domain(names[0].removeprefix("spiffe://")))

    def key_pem(self) -> bytes:
        """Return the private key (PEM, PKCS#8), for where it is kept."""
        return _private_pem(self._key)

    def issue_svid(
        self,
        csr_pem: bytes | str,
        workspace_id: str,
        policy_digest: str,
        now: datetime,
        ttl: timedelta | int = SVID_TTL,
    ) -> bytes:
        """Return a workspace SVID (PEM) for the key of ``csr_pem``; names inside the CSR are ignored.

        ``policy_digest`` is the loaded policy digest, lower-case hex; ``ttl`` at most ten minutes.
        """
        if not _DIGEST.fullmatch(policy_digest):
            raise IdentityError("the policy digest is not 64 lower-case hex digits", cure="pass the bundle's digest")
        extension = x509.UnrecognizedExtension(
            POLICY_DIGEST_OID, bytes([_UTF8_STRING, len(policy_digest)]) + policy_digest.encode()
        )
        holder = parse_spiffe_id(f"spiffe://{self.trust_domain}/workspace/{workspace_id}")
        return self._issue(
            load_csr(csr_pem),
            names=[x509.UniformResourceIdentifier(holder.uri)],
            common_name=holder.name,
            usage=[ExtendedKeyUsageOID.CLIENT_AUTH],
            now=now,
            ttl=lifetime(ttl, SVID_TTL, "workspace SVID"),
            extra=[extension],
        )

    def issue_server(
        self,
        csr_pem: bytes | str,
        dns_names: Sequence[str],
        now: datetime,
        ttl: timedelta | int = SERVER_TTL,
        spiffe_path: str | None = None,
    ) -> bytes:
        """Return a server certificate (PEM) for ``dns_names``, with a SPIFFE ID when ``spiffe_path`` (``kind/name``) is given."""
        if not dns_names:
            raise IdentityError("a server certificate needs a DNS name", cure="pass at least one")
        names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns_names]
        usage = [ExtendedKeyUsageOID.SERVER_AUTH]
        if spiffe_path is not None:
            holder = parse_spiffe_id(f"spiffe://{self.trust_domain}/{spiffe_path.removeprefix('/')}")
            if holder.kind == "workspace":
                raise IdentityError("a server is no workspace", cure="use another kind in spiffe_path")
            names.append(x509.UniformResourceIdentifier(holder.uri))
            usage.append(ExtendedKeyUsageOID.CLIENT_AUTH)
        return self._issue(
            load_csr(csr_pem),
            names=names,
            common_name=dns_names[0][:64],
            usage=usage,
            now=now,
            ttl=lifetime(ttl, SERVER_TTL, "server certificate"),
        )

    def issue_perimeter(
        self,
        csr_pem: bytes | str,
        name: str,
        now: datetime,
        ttl: timedelta | int = SERVER_TTL,
        *,
        kind: Literal["perimeter", "bastion", "machine"] = "perimeter",
    ) -> bytes:
        """Return a client certificate (PEM) ``spiffe://<trust domain>/<kind>/<name>`` of a gatekeeper, a bastion or a machine."""
        holder = parse_spiffe_id(f"spiffe://{self.trust_domain}/{kind}/{name}")
        return self._issue(
            load_csr(csr_pem),
            names=[x509.UniformResourceIdentifier(holder.uri)],
            common_name=holder.name,
            usage=[ExtendedKeyUsageOID.CLIENT_AUTH],
            now=now,
            ttl=lifetime(ttl, SERVER_TTL, f"{kind} certificate"),
        )

    def issue_signer(self, csr_pem: bytes | str, name: str, now: datetime, ttl: timedelta | int = SERVER_TTL) -> bytes:
        """Return a certificate (PEM) ``spiffe://<trust domain>/signer/<name>`` for a key that signs statements."""
        holder = parse_spiffe_id(f"spiffe://{self.trust_domain}/signer/{name}")
        return self._issue(
            load_csr(csr_pem),
            names=[x509.UniformResourceIdentifier(holder.uri)],
            common_name=f"{holder.name} statements",
            usage=[ExtendedKeyUsageOID.CLIENT_AUTH],
            now=now,
            ttl=lifetime(ttl, SERVER_TTL, "signer certificate"),
        )

    def _issue(
        self,
        csr: x509.CertificateSigningRequest,
        *,
        names: Sequence[x509.GeneralName],
        common_name: str,
        usage: Sequence[x509.ObjectIdentifier],
        now: datetime,
        ttl: timedelta,
        extra: Sequence[x509.UnrecognizedExtension] = (),
    ) -> bytes:
        start = utc(now)
        issuer_key = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self._certificate.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start - BACKDATE)
            .not_valid_after(start + ttl)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(csr.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_key), critical=False)
        )
        for extension in extra:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def new_key_and_csr(common_name: str, dns: Sequence[str] = (), uri: str | None = None) -> tuple[bytes, bytes]:
    """Make an EC P-256 key and a signing request for it; return both as PEM (PKCS#8 without passphrase, PKCS#10)."""
    key = ec.generate_private_key(ec.SECP256R1())
    names: list[x509.GeneralName] = [x509.DNSName(name) for name in dns]
    if uri is not None:
        names.append(x509.UniformResourceIdentifier(uri))
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    csr = builder.sign(key, hashes.SHA256())
    return _private_pem(key), csr.public_bytes(serialization.Encoding.PEM)


def load_csr(csr_pem: bytes | str) -> x509.CertificateSigningRequest:
    """Return the signing request when it is an EC P-256 key that signed it itself; raise :class:`IdentityError`."""
    try:
        csr = x509.load_pem_x509_csr(_pem(csr_pem))
        valid, key = csr.is_signature_valid, csr.public_key()
    except (ValueError, InvalidSignature, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError("the certificate request is malformed", cure="send a PEM PKCS#10 request") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the key of the certificate request is not EC P-256", cure="make an EC P-256 key")
    if not valid:
        raise IdentityError(
            "the certificate request is not signed by its own key", cure="sign it with the key it names"
        )
    return csr


def parse_svid(cert_pem: bytes | str) -> Svid:
    """Read a workspace SVID strictly, without verifying its chain (see :func:`verify_svid`).

    Exactly one SAN, a URI ``spiffe://<trust domain>/workspace/<id>``; EC P-256; not an authority; client use only; the
    policy digest extension present once and well formed. Anything else raises :class:`IdentityError`.
    """
    certificate = _load_certificate(cert_pem)
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        digest_extension = certificate.extensions.get_extension_for_oid(POLICY_DIGEST_OID).value
        key = certificate.public_key()
    except (
        x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm, ValueError,
    ) as error:  # fmt: skip
        raise IdentityError(
            "the certificate is no workspace SVID", cure="present the SVID issued on attestation"
        ) from error
    if len(names) != 1 or not isinstance(names[0], x509.UniformResourceIdentifier):
        raise IdentityError("an SVID has exactly one name, a URI", cure="present the SVID issued on attestation")
    holder = parse_spiffe_id(names[0].value)
    if holder.kind != "workspace" or constraints.ca or list(usage) != [ExtendedKeyUsageOID.CLIENT_AUTH]:
        raise IdentityError(f"{holder.uri} is not a workspace's client certificate", cure="present a workspace SVID")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise IdentityError("the key of the SVID is not EC P-256", cure="present the SVID issued on attestation")
    raw = digest_extension.value if isinstance(digest_extension, x509.UnrecognizedExtension) else b""
    digest = raw[2:].decode("ascii", "replace")
    if raw[:2] != bytes([_UTF8_STRING, 64]) or not _DIGEST.fullmatch(digest):
        raise IdentityError("the policy digest of the SVID is malformed", cure="present the SVID issued on attestation")
    return Svid(
        workspace_id=holder.name,
        policy_digest=digest,
        not_after=certificate.not_valid_after_utc,
        sha256=certificate.fingerprint(hashes.SHA256()).hex(),
        serial=certificate.serial_number,
        trust_domain=holder.trust_domain,
    )


def verify_svid(cert_pem: bytes | str, ca_pem: bytes | str, now: datetime) -> Svid:
    """Verify signature, chain and validity of a workspace SVID at ``now``, then read it; raise :class:`IdentityError`."""
    _verify_chain(cert_pem, ca_pem, now)
    svid = parse_svid(cert_pem)
    _check_domain(svid.trust_domain, ca_pem)
    return svid


def verify_peer(cert_pem: bytes | str, ca_pem: bytes | str, now: datetime) -> SpiffeId:
    """Verify a client certificate of any kind at ``now`` and return the one SPIFFE ID that it carries."""
    certificate = _verify_chain(cert_pem, ca_pem, now)
    names = _uris(certificate)
    if len(names) != 1:
        raise IdentityError("the certificate carries no single SPIFFE ID", cure="present one issued by this authority")
    holder = parse_spiffe_id(names[0])
    _check_domain(holder.trust_domain, ca_pem)
    return holder


def _verify_chain(cert_pem: bytes | str, ca_pem: bytes | str, now: datetime) -> x509.Certificate:
    certificate, authority = _load_certificate(cert_pem), _load_certificate(ca_pem)
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store([authority]))
        .time(utc(now).replace(tzinfo=None))
        .build_client_verifier()
    )
    try:
        verifier.verify(certificate, [])
    except verification.VerificationError as error:
        raise IdentityError(
            "the certificate is expired, not yet valid, or not signed by this authority", cure="attest again"
        ) from error
    return certificate


def _check_domain(trust_domain: str, ca_pem: bytes | str) -> None:
    if _uris(_load_certificate(ca_pem)) != [f"spiffe://{trust_domain}"]:
        raise IdentityError(f"{trust_domain} is not the trust domain of this authority", cure="ask the right authority")


def _load_certificate(cert_pem: bytes | str) -> x509.Certificate:
    try:
        certificates = x509.load_pem_x509_certificates(_pem(cert_pem))
    except ValueError as error:
        raise IdentityError("the certificate is malformed", cure="send one PEM certificate") from error
    if len(certificates) != 1:
        raise IdentityError(f"expected one certificate, got {len(certificates)}", cure="send one PEM certificate")
    return certificates[0]


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _pem(value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    if len(raw) > MAX_PEM:
        raise IdentityError(f"a PEM of {len(raw)} bytes is too long", cure=f"send at most {MAX_PEM} bytes")
    return raw


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )
