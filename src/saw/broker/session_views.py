"""What is said of a session: its state, its rows for operators, the types of answers that are told to programs
(:mod:`saw.broker.openapi`), and the names under which its keys are known."""

from __future__ import annotations

import hashlib
from datetime import datetime
from typing import Any, Literal

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import Caller
from saw.broker.errors import ForbiddenError, NotFoundError
from saw.broker.schema import sessions
from saw.broker.session_ends import holder

SessionState = Literal["requested", "open", "ending", "closed", "expired"]


class RecordingHold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a recording is kept beyond its time, since when, and on whose word."""

    at: str
    by: str
    reason: str


class Session(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A session through a bastion. Times are RFC 3339; what is null was not yet. ``recording`` is the digest of the recording.

    ``bytes_in`` and ``bytes_out`` are what the client sent and was sent.
    """

    id: str
    state: SessionState
    who: str
    workspace: str
    client_address: str | None = msgspec.field(name="from")
    command: str | None
    terminal: bool | None
    forward_port: int | None
    forward_grant: str | None
    requested_at: str
    started_at: str | None
    closed_at: str | None
    reason: str | None
    exit_code: int | None
    bytes_in: int | None
    bytes_out: int | None
    recording: str | None
    recording_stored_at: str | None
    recording_removed_at: str | None
    recording_held: RecordingHold | None
    bastion: str | None


class ChangedSession(Session, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A session after a call, and whether the call changed it."""

    changed: bool


class SessionPage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Sessions, the newest first; ``next`` is the ``after`` of the page that follows, null at the end."""

    sessions: tuple[Session, ...]
    next: str | None


class SessionCertificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What logs in at the bastion once, until ``expires_at``; the host shows a certificate of ``host_ca`` for ``host_name``."""

    certificate: str
    host_ca: str
    host_name: str
    session_id: str
    expires_at: str


class RecordingKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The key of one recording (hexadecimal), with the digest and the number of its chunks once its bastion has told them."""

    key: str
    digest: str | None
    chunks: int | None


def key_digest(public_key: str) -> str:
    """Return the digest under which a public key line is known: SHA-256 of type and key, without the comment."""
    return hashlib.sha256(" ".join(public_key.split()[:2]).encode()).hexdigest()


def bound_to(identifier: str) -> bytes:
    """Return what the stored key of a recording is bound to."""
    return f"saw-session-key/1:{identifier}".encode()


def unknown_session(identifier: str) -> NotFoundError:
    """Return the refusal of a session that does not exist, or not for the caller."""
    return NotFoundError(
        f"there is no session {identifier[:64]!r}", cure="saw sessions lists them", code="unknown_session"
    )


def get_session(connection: Connection, identifier: str) -> Row[Any]:
    """Return the row of a session through a bastion."""
    wanted = (sessions.c.id == identifier) & (sessions.c.kind == "bastion")
    row = connection.execute(select(sessions).where(wanted)).one_or_none()
    if row is None:
        raise unknown_session(identifier)
    return row


def own_session(connection: Connection, caller: Caller, identifier: str) -> Row[Any]:
    """Return the row of a session that the bastion ``caller`` opened."""
    row = get_session(connection, identifier)
    if row.bastion != caller.principal:
        raise ForbiddenError(
            f"{identifier[:64]} was not opened by {caller.principal}", cure="ask its bastion", code="foreign_session"
        )
    return row


def _state(row: Row[Any], now: datetime) -> str:
    if row.closed_at is not None:
        return "closed"
    if row.redeemed_at is not None:
        return "open" if row.ended_at is None else "ending"
    return "requested" if parse_iso(row.expires_at) > now else "expired"


def not_over(now: datetime) -> ColumnElement[bool]:
    """Return the condition for sessions that are open or ending, or may still be opened."""
    may_open = sessions.c.redeemed_at.is_not(None) | (sessions.c.expires_at > iso(now))
    return sessions.c.closed_at.is_(None) & may_open


def session_view(row: Row[Any], now: datetime) -> dict[str, Any]:
    """Return what operators see of a session."""
    return {
        "id": row.id,
        "state": _state(row, now),
        "who": holder(row),
        "workspace": row.workspace_id,
        "from": row.client_address,
        "command": row.command,
        "terminal": row.terminal,
        "forward_port": row.forward_port,
        "forward_grant": row.forward_grant,
        "requested_at": row.issued_at,
        "started_at": row.redeemed_at,
        "closed_at": row.closed_at,
        "reason": row.end_reason,
        "exit_code": row.exit_code,
        "bytes_in": row.bytes_in,
        "bytes_out": row.bytes_out,
        "recording": row.recording_digest,
        "recording_stored_at": row.recording_stored_at,
        "recording_removed_at": row.recording_removed_at,
        "recording_held": None
        if row.recording_held_at is None
        else {"at": row.recording_held_at, "by": row.recording_held_by, "reason": row.recording_held_reason},
        "bastion": row.bastion,
    }
