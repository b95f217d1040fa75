"""Up to where the trail is kept elsewhere: signed as a tree, seen by witnesses, acknowledged by a receiver (control AUD-02).

The broker makes no checkpoint and holds no key of one. It reads the file, verifies its signatures, and works the root out again
from its own leaves; what it has worked out is kept, so that each leaf is hashed once.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
from sqlalchemy import Connection, select

from saw import jsontext
from saw.audit.merkle import EMPTY_ROOT, Edge, leaf_hash
from saw.audit.note import LOG, WITNESS, Checkpoint, PublicKey, open_checkpoint
from saw.audit.ship import Cursor
from saw.audit.tiles import Leaf
from saw.broker.context import BROKER, Services
from saw.broker.retention_settings import AuditSettings
from saw.broker.schema import audit_covered, audit_events
from saw.errors import ConfigError
from saw.files import load_json

logger = logging.getLogger("saw.broker")

LEAVES = 20_000
"""Most leaves that one look hashes."""


class Signed(msgspec.Struct, frozen=True):
    """A tree that was signed, and is the beginning of this trail; ``root`` is lower-case hex."""

    size: int = 0
    root: str = EMPTY_ROOT.hex()


class Covered:
    """What of the trail is known to be kept elsewhere."""

    def __init__(self, services: Services, settings: AuditSettings) -> None:
        self._s = services
        self._settings = settings
        self._told: Checkpoint | None = None

    def look(self) -> Signed:
        """Return the largest signed tree that the trail begins with, as far as this has been worked out.

        A checkpoint that says something else about the trail is a finding, told once for each broker that runs; nothing more
        counts as signed then. Raises :class:`saw.errors.SawError` for files that cannot be read, or lack a signature.
        """
        wanted = self._checkpoint()
        with self._s.store.read() as connection:
            _, signed = _stored(connection)
        if wanted.size <= signed.size or wanted == self._told:
            return signed
        with self._s.store.write() as tx:
            edge, signed = _stored(tx.connection)
            if edge.size >= wanted.size:
                edge = Edge()  # another tree than the one that was being worked out, or another look at a wrong one
            known = edge.size
            self._grow(tx.connection, edge, wanted.size)
            if edge.size == known:
                logger.warning("the signed tree has %d leaves, the trail %d without a gap", wanted.size, known)
            if edge.size == wanted.size and edge.root() == wanted.root:
                signed = Signed(wanted.size, wanted.root.hex())
            elif edge.size == wanted.size:
                self._told = wanted
                detail: dict[str, object] = {
                    "size": wanted.size,
                    "signed": wanted.root.hex(),
                    "found": edge.root().hex(),
                }
                tx.record(
                    self._s.events.detection_finding(
                        self._s.clock(),
                        BROKER.subject(),
                        kind="trail_not_signed",
                        title="The trail is not the one of its signed checkpoint: nothing is removed by retention",
                        detail=detail,
                    )
                )
            _store(tx.connection, edge, signed)
        return signed

    def shipped(self, connection: Connection) -> int | None:
        """Return the position up to which the receiver has acknowledged this very trail, None when none is set up."""
        if self._settings.shipped is None:
            return None
        cursor = load_json(self._settings.shipped, Cursor)
        columns = audit_events.c
        place = select(columns.source, columns.seq, columns.hash).where(columns.position == cursor.position)
        row = connection.execute(place).one_or_none()
        last = cursor.last
        if row is None or last is None or (row.source, row.seq, row.hash) != (last.source, last.seq, last.hash):
            return 0
        return cursor.position

    def _checkpoint(self) -> Checkpoint:
        log = PublicKey.read(self._settings.key, LOG)
        witnesses = tuple(PublicKey.read(name, WITNESS) for name in self._settings.witnesses)
        signed = open_checkpoint(_read(self._settings.checkpoint), log, witnesses)
        if missing := [one.name for one in witnesses if one.name not in signed.witnesses]:
            raise ConfigError(
                f"{', '.join(missing)} did not sign {self._settings.checkpoint}",
                cure="name the file that saw audit witness wrote",
            )
        return signed.checkpoint

    @staticmethod
    def _grow(connection: Connection, edge: Edge, size: int) -> None:
        """Add up to :data:`LEAVES` of the trail's leaves, up to ``size``; stop where one is missing."""
        columns = audit_events.c
        query = (
            select(columns.position, columns.source, columns.seq, columns.hash)
            .where(columns.position > edge.size, columns.position <= size)
            .order_by(columns.position)
            .limit(LEAVES)
        )
        for row in connection.execute(query):
            if row.position != edge.size + 1:
                return
            edge.add(leaf_hash(Leaf(row.source, row.seq, row.hash).raw))


def _stored(connection: Connection) -> tuple[Edge, Signed]:
    row = connection.execute(select(audit_covered)).one_or_none()
    if row is None:
        return Edge(), Signed()
    hashes = [bytes.fromhex(one) for one in jsontext.decode(row.edge, kind=list[str])]
    return Edge(row.size, hashes), Signed(row.signed_size, row.signed_root)


def _store(connection: Connection, edge: Edge, signed: Signed) -> None:
    values = {
        "size": edge.size,
        "edge": msgspec.json.encode([one.hex() for one in edge.hashes]).decode(),
        "signed_size": signed.size,
        "signed_root": signed.root,
    }
    if connection.execute(audit_covered.update().values(**values)).rowcount == 0:
        connection.execute(audit_covered.insert().values(id=1, **values))


def _read(name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {name}: {error.strerror}", cure="check the part audit of broker.json"
        ) from error
