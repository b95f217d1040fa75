"""Signed policy bundles: a canonical manifest of the members, in a DSSE envelope signed by M of N officers.

Formats: RFC 8785 (canonical JSON), DSSE v1 (``payloadType`` and payload are signed together), Ed25519 or ECDSA P-256.
``policy_digest`` is the SHA-256 of the manifest, so it names the members, the revision and the validity window.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
import rfc8785
from securesystemslib.dsse import Envelope

from saw.policy import envelope as dsse
from saw.policy import strict_json
from saw.policy.envelope import MAX_SIGNATURES, EnvelopeSignature, SignedEnvelope
from saw.policy.errors import BundleRefused, PolicyError
from saw.policy.governance import Governance
from saw.policy.keys import PublicKey
from saw.policy.loader import Bundle, load_members
from saw.policy.model import MAX_FILE_BYTES, Policy
from saw.policy.signers import Signer, TufSigner

__all__ = [
    "BundleRefused",
    "Reach",
    "VerifiedBundle",
    "add_signatures",
    "build_manifest",
    "check_signatures",
    "describe",
    "good_signers",
    "keep_signatures",
    "policy_digest",
    "read_content",
    "sign",
    "verify_bundle",
    "window",
]

BUNDLE_FORMAT = "saw-bundle/1"
MANIFEST_FORMAT = "saw-manifest/1"
PAYLOAD_TYPE = "application/vnd.saw.policy-manifest+json"
MAX_BUNDLE = 16 * 1024 * 1024
"""Largest bundle file that is read (bytes)."""
CLOCK_SKEW = timedelta(minutes=5)
"""How long before its signing a bundle counts already: clocks of workspaces may be behind the officers'."""

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_TIME_FORM = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z")


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: str
    members: dict[str, str]
    envelope: SignedEnvelope


class _Member(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    length: int


Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$", max_length=64)]
"""A lower-case hexadecimal SHA-256."""


class Reach(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What signers saw of the change: the digest of the release they compared with, of the diff, and whether it widens."""

    base_digest: Digest
    diff_digest: Digest
    widening: bool


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What officers sign: the members by digest and length, and for how long and as which revision they count.

    ``reach`` is what they saw of the change against the release before, where there is one.
    """

    format: str
    blueprint: str
    version: str
    revision: int
    not_before: str
    not_after: str
    members: dict[str, _Member]
    reach: Reach | None = None


class VerifiedBundle(msgspec.Struct, frozen=True):
    """A bundle whose signatures, window, revision and members have all been checked."""

    digest: str
    revision: int
    blueprint: str
    version: str
    not_before: datetime
    not_after: datetime
    manifest: bytes
    members: dict[str, bytes]
    policy: Policy
    governance: Governance
    signers: tuple[str, ...]
    reach: Reach | None = None


def _iso(moment: datetime) -> str:
    if moment.tzinfo is None:
        raise ValueError("a time without a time zone")
    return moment.astimezone(UTC).strftime(_TIME)


def _moment(text: str) -> datetime:
    if not _TIME_FORM.match(text):
        raise BundleRefused("malformed", f"{text[:40]!r} is not a UTC time such as 2026-01-31T12:00:00Z")
    try:
        return datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    except ValueError as error:
        raise BundleRefused("malformed", f"{text!r} is not a time") from error


def policy_digest(manifest: bytes) -> str:
    """Return the lower-case hexadecimal SHA-256 of the canonical manifest."""
    return hashlib.sha256(manifest).hexdigest()


def window(now: datetime, validity: timedelta) -> tuple[datetime, datetime]:
    """Return from when and until when a bundle counts that is signed ``now``."""
    return now - CLOCK_SKEW, now + validity


def build_manifest(
    bundle: Bundle, revision: int, not_before: datetime, not_after: datetime, *, reach: Reach | None = None
) -> bytes:
    """Return the canonical manifest of ``bundle``; times are aware and count in whole seconds.

    ``reach`` states what the signers saw of the change; without it the manifest has no such field.
    """
    if revision < 1 or not_after <= not_before:
        raise BundleRefused("malformed", "the revision must be positive and the window must not be empty")
    members: dict[str, Any] = {
        name: {"sha256": hashlib.sha256(raw).hexdigest(), "length": len(raw)} for name, raw in bundle.members.items()
    }
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "blueprint": bundle.governance.blueprint.name,
        "version": bundle.governance.blueprint.version,
        "revision": revision,
        "not_before": _iso(not_before),
        "not_after": _iso(not_after),
        "members": members,
    }
    if reach is not None:
        manifest["reach"] = msgspec.to_builtins(reach)
    return rfc8785.dumps(manifest)


def sign(manifest: bytes, members: Mapping[str, bytes], keys: Sequence[Signer]) -> bytes:
    """Return the bundle file with one signature per key."""
    encoded = {name: base64.b64encode(raw).decode() for name, raw in sorted(members.items())}
    return _write(encoded, Envelope(manifest, PAYLOAD_TYPE, {}), keys)


def add_signatures(raw: bytes, keys: Sequence[Signer]) -> bytes:
    """Return the bundle file ``raw`` with the signatures of further officers added; the content stays as it is."""
    file, payload = _read(raw)
    signatures = [{"keyid": signature.keyid, "sig": signature.sig} for signature in file.envelope.signatures]
    present = base64.b64encode(payload).decode()
    try:
        envelope = Envelope.from_dict({"payload": present, "payloadType": PAYLOAD_TYPE, "signatures": signatures})
    except (ValueError, KeyError) as error:
        raise BundleRefused("malformed", f"the envelope cannot be read: {error}") from error
    return _write(file.members, envelope, keys)


def _write(members: Mapping[str, str], envelope: Any, keys: Sequence[Signer]) -> bytes:
    for key in keys:
        envelope.sign(TufSigner(key))
    document = {"format": BUNDLE_FORMAT, "members": dict(members), "envelope": envelope.to_dict()}
    return rfc8785.dumps(document) + b"\n"


def _decode(text: str, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BundleRefused("malformed", f"{what} is not base64") from error


def _read(raw: bytes) -> tuple[_File, bytes]:
    """Return the parsed file and the signed payload, nothing of it trusted yet."""
    try:
        file = msgspec.convert(strict_json.loads(raw, limit=MAX_BUNDLE), _File)
    except strict_json.NotStrict as error:
        raise BundleRefused("malformed", f"the bundle cannot be read: {error}", cure="fetch it again") from error
    except msgspec.ValidationError as error:
        raise BundleRefused("malformed", f"the bundle has another form: {error}", cure="fetch it again") from error
    if file.format != BUNDLE_FORMAT or file.envelope.payloadType != PAYLOAD_TYPE:
        raise BundleRefused("malformed", "the file is not a policy bundle of a known format")
    if len(file.envelope.signatures) > MAX_SIGNATURES:
        raise BundleRefused("malformed", f"the bundle has more than {MAX_SIGNATURES} signatures")
    return file, _decode(file.envelope.payload, "the payload")


def _good_signers(file: _File, keys: Mapping[str, PublicKey]) -> tuple[str, ...]:
    """Return the ids of the distinct keys whose signature on the payload holds, sorted."""
    try:
        return dsse.good_signers(file.envelope, keys)
    except dsse.EnvelopeRefused as error:
        raise BundleRefused("malformed", error.message, cure=error.cure) from error


def _signers(file: _File, keys: Mapping[str, PublicKey], threshold: int) -> tuple[str, ...]:
    """Return the ids of the distinct keys that signed; raise unless there are ``threshold`` of them."""
    if threshold < 1:
        raise BundleRefused("threshold", "a threshold below one would accept anything", cure="repair the TUF root")
    if not file.envelope.signatures:
        raise BundleRefused("unsigned", "the bundle has no signature", cure="sign it with saw policy sign")
    good = _good_signers(file, keys)
    if len(good) < threshold:
        count = len(file.envelope.signatures)
        raise BundleRefused(
            "threshold",
            f"{len(good)} of the {count} signatures are good and by different officers, {threshold} are needed",
            cure="let further officers sign it",
        )
    return good


def _manifest(payload: bytes) -> Manifest:
    try:
        value = strict_json.loads(payload, limit=MAX_FILE_BYTES)
        manifest = msgspec.convert(value, Manifest)
        canonical = rfc8785.dumps(value)  # type: ignore[arg-type]
    except (strict_json.NotStrict, msgspec.ValidationError, rfc8785.CanonicalizationError) as error:
        raise BundleRefused("malformed", f"the manifest cannot be read: {error}") from error
    if canonical != payload:
        raise BundleRefused("malformed", "the manifest is not in canonical form")
    if manifest.format != MANIFEST_FORMAT or manifest.revision < 1:
        raise BundleRefused("malformed", "the manifest is of another format or has no revision")
    if isinstance(value, dict) and "reach" in value and manifest.reach is None:
        raise BundleRefused("malformed", "the manifest states an empty reach")
    return manifest


def _members(file: _File, manifest: Manifest) -> dict[str, bytes]:
    if set(file.members) != set(manifest.members):
        raise BundleRefused("member_mismatch", "the members are not those that were signed", cure="fetch it again")
    members: dict[str, bytes] = {}
    for name, text in file.members.items():
        raw = _decode(text, f"the member {name[:64]!r}")
        expected = manifest.members[name]
        if len(raw) != expected.length or hashlib.sha256(raw).hexdigest() != expected.sha256:
            raise BundleRefused("member_mismatch", f"{name} is not what was signed", cure="fetch the bundle again")
        members[name] = raw
    return members


def _content(members: dict[str, bytes], manifest: Manifest) -> Bundle:
    try:
        bundle = load_members(members)
    except PolicyError as error:
        raise BundleRefused("policy_invalid", error.message, details=error.details) from error
    blueprint = bundle.governance.blueprint
    if (blueprint.name, blueprint.version) != (manifest.blueprint, manifest.version):
        raise BundleRefused("member_mismatch", "the manifest names another blueprint or version than the members")
    return bundle


def verify_bundle(
    raw: bytes,
    keys: Mapping[str, PublicKey],
    threshold: int,
    now: datetime,
    *,
    min_revision: int = 0,
) -> VerifiedBundle:
    """Return the bundle in ``raw`` when everything about it holds, else raise :class:`BundleRefused`.

    ``keys`` maps key ids to keys; signatures count once per distinct key. The bundle counts from ``not_before`` (inclusive)
    to ``not_after`` (exclusive). ``min_revision`` is the lowest revision that is still accepted.
    """
    file, payload = _read(raw)
    signers = _signers(file, keys, threshold)
    manifest = _manifest(payload)
    not_before, not_after = _moment(manifest.not_before), _moment(manifest.not_after)
    if now < not_before:
        raise BundleRefused("not_yet_valid", f"the bundle counts from {manifest.not_before}", cure="check the clock")
    if now >= not_after:
        raise BundleRefused("expired", f"the bundle counted until {manifest.not_after}", cure="sign a new revision")
    if manifest.revision < min_revision:
        raise BundleRefused(
            "rolled_back",
            f"revision {manifest.revision} is older than {min_revision}, which was accepted before",
            cure="to go back, sign the old content as a new revision",
        )
    members = _members(file, manifest)
    bundle = _content(members, manifest)
    return VerifiedBundle(
        digest=policy_digest(payload),
        revision=manifest.revision,
        blueprint=manifest.blueprint,
        version=manifest.version,
        not_before=not_before,
        not_after=not_after,
        manifest=payload,
        members=members,
        policy=bundle.policy,
        governance=bundle.governance,
        signers=signers,
        reach=manifest.reach,
    )


def describe(raw: bytes) -> tuple[str, Manifest, tuple[str, ...]]:
    """Return digest, manifest and claimed signer ids of a bundle file **without verifying** anything."""
    file, payload = _read(raw)
    return policy_digest(payload), _manifest(payload), tuple(s.keyid for s in file.envelope.signatures)


def check_signatures(raw: bytes, keys: Mapping[str, PublicKey], threshold: int) -> None:
    """Raise :class:`BundleRefused` unless ``threshold`` distinct keys signed; looks neither at time nor at content."""
    file, _ = _read(raw)
    _signers(file, keys, threshold)


def good_signers(raw: bytes, keys: Mapping[str, PublicKey]) -> tuple[str, ...]:
    """Return the ids of the distinct ``keys`` that signed the bundle file ``raw``, sorted; looks at nothing else."""
    file, _ = _read(raw)
    return _good_signers(file, keys)


def keep_signatures(raw: bytes, keys: Mapping[str, PublicKey]) -> bytes:
    """Return the bundle file with the good signatures of ``keys`` alone; its content and digest stay as they are."""
    file, _ = _read(raw)
    good = _good_signers(file, keys)
    kept = [signature for signature in file.envelope.signatures if signature.keyid in good]
    return rfc8785.dumps(msgspec.to_builtins(_with_signatures(file, kept))) + b"\n"


def _with_signatures(file: _File, signatures: list[EnvelopeSignature]) -> _File:
    envelope = SignedEnvelope(file.envelope.payloadType, file.envelope.payload, signatures)
    return _File(file.format, file.members, envelope)


def read_content(raw: bytes) -> Bundle:
    """Return the members of a bundle file, checked against its manifest; verifies **neither signatures nor time**.

    For a file that is vouched for otherwise, such as a release that was accepted before and has expired since.
    """
    file, payload = _read(raw)
    manifest = _manifest(payload)
    return _content(_members(file, manifest), manifest)
