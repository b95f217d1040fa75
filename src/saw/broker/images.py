"""Release records of images: what a workspace's boot must measure."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import Connection, select

from saw.attest.verifier import RELEASED_PCRS
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import MalformedError
from saw.broker.schema import images

Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Boot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """PCR values (SHA-256 bank, lower-case hex) read back from a reference boot; keys are decimal PCR numbers."""

    pcrs: Annotated[dict[str, Hex], msgspec.Meta(max_length=24)]


class ReleaseRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``<image>.release.json``."""

    format: Literal["saw-image-release/1"]
    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?\Z")]
    image_sha256: Hex
    inputs_digest: Annotated[str, msgspec.Meta(max_length=128)]
    created: Annotated[str, msgspec.Meta(max_length=40)]
    boot: Boot


class Images:
    """The register of images."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def register(self, caller: Caller, record: ReleaseRecord) -> dict[str, Any]:
        """Store a release record. The same record again changes nothing; another one for the same image replaces it."""
        missing = [str(pcr) for pcr in RELEASED_PCRS if str(pcr) not in record.boot.pcrs]
        if missing:
            raise MalformedError(
                f"the release record of {record.name} lacks PCR {', '.join(missing)}",
                cure="read all of them back from a reference boot",
                code="record_incomplete",
            )
        raw = msgspec.json.encode(record, order="sorted").decode()
        now = self._s.clock()
        where = (images.c.name == record.name) & (images.c.image_sha256 == record.image_sha256)
        with self._s.store.write() as tx:
            known = tx.connection.execute(select(images.c.record).where(where)).scalar_one_or_none()
            changed = known != raw
            if changed:
                tx.connection.execute(images.delete().where(where))
                tx.connection.execute(
                    images.insert().values(
                        name=record.name, image_sha256=record.image_sha256, record=raw, registered_at=iso(now)
                    )
                )
                tx.record(
                    self._s.events.entity_management(
                        now,
                        caller.subject(),
                        ("image", record.name),
                        activity="create" if known is None else "update",
                        detail={
                            "image_sha256": record.image_sha256,
                            "record_sha256": _sha256(raw),
                            "replaced_sha256": "" if known is None else _sha256(known),
                        },
                    )
                )
        return {"name": record.name, "image_sha256": record.image_sha256, "changed": changed}

    def list(self) -> dict[str, Any]:
        """Return all release records with their time of registration."""
        with self._s.store.read() as connection:
            rows = connection.execute(select(images).order_by(images.c.name, images.c.registered_at)).all()
        return {"images": [{**msgspec.json.decode(row.record), "registered_at": row.registered_at} for row in rows]}


def boot_pcrs(connection: Connection, name: str, image_sha256: str) -> dict[int, str]:
    """Return the released PCR values of an image; empty when it is not registered (nothing can match then)."""
    where = (images.c.name == name) & (images.c.image_sha256 == image_sha256)
    raw = connection.execute(select(images.c.record).where(where)).scalar_one_or_none()
    if raw is None:
        return {}
    record = msgspec.json.decode(raw, type=ReleaseRecord)
    return {int(pcr): value for pcr, value in record.boot.pcrs.items() if pcr.isdecimal()}


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
