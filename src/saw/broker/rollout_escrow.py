"""Rollbacks in escrow: publications that officers signed before they are needed, kept until a rollout halts.

The broker cannot make one; it can only publish what M of N officers signed for exactly this case.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.errors import ConflictError, MalformedError
from saw.broker.repository import Repository
from saw.broker.rollout import earlier_content, newest_rollouts
from saw.broker.schema import rollbacks
from saw.broker.store import Transaction
from saw.policy.bundle import describe
from saw.policy.tuf_check import check_publication
from saw.policy.tuf_metadata import Root, parse


class Escrow(msgspec.Struct, frozen=True):
    """A rollback publication as it is kept: metadata by name and targets by path, bytes as they were signed."""

    metadata: dict[str, bytes]
    targets: dict[str, bytes]


class Rollback(msgspec.Struct, frozen=True):
    """What a kept publication does: the digest it releases to the ring, and the revision whose content that is."""

    ring: str
    blueprint: str
    policy_digest: str
    returns_to: int


def check_escrow(
    connection: Connection, repository: Repository, store: Path, escrow: Escrow, rollout: Row[Any], *, now: datetime
) -> Rollback:
    """Return what ``escrow`` does; raise unless it would be accepted now and only takes ``rollout``'s release back.

    ``store`` is the directory of the repository. What going back allows again must be signed like every change of reach;
    it was compared beforehand (:meth:`saw.broker.repository.Repository.compare`). Raises :class:`ConflictError`,
    :class:`MalformedError` and the
    repository's own refusals (``threshold``, ``stale_base``, ``unsigned_widening``, ``bundle`` …).
    """
    raw_root = repository.root()
    if raw_root is None:
        raise ConflictError("no TUF root is installed", cure="publish a policy first", code="no_root")
    if any(is_root(name) and not repository.holds_root(raw) for name, raw in escrow.metadata.items()):
        raise MalformedError("a rollback does not change the root", cure="publish the new root by itself first")
    checked = check_publication(
        store,
        parse(Root, raw_root, "root.json").signed,
        escrow.metadata,
        escrow.targets,
        now,
        rotated=False,
        diff=repository.compared,
    )
    path = f"rings/{rollout.ring}/{rollout.blueprint}.bundle.json"
    if [release.path for release in checked.changed] != [path]:
        raise ConflictError(
            f"the publication does not release exactly {path}",
            cure="make it with saw policy rollback --prepare-only",
            code="not_a_rollback",
        )
    raw = escrow.targets[path]
    returns_to = earlier_content(connection, rollout.ring, rollout.blueprint, describe(raw)[1].revision, raw)
    if returns_to is None:
        raise ConflictError(
            "the bundle's content is not that of an earlier release of this ring",
            cure="make it with saw policy rollback --prepare-only",
            code="not_a_rollback",
        )
    return Rollback(rollout.ring, rollout.blueprint, describe(raw)[0], returns_to)


def keep(tx: Transaction, rollout: Row[Any], escrow: Escrow, found: Rollback, *, by: str, now: datetime) -> bool:
    """Store a checked rollback for ``rollout``, in place of an earlier one; return whether anything changed."""
    values = {
        "policy_digest": found.policy_digest,
        "returns_to": found.returns_to,
        "publication": msgspec.json.encode(escrow),
        "state": "kept",
        "reason": "",
        "deposited_by": by,
        "deposited_at": iso(now),
    }
    held = kept(tx.connection, rollout)
    if held is not None and (held.publication, held.state) == (values["publication"], "kept"):
        return False
    if held is not None:
        tx.connection.execute(rollbacks.update().where(_of(rollout)).values(**values))
    else:
        key = {"ring": rollout.ring, "blueprint": rollout.blueprint, "revision": rollout.revision}
        tx.connection.execute(rollbacks.insert().values(**key, **values))
    return True


def kept(connection: Connection, rollout: Row[Any]) -> Row[Any] | None:
    """Return the rollback that was deposited for ``rollout``, in whatever state, or None."""
    return connection.execute(select(rollbacks).where(_of(rollout))).one_or_none()


def kept_targets(connection: Connection) -> list[dict[str, bytes]]:
    """Return the bundles of every rollback that is in escrow for a newest release, by target path."""
    rows = [kept(connection, rollout) for rollout in newest_rollouts(connection)]
    return [unpack(row).targets for row in rows if row is not None and row.state == "kept"]


def settle(tx: Transaction, rollout: Row[Any], state: str, reason: str) -> None:
    """Note that a rollback was published, went stale, or failed."""
    tx.connection.execute(rollbacks.update().where(_of(rollout)).values(state=state, reason=reason[:1024]))


def unpack(row: Row[Any]) -> Escrow:
    """Return the publication of a stored rollback."""
    return jsontext.decode(row.publication, kind=Escrow)


def decode_escrow(metadata: Mapping[str, str], targets: Mapping[str, str]) -> Escrow:
    """Return a publication out of base64; raise :class:`MalformedError` naming the file."""

    def content(name: str, text: str) -> bytes:
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise MalformedError(
                f"{name[:128]} is not base64", cure="send standard base64 of the exact bytes"
            ) from error

    return Escrow(
        {name: content(name, text) for name, text in metadata.items()},
        {path: content(path, text) for path, text in targets.items()},
    )


def is_root(name: str) -> bool:
    """Tell whether a file of a publication is a root."""
    return name == "root.json" or name.endswith(".root.json")


def command_for(rollout: Row[Any]) -> str:
    """Return the command with which officers prepare the rollback of ``rollout``'s release."""
    if rollout.previous_revision is None:
        return ""
    return (
        f"saw policy rollback --repository OFFICERS_COPY --ring {rollout.ring} --blueprint {rollout.blueprint} "
        f"--to {rollout.previous_revision} --key OFFICER_KEY --out rollback-{rollout.ring}-{rollout.revision}"
    )


def _of(rollout: Row[Any]) -> Any:
    return (
        (rollbacks.c.ring == rollout.ring)
        & (rollbacks.c.blueprint == rollout.blueprint)
        & (rollbacks.c.revision == rollout.revision)
    )
