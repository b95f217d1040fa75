"""Whom a hypervisor believes about images: the officers' root, the records that it was handed, and what was revoked.

    root.json       the officers' root; pinned once, and followed from version to version by their signatures
    records/        signed release records that were handed over, by digest and name of the image
    revoked.json    images that were revoked; it only grows

They lie in ``/var/lib/saw/trust``. All of it is public, and nothing gets there unverified. Whoever hands it over (the broker's
answer, carried by a playbook) can therefore take away, by a revocation, and never add an image that the officers did not sign.
"""

from __future__ import annotations

from contextlib import nullcontext
from datetime import datetime
from pathlib import Path

import msgspec

from saw import jsontext
from saw.attest.image_record import PAYLOAD_TYPE, Hex, RecordInvalid, ReleaseRecord, parse_record
from saw.errors import ConfigError
from saw.files import locked, write_atomic
from saw.policy.envelope import EnvelopeRefused, SignedEnvelope, verify_envelope
from saw.policy.errors import RepositoryError
from saw.policy.tuf_metadata import Root, check_root, parse, trusted_policy_keys
from saw.policy.tuf_roots import follow_roots
from saw.vm import spec as vm_spec
from saw.vm.spec import VmError

MAX_HANDED = 16 * 1024 * 1024
"""Largest hand-over that is read (bytes)."""
PIN = "apply the role hypervisor: playbook control_plane, once the officers' root is there (docs/images.md)"


class RecordRefusedError(VmError):
    """An image has no release record that counts here; ``code`` tells why."""

    code = "record_missing"

    def __init__(self, code: str, message: str, *, cure: str, details: dict[str, object] | None = None) -> None:
        super().__init__(message, cure=cure, details=details)
        self.code = code


class Revoked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, order=True):
    """An image that was revoked: the name of its record, and its digest."""

    name: str
    image_sha256: Hex


class HandOver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is handed to a hypervisor (``saw image hand-over``): roots from the first on, envelopes of records, revoked images."""

    roots: tuple[msgspec.Raw, ...] = ()
    records: tuple[SignedEnvelope, ...] = ()
    revoked: tuple[Revoked, ...] = ()


class Taken(msgspec.Struct, frozen=True):
    """What a hand-over led to. ``refused``: why other records of it do not count, in words."""

    changed: bool
    root_version: int
    records: tuple[str, ...]
    revoked: int
    refused: tuple[str, ...] = ()


def place() -> Path:
    """Return where all of it lies on this hypervisor."""
    return vm_spec.STATE.parent / "trust"


def pinned_root() -> bytes:
    """Return the officers' root; raise :class:`RecordRefusedError` (``no_root``) where none was pinned."""
    try:
        return (place() / "root.json").read_bytes()
    except FileNotFoundError as error:
        raise RecordRefusedError("no_root", "this hypervisor has no root of the officers", cure=PIN) from error
    except OSError as error:
        raise RecordRefusedError("no_root", f"the officers' root cannot be read: {error.strerror}", cure=PIN) from error


def revoked() -> frozenset[Revoked]:
    """Return the images that were revoked; a list that cannot be read is no empty one, so it raises."""
    file = place() / "revoked.json"
    try:
        return frozenset(jsontext.decode(file.read_bytes(), kind=tuple[Revoked, ...]))
    except FileNotFoundError:
        return frozenset()
    except (OSError, msgspec.DecodeError) as error:
        raise RecordRefusedError(
            "revocations_unreadable", f"{file} cannot be read: {error}", cure="remove it, then playbook control_plane"
        ) from error


def check_record(raw: bytes, root: bytes, gone: frozenset[Revoked], now: datetime) -> ReleaseRecord:
    """Return the record in the envelope ``raw`` when the officers of ``root`` signed it and it counts at ``now``.

    Raises :class:`RecordRefusedError`: ``record_unsigned``, ``record_threshold``, ``record_malformed``, ``record_incomplete``,
    ``record_expired``, ``image_revoked``, and ``no_root`` for a root that is none.
    """
    try:
        payload, _ = verify_envelope(raw, PAYLOAD_TYPE, *trusted_policy_keys(root))
        record = parse_record(payload)
    except EnvelopeRefused as error:
        raise RecordRefusedError(f"record_{error.code}", error.message, cure=error.cure) from error
    except RecordInvalid as error:
        raise RecordRefusedError(error.code, error.message, cure=error.cure) from error
    except RepositoryError as error:
        raise RecordRefusedError("no_root", f"the officers' root cannot be used: {error.message}", cure=PIN) from error
    if Revoked(record.name, record.image_sha256) in gone:
        raise RecordRefusedError("image_revoked", f"image {record.name} is revoked", cure="use another image")
    if now >= record.not_after:
        raise RecordRefusedError(
            "record_expired",
            f"the release record of {record.name} counted until {record.not_after.isoformat()}",
            cure="sign its record anew: saw image sign, then saw image register",
        )
    return record


def take(raw: bytes, now: datetime, *, pin: bool = False, dry: bool = False) -> Taken:
    """Verify a hand-over and keep it; raise :class:`RecordRefusedError` otherwise. ``dry`` keeps nothing.

    A first root is taken with ``pin`` alone. A later one counts when the officers of the one before signed it; the same version
    with another content is refused (``another_root``) with all of the hand-over, and an older one changes nothing. Revocations
    are kept even where a record beside them is refused. Records that count are kept; where none does, the first
    refusal is raised.
    """
    try:
        if len(raw) > MAX_HANDED:
            raise msgspec.ValidationError(f"it has more than {MAX_HANDED} bytes")
        given = jsontext.decode(raw, kind=HandOver)
    except msgspec.DecodeError as error:
        raise ConfigError(
            f"the hand-over is not valid: {error}", cure="pass what saw image hand-over prints"
        ) from error
    folder = place()
    if not dry:
        (folder / "records").mkdir(mode=0o755, parents=True, exist_ok=True)
    with locked(folder) if folder.exists() else nullcontext():  # a dry run on a new hypervisor finds no folder
        return _took(given, now, pin=pin, dry=dry)


def _took(given: HandOver, now: datetime, *, pin: bool, dry: bool) -> Taken:
    held = None if pin and not (place() / "root.json").exists() else pinned_root()
    root = _newest(held, [bytes(one) for one in given.roots])
    if root is None:
        raise RecordRefusedError("no_root", "there is no root of the officers yet", cure=PIN)
    before = revoked()
    gone = before | set(given.revoked)
    changed = False
    if gone != before:
        changed |= _kept("revoked.json", msgspec.json.format(msgspec.json.encode(sorted(gone))) + b"\n", dry=dry)
    if root != held:
        changed |= _kept("root.json", root, dry=dry)
    good, bad = [], list[RecordRefusedError]()
    for envelope in given.records:
        sealed = msgspec.json.encode(envelope)
        try:
            good.append((check_record(sealed, root, gone, now), sealed))
        except RecordRefusedError as error:
            bad.append(error)
    if bad and not good:
        raise bad[0]
    for record, sealed in good:
        changed |= _kept(f"records/{record.image_sha256}.{record.name}.json", sealed, dry=dry)
    version = parse(Root, root, "root.json").signed.version
    return Taken(changed, version, tuple(record.name for record, _ in good), len(gone), tuple(str(one) for one in bad))


def _kept(name: str, content: bytes, *, dry: bool) -> bool:
    """Write a file of this hypervisor's trust unless it has this content; return whether it had not."""
    target = place() / name
    if target.exists() and target.read_bytes() == content:
        return False
    if not dry:
        write_atomic(target, content)
    return True


def _newest(held: bytes | None, offered: list[bytes]) -> bytes | None:
    """Return the newest root that ``held`` leads to through ``offered``; without one, the newest of their own chain."""
    try:
        if held is None:
            return follow_roots(offered[0], offered[1:]) if offered else None
        ours = parse(Root, held, "root.json")
        for raw in offered:
            theirs = parse(Root, raw, "root.json")
            if theirs.signed.version == ours.signed.version and theirs.signed_bytes != ours.signed_bytes:
                raise RecordRefusedError(
                    "another_root",
                    f"the root version {ours.signed.version} that is offered is not the one that this hypervisor trusts",
                    cure="find out who changed it; docs/images.md says how to begin with another root",
                )
        check_root(held, None)
        return follow_roots(held, offered)
    except RepositoryError as error:
        raise RecordRefusedError(
            f"root_{error.code}", f"the officers' root is refused: {error.message}", cure=error.cure
        ) from error
