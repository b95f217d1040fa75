"""What those who look after an installation are told of all of it, in one snapshot each; nothing here changes anything.

The fleet in figures, which perimeters, bastions and machines there are, images with their workspaces, gates with their
questions, and how often the glass was broken. Of people see :mod:`saw.broker.fleet_people`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, exists, func, or_, select

from saw.attest.image_record import parse_record
from saw.broker.break_glass import OWED
from saw.broker.certificates import KINDS
from saw.broker.clock import iso
from saw.broker.context import Services
from saw.broker.images import ImageState, refusal
from saw.broker.lifecycle import State
from saw.broker.replicas import Upkeep, living
from saw.broker.review_states import GATE, UNENDED
from saw.broker.rollout import Course
from saw.broker.schema import (
    audit_events,
    audit_heads,
    certificates,
    images,
    jobs,
    review_decisions,
    reviews,
    rollouts,
    workspaces,
)
from saw.broker.store import SOURCE
from saw.jobs.messages import LIVE, RESUMABLE
from saw.review.statement import parse_statement

PAGE = 50
"""Images, questions or uses of the glass in one page."""
GROUPS = 200
"""Most lines of rings and blueprints."""
PARTS = 1000
"""Most perimeters, bastions and machines."""
LATELY = timedelta(days=1)
"""How long ago a job may have failed to be one that somebody should look at."""
_LIVES = workspaces.c.state != State.DECOMMISSIONED


class Fleet:
    """Reads for the pages of the installation."""

    def __init__(self, services: Services, upkeep: Upkeep) -> None:
        self._s = services
        self._upkeep = upkeep

    def figures(self) -> dict[str, Any]:
        """Return how many workspaces there are by state, and by ring and blueprint; what needs a look; and the brokers."""
        now = self._s.clock()
        columns = workspaces.c
        with self._s.store.read() as connection:
            states = _counted(connection, select(columns.state, func.count()).group_by(columns.state))
            groups = connection.execute(
                select(columns.ring, columns.blueprint, func.count())
                .where(_LIVES)
                .group_by(columns.ring, columns.blueprint)
                .order_by(columns.ring, columns.blueprint)
                .limit(GROUPS + 1)
            ).all()
            looks = self._looks(connection, now)
        return {
            "states": [(state, states[state]) for state in State if states.get(state)],
            "living": sum(count for state, count in states.items() if state != State.DECOMMISSIONED),
            "groups": [tuple(row) for row in groups[:GROUPS]],
            "more_groups": len(groups) > GROUPS,
            "looks": looks,
            "brokers": living(self._s.store),
            "upkeep": self._upkeep.mine,
        }

    def parts(self) -> dict[str, Any]:
        """Return who has a certificate here beside workspaces, and who ships events to the trail.

        ``last_at`` is when the last event of a source arrived, None when it shipped none or retention took the content away.
        """
        now = iso(self._s.clock())
        shipped = (
            select(audit_heads.c.source, audit_heads.c.seq, audit_events.c.at)
            .outerjoin(
                audit_events,
                (audit_events.c.source == audit_heads.c.source) & (audit_events.c.seq == audit_heads.c.seq),
            )
            .where(audit_heads.c.source != SOURCE)
            .order_by(audit_heads.c.source)
            .limit(PARTS)
        )
        with self._s.store.read() as connection:
            held = connection.execute(newest_certificates()).all()
            sources = connection.execute(shipped).all()
        return {
            "certificates": [
                {"kind": row[0], "name": row[1], "issued_at": row[2], "expires_at": row[3], "counts": row[3] > now}
                for row in held
            ],
            "sources": [
                {"name": row.source, "events": row.seq, "last_at": None if row.at is None else _stamp(row.at)}
                for row in sources
            ],
        }

    def images(self, search: str, state: ImageState | None, page: int) -> dict[str, Any]:
        """Return a page of images, by name and the newest first, with how many workspaces each has and whether it may run.

        ``search`` is a part of the name or the beginning of the digest. ``more`` tells whether another page follows.
        """
        query = select(images).order_by(images.c.name, images.c.registered_at.desc(), images.c.image_sha256)
        if state is not None:
            query = query.where(images.c.state == state)
        if search:
            part = images.c.name.icontains(search, autoescape=True)
            query = query.where(or_(part, images.c.image_sha256.startswith(search.lower(), autoescape=True)))
        now = self._s.clock()
        with self._s.store.read() as connection:
            rows, more = _paged(connection, query, page)
            bound = _bound(connection, [row.image_sha256 for row in rows])
        return {"images": [_image(row, bound, now) for row in rows], "more": more}

    def gates(self, page: int) -> dict[str, Any]:
        """Return the gates of the configuration, and a page of what was asked at them, the newest first."""
        query = (
            select(
                reviews.c.id, reviews.c.rule, reviews.c.path, reviews.c.sponsor, reviews.c.perimeter, reviews.c.state,
                reviews.c.opened_at, reviews.c.expires_at,
            )
            .where(reviews.c.kind == GATE)
            .order_by(reviews.c.opened_at.desc(), reviews.c.id)
        )  # fmt: skip
        with self._s.store.read() as connection:
            rows, more = _paged(connection, query, page)
        return {
            "gates": sorted(self._s.config.gates.items()),
            "questions": [row._asdict() for row in rows],
            "more": more,
        }

    def broken_glass(self, page: int) -> dict[str, Any]:
        """Return the settings, and a page of reviews whose glass was broken, the newest first, with who said what."""
        columns = reviews.c
        query = (
            select(
                columns.id, columns.kind, columns.workspace_id, columns.rule, columns.method, columns.host, columns.path,
                columns.group_name, columns.state, columns.broken_at, columns.after_state, columns.after_due_at,
            )
            .where(columns.broken_at.is_not(None))
            .order_by(columns.broken_at.desc(), columns.id)
        )  # fmt: skip
        with self._s.store.read() as connection:
            rows, more = _paged(connection, query, page)
            said = _said(connection, [row.id for row in rows])
        now = iso(self._s.clock())
        return {
            "settings": self._s.config.break_glass,
            "uses": [
                {
                    **row._asdict(),
                    "said": said.get(row.id, []),
                    "overdue": row.after_state in OWED and row.after_due_at is not None and row.after_due_at <= now,
                }
                for row in rows
            ],
            "more": more,
        }

    def _looks(self, connection: Connection, now: datetime) -> dict[str, int]:
        """Return how many there are of each thing that somebody should look at."""
        columns = workspaces.c
        lapsed = (columns.state == State.ACTIVE) & or_(
            columns.lease_expires_at.is_(None), columns.lease_expires_at <= iso(now)
        )
        later = rollouts.alias()
        newest = ~exists().where(
            later.c.ring == rollouts.c.ring,
            later.c.blueprint == rollouts.c.blueprint,
            later.c.revision > rollouts.c.revision,
        )
        revoked = exists().where(
            images.c.name == columns.image,
            images.c.image_sha256 == columns.image_sha256,
            images.c.state == ImageState.REVOKED,
        )
        asked: dict[str, ColumnElement[bool]] = {
            "lapsed": lapsed,
            "revoked_image": _LIVES & revoked,
            "live_jobs": jobs.c.state.in_(LIVE),
            "failed_jobs": jobs.c.state.in_(RESUMABLE) & (jobs.c.ended_at > iso(now - LATELY)),
            "open_reviews": reviews.c.state.in_(UNENDED),
            "owed": reviews.c.after_state.in_(OWED),
            "overdue": reviews.c.after_state.in_(OWED) & (reviews.c.after_due_at <= iso(now)),
            "halted": (rollouts.c.state == Course.HALTED) & newest,
        }
        return {name: _count(connection, where) for name, where in asked.items()}


def newest_certificates() -> Select[Any]:
    """Return the question for the newest certificate of each kind and name, but for those of workspaces."""
    kind, name = certificates.c.kind, certificates.c.name
    issued, expires = func.max(certificates.c.issued_at), func.max(certificates.c.expires_at)
    of_parts = select(kind, name, issued, expires).where(kind.in_(KINDS))
    return of_parts.group_by(kind, name).order_by(kind, name).limit(PARTS)


def _count(connection: Connection, where: ColumnElement[bool]) -> int:
    return int(connection.execute(select(func.count()).where(where)).scalar_one())


def _counted(connection: Connection, query: Select[Any]) -> dict[str, int]:
    return {str(row[0]): int(row[1]) for row in connection.execute(query)}


def _paged(connection: Connection, query: Select[Any], page: int) -> tuple[Sequence[Row[Any]], bool]:
    """Return the rows of a page (from 1) and whether another one follows."""
    rows = connection.execute(query.limit(PAGE + 1).offset((page - 1) * PAGE)).all()
    return rows[:PAGE], len(rows) > PAGE


def _bound(connection: Connection, digests: list[str]) -> dict[tuple[str, str], int]:
    """Return how many workspaces are bound to each image of these digests."""
    columns = workspaces.c
    query = (
        select(columns.image, columns.image_sha256, func.count())
        .where(_LIVES, columns.image_sha256.in_(digests))
        .group_by(columns.image, columns.image_sha256)
    )
    return {(row[0], row[1]): int(row[2]) for row in connection.execute(query)}


def _image(row: Row[Any], bound: dict[tuple[str, str], int], now: datetime) -> dict[str, Any]:
    record = parse_record(row.record.encode())
    return {
        "name": row.name,
        "image_sha256": row.image_sha256,
        "state": row.state,
        "state_reason": row.state_reason,
        "registered_at": row.registered_at,
        "variant": record.variant,
        "created": iso(record.created),
        "not_after": iso(record.not_after),
        "scanned_at": None if record.scan is None else iso(record.scan.scanned_at),
        "refusal": refusal(row, now),
        "workspaces": bound.get((row.name, row.image_sha256), 0),
    }


def _said(connection: Connection, identifiers: list[str]) -> dict[str, list[dict[str, str]]]:
    """Return by review who broke the glass and who looked at it afterwards, in order, with their words."""
    query = (
        select(review_decisions)
        .where(
            review_decisions.c.review_id.in_(identifiers),
            review_decisions.c.decision.in_(("break_glass", "uphold", "reject")),
        )
        .order_by(review_decisions.c.id)
    )
    found: dict[str, list[dict[str, str]]] = {}
    for row in connection.execute(query):
        words = parse_statement(row.statement.encode()).comment
        told = {"who": row.approver, "decision": row.decision, "at": row.decided_at, "comment": words}
        found.setdefault(row.review_id, []).append(told)
    return found


def _stamp(milliseconds: int) -> str:
    return iso(datetime.fromtimestamp(milliseconds / 1000, UTC))
