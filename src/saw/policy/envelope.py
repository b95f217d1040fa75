"""DSSE envelopes (Dead Simple Signing Envelope 1.0) that need the signatures of several officers.

The signatures cover the payload and its type, so that what was signed as one kind of thing never counts as another.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence

import msgspec
import rfc8785
from securesystemslib.dsse import Envelope

from saw.errors import SawError
from saw.policy import strict_json
from saw.policy.keys import PublicKey, raw_public, signature_holds
from saw.policy.signers import Signer, TufSigner

MAX_ENVELOPE = 256 * 1024
"""Largest envelope file that is read (bytes)."""
MAX_SIGNATURES = 64


class EnvelopeRefused(SawError):
    """An envelope is not what it must be; ``code`` is ``malformed``, ``unsigned`` or ``threshold``."""

    code = "malformed"

    def __init__(self, code: str, message: str, *, cure: str) -> None:
        super().__init__(message, cure=cure)
        self.code = code


class EnvelopeSignature(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One signature, base64, and the id of the key that made it."""

    keyid: str
    sig: str


class SignedEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An envelope as it lies in a file; nothing of it is trusted yet."""

    payloadType: str  # noqa: N815 - DSSE's name
    payload: str
    signatures: list[EnvelopeSignature]


def seal(payload: bytes, payload_type: str, keys: Sequence[Signer]) -> bytes:
    """Return an envelope file of ``payload`` with one signature per key."""
    return _write(Envelope(payload, payload_type, {}), keys)


def cosign(raw: bytes, payload_type: str, keys: Sequence[Signer]) -> bytes:
    """Return the envelope file ``raw`` with the signatures of further officers; its payload stays as it is."""
    found = read_envelope(raw, payload_type)
    return _write(Envelope.from_dict(msgspec.to_builtins(found)), keys)


def _write(envelope: Envelope, keys: Sequence[Signer]) -> bytes:
    for key in keys:
        envelope.sign(TufSigner(key))
    return rfc8785.dumps(envelope.to_dict()) + b"\n"


def read_envelope(raw: bytes, payload_type: str) -> SignedEnvelope:
    """Return the envelope in ``raw`` **without verifying** a signature; raise :class:`EnvelopeRefused`."""
    try:
        found = msgspec.convert(strict_json.loads(raw, limit=MAX_ENVELOPE), SignedEnvelope)
    except (strict_json.NotStrict, msgspec.ValidationError) as error:
        raise EnvelopeRefused("malformed", f"the file is no signed envelope: {error}", cure="fetch it again") from error
    if found.payloadType != payload_type:
        raise EnvelopeRefused(
            "malformed", f"the envelope holds {found.payloadType[:64]!r}, not {payload_type}", cure="pass another file"
        )
    payload_of(found)
    return found


def payload_of(envelope: SignedEnvelope) -> bytes:
    """Return the payload, which is trusted only once enough officers are known to have signed it."""
    return decode(envelope.payload, "the payload")


def decode(text: str, what: str) -> bytes:
    """Return base64 as bytes; raise :class:`EnvelopeRefused` that names ``what``."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EnvelopeRefused("malformed", f"{what} is not base64", cure="fetch the file again") from error


def good_signers(envelope: SignedEnvelope, keys: Mapping[str, PublicKey]) -> tuple[str, ...]:
    """Return the ids of the distinct ``keys`` whose signature holds, sorted; the same key under two ids counts once."""
    if len(envelope.signatures) > MAX_SIGNATURES:
        raise EnvelopeRefused("malformed", f"more than {MAX_SIGNATURES} signatures", cure="fetch the file again")
    signed = Envelope(payload_of(envelope), envelope.payloadType, {}).pae()
    good: dict[bytes, str] = {}
    for signature in envelope.signatures:
        key = keys.get(signature.keyid)
        if key is not None and signature_holds(key, decode(signature.sig, "a signature"), signed):
            good.setdefault(raw_public(key), signature.keyid)
    return tuple(sorted(good.values()))


def verify_envelope(
    raw: bytes, payload_type: str, keys: Mapping[str, PublicKey], threshold: int
) -> tuple[bytes, tuple[str, ...]]:
    """Return payload and signers when ``threshold`` distinct ``keys`` signed; raise :class:`EnvelopeRefused` otherwise."""
    envelope = read_envelope(raw, payload_type)
    if threshold < 1:
        raise EnvelopeRefused("threshold", "a threshold below one would accept anything", cure="repair the TUF root")
    if not envelope.signatures:
        raise EnvelopeRefused("unsigned", "the file has no signature", cure="let the officers sign it")
    good = good_signers(envelope, keys)
    if len(good) < threshold:
        raise EnvelopeRefused(
            "threshold",
            f"{len(good)} of {len(envelope.signatures)} signatures are good and by different officers, "
            f"{threshold} are needed",
            cure="let further officers sign it",
        )
    return payload_of(envelope), good
