"""What the calls about sessions answer: the types that are told to programs (:mod:`saw.broker.openapi`)."""

from __future__ import annotations

from typing import Literal

import msgspec

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
