"""Read, check and sign single TUF metadata files, with our error codes in place of the library's exceptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import Key, SSlibKey  # type: ignore[attr-defined]
from tuf.api.exceptions import RepositoryError as TufRepositoryError
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import (  # type: ignore[attr-defined]
    Metadata,
    MetaFile,
    Role,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from saw.policy import strict_json
from saw.policy.errors import KeyFileError, RepositoryError
from saw.policy.keys import PublicKey, parse_public_key, public_pem, raw_public
from saw.policy.signers import Signer, TufSigner

__all__ = [
    "MetaFile",
    "Metadata",
    "Root",
    "Snapshot",
    "TargetFile",
    "Targets",
    "Timestamp",
    "check_keys",
    "check_role",
    "check_root",
    "check_successor",
    "key_of",
    "parse",
    "policy_keys",
    "role_keys",
    "sign_metadata",
    "signing_key",
    "trusted_policy_keys",
    "verify_role",
]

MAX_METADATA = 5_000_000
"""Largest metadata file that is read (bytes)."""

S = TypeVar("S", Root, Snapshot, Targets, Timestamp)


def signing_key(key: PublicKey) -> SSlibKey:
    """Return ``key`` as TUF names it."""
    return SSlibKey.from_crypto(key)


def parse(kind: type[S], raw: bytes, name: str) -> Metadata[S]:
    """Return ``raw`` as metadata of ``kind``; raise :class:`RepositoryError` (``malformed``). Verifies no signature."""
    try:
        strict_json.loads(raw, limit=MAX_METADATA)
        metadata = Metadata[S].from_bytes(raw)
    except (strict_json.NotStrict, TufRepositoryError) as error:
        raise RepositoryError("malformed", f"{name} cannot be read: {error}", cure="send it again") from error
    if not isinstance(metadata.signed, kind):
        raise RepositoryError("malformed", f"{name} is {metadata.signed.type} metadata", cure="send the right file")
    return metadata


def sign_metadata(metadata: Metadata[Any], signers: Sequence[Signer]) -> bytes:
    """Add one signature per signer and return the file."""
    for signer in signers:
        signature = TufSigner(signer).sign(metadata.signed_bytes)
        metadata.signatures[signature.keyid] = signature
    return metadata.to_bytes(JSONSerializer(compact=False))


def verify_role(parent: Root | Targets, role: str, metadata: Metadata[Any], name: str) -> None:
    """Raise ``threshold`` unless enough of the keys that ``parent`` gives to ``role`` signed ``metadata``."""
    try:
        parent.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except (UnsignedMetadataError, UnverifiedSignatureError, ValueError) as error:
        reason = f"{name} is not signed by enough officers: {error}"
        raise RepositoryError("threshold", reason, cure="let further officers sign it") from error


def key_of(keys: Mapping[str, Key], keyid: str) -> PublicKey:
    """Return the key that metadata has under ``keyid``; raise ``malformed`` for anything but the two kinds that count."""
    key = keys.get(keyid)
    try:
        if not isinstance(key, SSlibKey):
            raise TypeError("there is no such key")
        public = key.keyval["public"]
        if (key.keytype, key.scheme) == ("ed25519", "ed25519"):
            return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        if (key.keytype, key.scheme) == ("ecdsa", "ecdsa-sha2-nistp256"):
            point = parse_public_key(public.encode(), keyid)
            if public_pem(point).decode() != public or isinstance(point, Ed25519PublicKey):
                raise ValueError("it is not the PEM form of a point on P-256")
            return point
        raise ValueError("it is neither Ed25519 nor ECDSA on P-256")
    except (ValueError, KeyError, TypeError, AttributeError, KeyFileError) as error:
        reason = f"the key {keyid[:64]} cannot be used: {error}"
        raise RepositoryError("malformed", reason, cure="make the metadata again") from error


def check_keys(keys: Mapping[str, Key], role: Role, name: str) -> dict[str, PublicKey]:
    """Return the keys of ``role`` by id; refuse one key that could count twice and a threshold that cannot be reached."""
    found = {keyid: key_of(keys, keyid) for keyid in role.keyids}
    values = {raw_public(key) for key in found.values()}
    if len(values) != len(role.keyids) or not 1 <= role.threshold <= len(found):
        reason = f"the role {name} has repeated keys or a threshold that they cannot reach"
        raise RepositoryError("malformed", reason, cure="make the metadata again")
    return found


def role_keys(root: Root, role: str) -> tuple[dict[str, PublicKey], int]:
    """Return the keys and the threshold of a top-level role."""
    return check_keys(root.keys, root.roles[role], role), root.roles[role].threshold


def check_root(raw: bytes, now: datetime | None) -> Root:
    """Return the root in ``raw`` if it is well-formed, signed by its own officers and, at ``now``, not expired."""
    metadata = parse(Root, raw, "root.json")
    root = metadata.signed
    for role in ("root", "targets", "snapshot", "timestamp"):
        check_keys(root.keys, root.roles[role], role)
    verify_role(root, "root", metadata, "root.json")
    if not root.consistent_snapshot:
        raise RepositoryError("malformed", "the root does not ask for consistent snapshots", cure="make it again")
    if now is not None and root.is_expired(now):
        raise RepositoryError("freeze", f"the root expired at {root.expires}", cure="let officers sign a new root")
    return root


def check_successor(trusted: bytes, raw: bytes) -> Root:
    """Return the root in ``raw`` if the officers of ``trusted`` and its own both signed it as the next version."""
    old = parse(Root, trusted, "root.json").signed
    new = parse(Root, raw, "root.json")
    if new.signed.version != old.version + 1:
        reason = f"root version {new.signed.version} does not follow version {old.version}"
        raise RepositoryError("stale_base", reason, cure="send every version in between")
    verify_role(old, "root", new, "root.json")
    return check_root(raw, None)


def check_role(parent: Root | Targets, role: str, kind: type[S], raw: bytes, now: datetime | None) -> S:
    """Return the metadata of ``role`` in ``raw`` if ``parent`` gives it enough good signatures.

    With ``now``, metadata that has expired is refused (``freeze``).
    """
    name = f"{role}.json"
    metadata = parse(kind, raw, name)
    verify_role(parent, role, metadata, name)
    signed = metadata.signed
    if now is not None and signed.is_expired(now):
        raise RepositoryError("freeze", f"{name} expired at {signed.expires}", cure="let officers sign it again")
    return signed


def policy_keys(root: Root) -> tuple[dict[str, PublicKey], int]:
    """Return the keys and the threshold of the targets role, which also sign bundles."""
    return role_keys(root, "targets")


def trusted_policy_keys(root_metadata: bytes) -> tuple[dict[str, Any], int]:
    """Return the policy keys (:data:`saw.policy.keys.PublicKey`) by id and their threshold, out of a root that is trusted.

    Raises :class:`RepositoryError` when the root is malformed or not even signed by its own officers.
    """
    keys, threshold = policy_keys(check_root(root_metadata, None))
    return dict(keys), threshold
