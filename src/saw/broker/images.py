"""Golden images: their signed release records, where each stands, and what a workspace's boot must measure.

Only a record that enough officers signed counts, and only while it is current: not past its end and not revoked (P0-04).
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw import jsontext
from saw.attest.image_record import PAYLOAD_TYPE, RecordInvalid, ReleaseRecord, parse_record
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.schema import images, workspaces
from saw.policy.envelope import EnvelopeRefused, SignedEnvelope, verify_envelope
from saw.policy.keys import PublicKey

Keys = tuple[dict[str, PublicKey], int]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


_SCANNER = "lynis"
"""Whose hardening index the floor is one of."""
_AHEAD = timedelta(hours=1)
"""How far the clock of who searched may be ahead."""


class ImageState(enum.StrEnum):
    """Where an image stands."""

    CANDIDATE = "candidate"
    STABLE = "stable"
    DEPRECATED = "deprecated"
    REVOKED = "revoked"


STEPS: dict[ImageState, frozenset[ImageState]] = {
    ImageState.CANDIDATE: frozenset({ImageState.STABLE, ImageState.DEPRECATED, ImageState.REVOKED}),
    ImageState.STABLE: frozenset({ImageState.DEPRECATED, ImageState.REVOKED}),
    ImageState.DEPRECATED: frozenset({ImageState.STABLE, ImageState.REVOKED}),
    ImageState.REVOKED: frozenset(),
}
"""Which step leads where; a revoked image stays revoked."""


class Move(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Take an image to another state; ``image_sha256`` names one of several images with the same name."""

    to: ImageState
    reason: Text
    image_sha256: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] = ""


class Images:
    """The register of images. ``officers`` gives the keys that sign and how many must, or None before there is a root."""

    def __init__(self, services: Services, officers: Callable[[], Keys | None]) -> None:
        self._s = services
        self._officers = officers

    def register(self, caller: Caller, envelope: SignedEnvelope) -> dict[str, Any]:
        """Store a signed record as a candidate. The same record again changes nothing; another one replaces it.

        A record of a revoked image is refused, and so is one that does not count now.
        """
        record, payload, signers = self._verified(envelope)
        now = self._s.clock()
        if now >= record.not_after:
            raise ForbiddenError(
                f"the release record of {record.name} counted until {iso(record.not_after)}",
                cure="sign a record with a later end",
                code="record_expired",
            )
        lacking = record.missing(self._s.config.image.require)
        if lacking:
            raise ForbiddenError(
                f"the release record of {record.name} lacks {', '.join(lacking)}",
                cure="build the image again, search it for vulnerabilities where asked (saw image scan), then sign its record",
                code="record_incomplete",
            )
        raw = payload.decode()
        where = (images.c.name == record.name) & (images.c.image_sha256 == record.image_sha256)
        with self._s.store.write() as tx:
            known = tx.connection.execute(select(images).where(where)).one_or_none()
            if known is not None and known.state == ImageState.REVOKED:
                raise ConflictError(
                    f"image {record.name} is revoked ({known.state_reason})", cure="build another", code="image_revoked"
                )
            changed = known is None or known.record != raw or not known.envelope
            if changed:
                self._searched(record, now)
                self._hardened(record)
                values = {"record": raw, "envelope": msgspec.json.encode(envelope).decode()}
                if known is None:
                    values |= {"name": record.name, "image_sha256": record.image_sha256, "registered_at": iso(now)}
                    tx.connection.execute(images.insert().values(**values))
                else:
                    tx.connection.execute(images.update().where(where).values(**values))
                tx.record(
                    self._s.events.entity_management(
                        now,
                        caller.subject(),
                        ("image", record.name),
                        activity="create" if known is None else "update",
                        detail={
                            "image_sha256": record.image_sha256,
                            "record_sha256": _sha256(raw),
                            "replaced_sha256": "" if known is None else _sha256(known.record),
                            "signers": list(signers),
                            "scanned_at": iso(record.scan.scanned_at) if record.scan else "",
                        },
                    )
                )
            state = ImageState.CANDIDATE if known is None else ImageState(known.state)
        return {"name": record.name, "image_sha256": record.image_sha256, "state": state, "changed": changed}

    def _searched(self, record: ReleaseRecord, now: datetime) -> None:
        """Refuse a record whose search for known vulnerabilities is too old, where one is required. What is registered stays."""
        settings = self._s.config.image
        if "scan" not in settings.require or record.scan is None:
            return
        age = now - record.scan.scanned_at
        if not -_AHEAD <= age <= timedelta(seconds=settings.scan_max_age_s):
            raise ForbiddenError(
                f"{record.name} was searched for known vulnerabilities at {iso(record.scan.scanned_at)}, which is "
                + ("to come" if age < -_AHEAD else f"more than {settings.scan_max_age_s} s ago"),
                cure="search it again with newer advisories (saw image scan), then sign its record",
                code="scan_not_current",
            )

    def _hardened(self, record: ReleaseRecord) -> None:
        """Refuse a record whose score lies below the floor, or is another scanner's. What is registered stays."""
        settings = self._s.config.image
        if not settings.baseline_floor or "baseline" not in settings.require or record.baseline is None:
            return
        if record.baseline.scanner != _SCANNER:
            raise ForbiddenError(
                f"the hardening index of {record.name} is of the scanner {record.baseline.scanner!r}, and the floor of "
                f"{settings.baseline_floor} is one of {_SCANNER}",
                cure=f"have {_SCANNER} scan the image (the build does), then sign its record",
                code="baseline_of_another_scanner",
            )
        if record.baseline.score < settings.baseline_floor:
            raise ForbiddenError(
                f"the hardening index of {record.name} is {record.baseline.score}, below the floor of {settings.baseline_floor}",
                cure="see what its baseline.dat names (saw baseline score), build the image again, then sign its record",
                code="baseline_below_floor",
            )

    def move(self, caller: Caller, name: str, body: Move) -> dict[str, Any]:
        """Promote, deprecate or revoke. Revoking takes the grants of every workspace on that image in the same moment."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = find_image(tx.connection, name, body.image_sha256)
            before = ImageState(row.state)
            changed = before != body.to
            if changed and body.to not in STEPS[before]:
                allowed = ", ".join(sorted(STEPS[before])) or "none, this state is final"
                raise ConflictError(
                    f"image {name} is {before} and cannot become {body.to}",
                    cure=f"allowed from here: {allowed}",
                    code="transition_refused",
                )
            if changed:
                where = (images.c.name == row.name) & (images.c.image_sha256 == row.image_sha256)
                tx.connection.execute(images.update().where(where).values(state=body.to, state_reason=body.reason))
                tx.record(
                    self._s.events.entity_management(
                        now,
                        caller.subject(),
                        ("image", row.name),
                        activity="deactivate" if body.to is ImageState.REVOKED else "update",
                        comment=body.reason,
                        detail={"image_sha256": row.image_sha256, "from": before, "to": body.to},
                    )
                )
            ended: list[str] = []
            if body.to is ImageState.REVOKED:
                running = (workspaces.c.image == row.name) & (workspaces.c.image_sha256 == row.image_sha256)
                running &= workspaces.c.lease_expires_at.is_not(None)
                ended = list(tx.connection.execute(select(workspaces.c.id).where(running)).scalars())
                if ended:
                    grants = {"lease_expires_at": None, "svid_sha256": None}
                    tx.connection.execute(workspaces.update().where(workspaces.c.id.in_(ended)).values(**grants))
                    tx.touch(*ended)
        return {
            "name": row.name,
            "image_sha256": row.image_sha256,
            "state": body.to,
            "changed": changed,
            "workspaces_cut_off": ended,
        }

    def list(self) -> dict[str, Any]:
        """Return all release records with their state and time of registration."""
        with self._s.store.read() as connection:
            rows = connection.execute(select(images).order_by(images.c.name, images.c.registered_at)).all()
        return {
            "images": [
                {
                    **jsontext.decode(row.record),
                    "state": row.state,
                    "state_reason": row.state_reason,
                    "signed": bool(row.envelope),
                    "registered_at": row.registered_at,
                }
                for row in rows
            ]
        }

    def hand_over(self, roots: Sequence[Any], name: str = "", image_sha256: str = "") -> dict[str, Any]:
        """Return what a hypervisor is handed so that it can judge images itself: the officers' ``roots``, what was revoked, and
        the signed records of the images ``name`` (all of that name without ``image_sha256``) that are not revoked."""
        with self._s.store.read() as connection:
            rows = connection.execute(select(images).order_by(images.c.name, images.c.image_sha256)).all()
        named = [row for row in rows if name and row.name == name and image_sha256 in ("", row.image_sha256)]
        return {
            "roots": roots,
            "records": [msgspec.Raw(row.envelope) for row in named if row.envelope and row.state != ImageState.REVOKED],
            "revoked": [
                {"name": row.name, "image_sha256": row.image_sha256} for row in rows if row.state == ImageState.REVOKED
            ],
        }

    def _verified(self, envelope: SignedEnvelope) -> tuple[ReleaseRecord, bytes, tuple[str, ...]]:
        officers = self._officers()
        if officers is None:
            raise ConflictError(
                "there is no root of trust yet, so no signature can be checked",
                cure="install the root or publish a policy first",
                code="no_root",
            )
        try:
            payload, signers = verify_envelope(msgspec.json.encode(envelope), PAYLOAD_TYPE, *officers)
            return parse_record(payload), payload, signers
        except EnvelopeRefused as error:
            raise ForbiddenError(
                f"the release record is refused: {error.message}", cure=error.cure, code=f"record_{error.code}"
            ) from error
        except RecordInvalid as error:
            raise MalformedError(error.message, cure=error.cure, code=error.code) from error


def find_image(connection: Connection, name: str, image_sha256: str = "") -> Row[Any]:
    """Return the newest image called ``name`` (or the one with that digest); raise an error that names the cure."""
    query = select(images).where(images.c.name == name).order_by(images.c.registered_at.desc())
    if image_sha256:
        query = query.where(images.c.image_sha256 == image_sha256)
    row = connection.execute(query).first()
    if row is None:
        raise NotFoundError(
            f"image {name[:128]!r} is not registered",
            cure="register its signed release record: saw image register",
            code="unknown_image",
        )
    return row


def refusal(row: Row[Any] | None, now: datetime) -> str:
    """Return why no workspace may attest on this image now (``code: detail``), or an empty text."""
    if row is None:
        return "image_unknown: the image is not registered"
    if not row.envelope:
        return "image_unsigned: the release record of the image is not signed"
    if row.state == ImageState.REVOKED:
        return f"image_revoked: the image is revoked: {row.state_reason}"
    if now >= _record(row).not_after:
        return "image_expired: the release record of the image has ended"
    return ""


def admit(row: Row[Any], ring: str, candidate_rings: frozenset[str], now: datetime) -> None:
    """Raise :class:`ConflictError` unless a workspace of ``ring`` may be made on this image."""
    reason = refusal(row, now)
    if not reason and row.state == ImageState.DEPRECATED:
        reason = f"image_deprecated: the image is deprecated: {row.state_reason}"
    if not reason and row.state == ImageState.CANDIDATE and ring not in candidate_rings:
        reason = f"image_candidate: candidates are for the rings {', '.join(sorted(candidate_rings)) or 'none'}"
    if reason:
        code, _, detail = reason.partition(": ")
        raise ConflictError(
            f"image {row.name} may not be used here: {detail}",
            cure="promote it (saw image promote), or use another image",
            code=code,
        )


def require_bootable(connection: Connection, workspace: Row[Any], now: datetime) -> None:
    """Raise :class:`ConflictError` when the image of a workspace may not run now: it is revoked, or its record does not count.

    A deprecated image goes on in the workspaces that have it, and a candidate was admitted to the ring before.
    """
    where = (images.c.name == workspace.image) & (images.c.image_sha256 == workspace.image_sha256)
    reason = refusal(connection.execute(select(images).where(where)).one_or_none(), now)
    if reason:
        code, _, detail = reason.partition(": ")
        again = (
            "" if code in {"image_revoked", "image_unknown"} else "sign its record anew (saw image sign, register), or "
        )
        raise ConflictError(
            f"{workspace.id} may not run on {workspace.image}: {detail}",
            cure=f"{again}stop it and bind it to another image (saw workspace reprovision, playbook workspace_rebuild)",
            code=code,
        )


def expected_boot(connection: Connection, name: str, image_sha256: str, now: datetime) -> tuple[dict[int, str], str]:
    """Return the PCR values that a boot of this image must measure, and why it may not be used (empty when it may)."""
    where = (images.c.name == name) & (images.c.image_sha256 == image_sha256)
    row = connection.execute(select(images).where(where)).one_or_none()
    reason = refusal(row, now)
    return ({}, reason) if row is None or reason else (_record(row).expected_pcrs(), "")


def _record(row: Row[Any]) -> ReleaseRecord:
    return parse_record(row.record.encode())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
