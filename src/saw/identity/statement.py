"""Signed statements: a payload in a compact JWS (RFC 7515) whose signer proves its name by a certificate of our authority.

Exactly one form exists: ES256 (RFC 7518, section 3.4), one certificate in ``x5c``, and a ``typ`` that says what the payload
is, so that a statement of one kind is never taken for another (RFC 8725, section 3.11).
"""

from __future__ import annotations

import base64
import binascii
from datetime import datetime

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey

from saw.identity.names import IdentityError
from saw.identity.x509 import verify_peer

_ALGORITHM = "ES256"
SIGNER = "signer"
"""The kind in the SPIFFE ID of whoever may sign statements."""
MAX_STATEMENT = 128 * 1024
"""Longest compact form that is read (characters)."""


class _Registry(jws.JWSRegistry):
    """ES256 alone, with room for one certificate in the header."""

    max_header_length = 8 * 1024

    def __init__(self) -> None:
        super().__init__(algorithms=[_ALGORITHM])


_REGISTRY = _Registry()


class Statement(msgspec.Struct, frozen=True):
    """A verified statement: its payload, who signed it, and how long the signer's certificate counts."""

    payload: bytes
    signer: str
    not_after: datetime


def sign_statement(payload: bytes, typ: str, key_pem: bytes, certificate_pem: bytes) -> str:
    """Return the compact JWS of ``payload``; ``certificate_pem`` is the certificate of the EC P-256 key ``key_pem``."""
    der = x509.load_pem_x509_certificate(certificate_pem).public_bytes(Encoding.DER)
    header = {"alg": _ALGORITHM, "typ": typ, "x5c": [base64.b64encode(der).decode()]}
    return jws.serialize_compact(header, payload, ECKey.import_key(key_pem), registry=_REGISTRY)


def verify_statement(token: str, typ: str, ca_pem: bytes, now: datetime) -> Statement:
    """Return the statement of ``token``; raise :class:`IdentityError` unless it is of kind ``typ`` and well signed at ``now``."""
    if len(token) > MAX_STATEMENT or not token.isascii():
        raise IdentityError("the statement is too long or no text of a JWS", cure="present it as it was issued")
    try:
        signed = jws.extract_compact(token.encode(), registry=_REGISTRY)
        header = signed.headers()
        if set(header) != {"alg", "typ", "x5c"} or header["alg"] != _ALGORITHM or header["typ"] != typ:
            raise IdentityError(f"the statement is not a {typ} signed with {_ALGORITHM}", cure="present one that is")
        chain = header["x5c"]
        if not isinstance(chain, list) or len(chain) != 1 or not isinstance(chain[0], str):
            raise IdentityError("the statement carries no single certificate", cure="present it as it was issued")
        certificate = x509.load_der_x509_certificate(base64.b64decode(chain[0], validate=True))
        pem = certificate.public_bytes(Encoding.PEM)
        holder = verify_peer(pem, ca_pem, now)
        if holder.kind != SIGNER:
            raise IdentityError(f"{holder.uri} may not sign statements", cure="present one that the broker signed")
        key = ECKey.import_key(certificate.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        if not jws.validate_compact(signed, key, registry=_REGISTRY):
            raise IdentityError("the signature of the statement is wrong", cure="present it as it was issued")
    except (JoseError, binascii.Error, ValueError, TypeError, KeyError) as error:
        raise IdentityError("the statement is malformed", cure="present it as it was issued") from error
    return Statement(signed.payload, holder.uri, certificate.not_valid_after_utc)
