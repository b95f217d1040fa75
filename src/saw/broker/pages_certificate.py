"""Looks at the file from which the pages take their certificate, before it takes the place of one that works.

The file holds a private key and the chain of certificates, the server's own first (RFC 8446, section 4.4.2). A browser refuses
what is refused here, or will soon.
"""

from __future__ import annotations

import hmac
import itertools
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from ipaddress import ip_address

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from saw.broker.clock import iso
from saw.errors import ConfigError

MAX_FILE = 256 * 1024
"""Largest file that is read (bytes)."""
MIN_RSA_BITS = 2048
CURVES = ("secp256r1", "secp384r1", "secp521r1")
_KEY = re.compile(rb"-----BEGIN ([A-Z]+ )?PRIVATE KEY-----.*?-----END \1?PRIVATE KEY-----", re.DOTALL)


class CertificateRefused(ConfigError):
    """The file of the pages' certificate cannot be used."""

    code = "certificate_refused"


class PagesCertificate(msgspec.Struct, frozen=True):
    """What a usable file says: the names it is for, until when it counts, and how many certificates it has."""

    names: tuple[str, ...]
    not_after: str
    days_left: int
    chain: int


def check_pages_certificate(
    raw: bytes, names: Sequence[str], now: datetime, *, min_days: int = 0, ca_pem: bytes | None = None
) -> PagesCertificate:
    """Return what ``raw`` (PEM) says; raise :class:`CertificateRefused` unless a browser takes it for each of ``names``.

    ``min_days``: how many days it must still count. ``ca_pem``: authorities that the chain must lead to; None: those of the
    browsers are not known here, and only that the chain hangs together is checked.
    """
    if len(raw) > MAX_FILE:
        raise _refused(f"the file has {len(raw)} bytes", f"keep it below {MAX_FILE}")
    chain = _chain(raw)
    leaf = chain[0]
    _require_key(raw, leaf)
    held = _names(leaf)
    missing = [name for name in names if not any(_covers(one, name) for one in held)]
    if missing:
        raise _refused(
            f"it is not for {', '.join(missing)}, but for {', '.join(held)}", "have one issued for that name"
        )
    left = leaf.not_valid_after_utc - now
    if not leaf.not_valid_before_utc <= now or left < timedelta(days=min_days) or left <= timedelta():
        raise _refused(
            f"it counts from {iso(leaf.not_valid_before_utc)} to {iso(leaf.not_valid_after_utc)}",
            f"have one issued that counts now and for {min_days} days to come",
        )
    _require_use(leaf)
    for child, parent in itertools.pairwise(chain):
        try:
            child.verify_directly_issued_by(parent)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise _refused(
                f"{child.subject.rfc4514_string()} was not issued by the one that follows it",
                "put the server's own first, then each one's issuer",
            ) from error
    if ca_pem is not None:
        _require_trust(chain, names or held, now, ca_pem)
    return PagesCertificate(tuple(held), iso(leaf.not_valid_after_utc), left.days, len(chain))


def _chain(raw: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(raw)
    except ValueError as error:
        raise _refused("there is no certificate in it that can be read", "give PEM, the server's own first") from error


def _require_key(raw: bytes, leaf: x509.Certificate) -> None:
    keys = [found[0] for found in _KEY.finditer(raw)]
    if len(keys) != 1:
        raise _refused(f"there are {len(keys)} private keys in it", "give one, in PEM")
    try:
        key = load_pem_private_key(keys[0] + b"\n", None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _refused("its private key cannot be read", "give one in PEM, without a passphrase") from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if not hmac.compare_digest(key.public_key().public_bytes(*form), leaf.public_key().public_bytes(*form)):
        raise _refused("the private key is not that of the first certificate", "put the server's own certificate first")
    public = leaf.public_key()
    strong = (isinstance(public, rsa.RSAPublicKey) and public.key_size >= MIN_RSA_BITS) or (
        isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name in CURVES
    )
    if not strong:
        raise _refused(
            "browsers do not take a key of this kind", f"use ECDSA on P-256, or RSA of {MIN_RSA_BITS} bits and more"
        )


def _require_use(leaf: x509.Certificate) -> None:
    try:
        uses = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return
    if not {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE} & set(uses):
        raise _refused("it is not for servers", "have one issued with the extended key usage serverAuth")


def _require_trust(chain: list[x509.Certificate], names: Sequence[str], now: datetime, ca_pem: bytes) -> None:
    try:
        authorities = x509.load_pem_x509_certificates(ca_pem)
    except ValueError as error:
        raise _refused("the file of authorities cannot be read", "give their certificates in PEM") from error
    builder = PolicyBuilder().store(Store(authorities)).time(now)
    for name in names:
        try:
            builder.build_server_verifier(_subject(name.replace("*", "any", 1))).verify(chain[0], chain[1:])
        except VerificationError as error:
            raise _refused(
                f"the authorities that were given do not vouch for it as {name}",
                "add the certificates between them and the server's own, in order",
            ) from error


def _names(leaf: x509.Certificate) -> list[str]:
    try:
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise _refused("it names no server", "have one issued with a subject alternative name") from error
    addresses = [str(one) for one in found.get_values_for_type(x509.IPAddress)]
    return [one.lower() for one in found.get_values_for_type(x509.DNSName)] + addresses


def _covers(held: str, name: str) -> bool:
    """Tell whether ``held``, which may begin with ``*.`` for one label, is for ``name`` (RFC 9525, section 6.3)."""
    name = name.lower()
    first, _, rest = name.partition(".")
    return held == name or (held.startswith("*.") and bool(first) and bool(rest) and held[2:] == rest)


def _subject(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _refused(reason: str, cure: str) -> CertificateRefused:
    return CertificateRefused(f"the certificate of the pages cannot be used: {reason}", cure=cure)
