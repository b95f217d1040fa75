"""A decision that was signed with a passkey: a WebAuthn assertion whose challenge is the digest of the statement.

The browser has no trusted display: an assertion proves who held the authenticator and which statement was decided on, and the
statement names the digest of what was rendered. Verification is the library's (WebAuthn Level 3, section 7.2).
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from webauthn import verify_authentication_response
from webauthn.helpers import decode_credential_public_key, decoded_public_key_to_cryptography, encode_cbor
from webauthn.helpers.cose import COSECRV, COSEKTY, COSEAlgorithmIdentifier, COSEKey
from webauthn.helpers.exceptions import WebAuthnException

from saw.errors import SawError
from saw.policy.errors import KeyFileError
from saw.policy.keys import PublicKey, parse_public_key, raw_public
from saw.review.statement import ReviewStatement, StatementRefused, parse_statement, signed_bytes

ALGORITHMS = (COSEAlgorithmIdentifier.EDDSA, COSEAlgorithmIdentifier.ECDSA_SHA_256)
"""Keys that a passkey may have; the same two kinds as other keys of reviewers."""

B64 = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+\Z", max_length=2048)]


class Assertion(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the authenticator answered (base64url without padding), and for which domain and origin it was asked."""

    credential_id: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+\Z", max_length=1400)]
    authenticator_data: B64
    client_data: B64
    signature: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+\Z", max_length=512)]
    rp_id: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    origin: Annotated[str, msgspec.Meta(pattern=r"^https://", max_length=512)]


class PasskeyRefused(SawError):
    """A passkey cannot be used here."""

    code = "passkey_refused"


def challenge_of(raw: bytes) -> bytes:
    """Return the challenge (32 bytes) of a statement in canonical form: SHA-256 of what a registered key would sign."""
    return hashlib.sha256(signed_bytes(raw)).digest()


def verify_by_passkey(
    raw: bytes, assertion: Assertion, key: PublicKey, *, sign_count: int = 0
) -> tuple[ReviewStatement, int]:
    """Return the statement in ``raw`` and the authenticator's new counter.

    Raises :class:`StatementRefused` unless ``key`` signed this very statement, the person was verified, and the counter (0: the
    authenticator has none) went up from ``sign_count``.
    """
    statement = parse_statement(raw)
    credential = {
        "id": assertion.credential_id,
        "rawId": assertion.credential_id,
        "type": "public-key",
        "response": {
            "authenticatorData": assertion.authenticator_data,
            "clientDataJSON": assertion.client_data,
            "signature": assertion.signature,
        },
    }
    try:
        found = verify_authentication_response(
            credential=credential,
            expected_challenge=challenge_of(raw),
            expected_rp_id=assertion.rp_id,
            expected_origin=assertion.origin,
            credential_public_key=cose_key(key),
            credential_current_sign_count=sign_count,
            require_user_verification=True,
        )
    except (WebAuthnException, ValueError, TypeError, KeyError) as error:
        raise StatementRefused(
            f"the passkey's answer does not hold: {error}", cure="look at the review again and decide again"
        ) from error
    return statement, found.new_sign_count


def public_key_of(cose: bytes) -> PublicKey:
    """Return the key that an authenticator registered; raise :class:`PasskeyRefused` for a kind that does not count here."""
    try:
        key = decoded_public_key_to_cryptography(decode_credential_public_key(cose))
        pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        return parse_public_key(pem, "of the passkey")
    except (WebAuthnException, KeyFileError, ValueError, KeyError, IndexError) as error:
        raise PasskeyRefused(
            "the passkey has a kind of key that does not count here", cure="use another one (ES256 or Ed25519)"
        ) from error


def cose_key(key: PublicKey) -> bytes:
    """Return ``key`` as a COSE key (RFC 9053, sections 7.1 and 7.2), the form that WebAuthn uses."""
    raw = raw_public(key)
    if isinstance(key, Ed25519PublicKey):
        found: dict[int, int | bytes] = {
            COSEKey.KTY: COSEKTY.OKP,
            COSEKey.ALG: COSEAlgorithmIdentifier.EDDSA,
            COSEKey.CRV: COSECRV.ED25519,
            COSEKey.X: raw,
        }
    else:
        found = {
            COSEKey.KTY: COSEKTY.EC2,
            COSEKey.ALG: COSEAlgorithmIdentifier.ECDSA_SHA_256,
            COSEKey.CRV: COSECRV.P256,
            COSEKey.X: raw[1:33],
            COSEKey.Y: raw[33:],
        }
    encoded: bytes = encode_cbor(
        {int(name): value if isinstance(value, bytes) else int(value) for name, value in found.items()}
    )
    return encoded
