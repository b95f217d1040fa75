"""Signed policy bundles of NVIDIA Agent Policy Fabric (APF): verified, and their sandbox policy taken out.

Source: APF's public bundle specification ``PolicyBundle`` v1alpha1 and the public signature format yaml-sigil v1alpha1. The
artifact is one file: the manifest's bytes, a line ``---``, and the signature document; the members lie beside it.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from saw.policy.errors import BundleRefused, PolicyError
from saw.policy.openshell import Effect, Finding
from saw.policy.yamltext import read

MANIFEST_API = "nvidia.agent-policy-fabric.policy/v1alpha1"
SANDBOX_API = "nvidia.agent-policy-fabric.sandbox/v1alpha1"
SIGNATURE_SCHEMA = "YamlSigilSignature.v1alpha1"
MAX_CARRIER_BYTES = 16_384
"""Largest signature document (yaml-sigil, verification API)."""

_ED25519 = "ED25519_PUREEDDSA_RAW_RS64_CANONICAL"
_P256 = "ECDSA_SECP256R1_SHA256_RAW_RS64"
_MARK = re.compile(rb"^---\n", re.MULTILINE)
_BASE64 = re.compile(r"[A-Za-z0-9_-]+\Z")
_MEMBER = re.compile(r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+)*\Z")
_SECTIONS = {"filesystem": "filesystem_policy"}
"""Where a SandboxPolicy spells a section of the OpenShell policy differently."""
_LOSES = {
    "PolicyRule": "Cedar rules decide single calls on top of the sandbox policy; calls that they forbid pass here",
    "PolicyAnnotator": "nothing here looks into bodies for it",
    "PolicyFinding": "nothing here looks into bodies for it",
    "PolicyEffect": "bodies are not rewritten or redacted here",
    "Provider": "its endpoints and credentials are not granted here",
}

TrustKey = Ed25519PublicKey | ec.EllipticCurvePublicKey


class FabricPolicy(msgspec.Struct, frozen=True):
    """What a verified bundle holds for us: the OpenShell policy as maps and lists, and what is not taken over."""

    bundle_id: str
    revision: int
    key_id: str
    policy: dict[str, Any]
    findings: tuple[Finding, ...]


def is_signed_bundle(raw: bytes) -> bool:
    """Return whether ``raw`` claims to be a bundle or member of APF rather than an OpenShell policy."""
    return re.search(rb"^apiVersion:\s*[\"']?nvidia\.agent-policy-fabric\.", raw, re.MULTILINE) is not None


def trust_key(raw: bytes, name: str) -> TrustKey:
    """Return the public key in a trust-root file: ``ed25519:<base64>`` on one line, or PEM of a P-256 key."""
    try:
        if raw.lstrip().startswith(b"-----BEGIN"):
            key = load_pem_public_key(raw)
            if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
                return key
        lines = [line for line in raw.decode("ascii").splitlines() if line.strip() and not line.startswith("#")]
        if len(lines) == 1 and lines[0].startswith("ed25519:"):
            return Ed25519PublicKey.from_public_bytes(base64.b64decode(lines[0][8:].strip(), validate=True))
    except (ValueError, binascii.Error) as error:
        raise _refused("malformed", f"{name} is no trust root: {error}", "give the signer's public key") from error
    raise _refused(
        "malformed", f"{name} is no trust root: no Ed25519 or P-256 public key", "give the signer's public key"
    )


def open_bundle(
    raw: bytes,
    keys: Mapping[str, TrustKey],
    member: Callable[[str], bytes],
    now: datetime,
    *,
    document: str = "default",
) -> FabricPolicy:
    """Verify the signed manifest ``raw`` and return its sandbox policy named ``document``.

    ``keys`` are trust roots by key id; ``member`` reads a member by its path relative to the manifest. Checked in this
    order: form, signature, validity window, digest of every member. Raises :class:`BundleRefused`.
    """
    payload, carrier = _decompose(raw)
    key_id = _verify(payload, carrier, keys)
    manifest = _map(payload, "the manifest")
    if manifest.get("apiVersion") != MANIFEST_API or manifest.get("kind") != "PolicyBundle":
        raise _refused("malformed", "the signed document is no PolicyBundle of v1alpha1", "give the signed manifest")
    if _time(manifest, "not_before") > now:
        raise _refused("not_yet_valid", f"the bundle counts from {manifest['not_before']} on", "wait, or ask its owner")
    if _time(manifest, "expires_at") <= now:
        raise _refused("expired", f"the bundle expired at {manifest['expires_at']}", "get the current bundle")
    revision = manifest.get("policy_revision")
    if not isinstance(revision, int) or isinstance(revision, bool) or revision < 1:
        raise _refused("malformed", "policy_revision is not a number from 1 on", "get the bundle again")
    documents = [_document(entry, member) for entry in _entries(manifest)]
    policies = [value for _, value in documents if value.get("kind") == "SandboxPolicy"]
    chosen = [value for value in policies if _name(value) == document]
    if len(chosen) != 1:
        names = ", ".join(sorted(_name(value) for value in policies)) or "none"
        reason = f"the bundle has {len(chosen)} sandbox policies named {document}; it has: {names}"
        raise _refused("malformed", reason, "choose one with --document")
    if chosen[0].get("apiVersion") != SANDBOX_API or not isinstance(chosen[0].get("spec"), dict):
        raise _refused("malformed", "the sandbox policy is not of version v1alpha1", "give a bundle of that version")
    spec = {_SECTIONS.get(key, key): value for key, value in chosen[0]["spec"].items()}
    policy = {"version": 1, **spec}
    lost = [_lost(path, value) for path, value in documents if value is not chosen[0]]
    known = {
        "apiVersion",
        "kind",
        "metadata",
        "id",
        "description",
        "policy_revision",
        "not_before",
        "expires_at",
        "manifest",
    }
    lost += [
        Finding(key, "lost", "this field of the manifest has no counterpart here", "decide what it means for you")
        for key in sorted(set(manifest) - known)
    ]
    return FabricPolicy(str(manifest.get("id", "")), revision, key_id, policy, tuple(lost))


def _refused(code: str, message: str, cure: str) -> BundleRefused:
    return BundleRefused(code, message, cure=cure)


def _decompose(raw: bytes) -> tuple[bytes, bytes]:
    """Return the signed bytes and the signature document; exactly one line ``---`` separates them."""
    marks = list(_MARK.finditer(raw))
    if len(marks) != 1 or marks[0].start() == 0:
        raise _refused(
            "unsigned", "the file is not a manifest, one line --- and a signature", "give the signed manifest"
        )
    payload, carrier = raw[: marks[0].start()], raw[marks[0].end() :]
    if len(carrier) > MAX_CARRIER_BYTES:
        raise _refused("malformed", "the signature document is longer than 16384 bytes", "get the bundle again")
    return payload, carrier


def _verify(payload: bytes, carrier: bytes, keys: Mapping[str, TrustKey]) -> str:
    """Return the id of the trusted key that signed ``payload``; the id in the document is only a hint which to try."""
    value = _map(carrier, "the signature document")
    if set(value) - {"schema", "alg", "keyid", "signature"} or value.get("schema") != SIGNATURE_SCHEMA:
        raise _refused("malformed", f"the signature document is not a {SIGNATURE_SCHEMA}", "get the bundle again")
    algorithm, key_id, text = value.get("alg"), value.get("keyid"), value.get("signature")
    if not isinstance(text, str) or not _BASE64.match(text) or not isinstance(key_id, str):
        raise _refused("malformed", "the signature document lacks keyid or signature", "get the bundle again")
    signature = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if len(signature) != 64 or base64.urlsafe_b64encode(signature).rstrip(b"=").decode() != text:
        raise _refused("malformed", "the signature is not 64 bytes in canonical base64url", "get the bundle again")
    key = keys.get(key_id)
    if key is None:
        raise _refused(
            "unsigned", f"it is signed by {key_id!r}, which is no trust root given", "give that key, if you trust it"
        )
    try:
        if algorithm == _ED25519 and isinstance(key, Ed25519PublicKey):
            key.verify(signature, payload)
        elif algorithm == _P256 and isinstance(key, ec.EllipticCurvePublicKey):
            pair = (int.from_bytes(signature[:32], "big"), int.from_bytes(signature[32:], "big"))
            key.verify(encode_dss_signature(*pair), payload, ec.ECDSA(hashes.SHA256()))
        else:
            raise _refused(
                "unsigned", f"algorithm {algorithm!r} does not fit the key {key_id}", "give the key it was made with"
            )
    except InvalidSignature:
        raise _refused(
            "unsigned", f"the signature of {key_id} is not over this manifest", "get the bundle again"
        ) from None
    return key_id


def _map(raw: bytes, what: str) -> dict[str, Any]:
    try:
        return read(raw, what)
    except PolicyError as error:
        raise _refused("malformed", error.message, "get the bundle again") from error


def _time(manifest: Mapping[str, Any], field: str) -> datetime:
    try:
        time = datetime.fromisoformat(str(manifest.get(field)))
    except ValueError:
        time = datetime.min  # noqa: DTZ901 - has no zone, so it is refused below
    if time.tzinfo is None:
        raise _refused("malformed", f"{field} is not a time with its zone (RFC 3339)", "get the bundle again")
    return time


def _entries(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    entries = manifest.get("manifest")
    found: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else []:
        path, digest = (entry.get("path"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(digest, str) or set(entry) != {"path", "sha256"}:
            raise _refused("malformed", "an entry of the manifest is not path and sha256", "get the bundle again")
        if not _MEMBER.match(path):
            raise _refused("malformed", f"the member {path!r} lies outside the bundle's folder", "get the bundle again")
        found.append((path, digest.lower()))
    if not found:
        raise _refused("malformed", "the manifest lists no members", "get the bundle again")
    return found


def _document(entry: tuple[str, str], member: Callable[[str], bytes]) -> tuple[str, dict[str, Any]]:
    path, digest = entry
    raw = member(path)
    if not hmac.compare_digest(hashlib.sha256(raw).hexdigest(), digest):
        raise _refused("member_mismatch", f"the member {path} is not the one that was signed", "get the bundle again")
    return path, _map(raw, path)


def _name(value: Mapping[str, Any]) -> str:
    metadata = value.get("metadata")
    return str(metadata.get("name", "")) if isinstance(metadata, dict) else ""


def _lost(path: str, value: Mapping[str, Any]) -> Finding:
    kind = str(value.get("kind", "document"))
    reason = f"{kind} {_name(value)}: {_LOSES.get(kind, 'this kind has no counterpart here')}"
    effect: Effect = "left_out" if kind in {"Provider", "SandboxPolicy"} else "lost"
    return Finding(path, effect, reason, "carry it over by hand, or keep APF in front of the runtime")
