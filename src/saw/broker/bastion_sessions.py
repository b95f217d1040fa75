"""Sessions through a bastion: a certificate that logs in once, redeemed by the recorder, watched until it ends.

``requested → open → closed``. What takes the reason of a session away tells it to end (:mod:`saw.broker.session_ends`); the
recorder hears that in its long-poll, drops the connection and reports the end.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, false, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import ConflictError, ForbiddenError
from saw.broker.forwards import Forwards, Port
from saw.broker.lifecycle import State
from saw.broker.newest import newest_page
from saw.broker.people import find_person
from saw.broker.registry import get_row, require_state
from saw.broker.schema import sessions, sso_sessions, workspaces
from saw.broker.session_ends import SessionEnds, holder, session_key
from saw.broker.session_records import SessionRecords
from saw.broker.session_source import bound_source, known_source, workspace_source
from saw.broker.session_views import bound_to, get_session, key_digest, not_over, own_session, session_view
from saw.broker.store import Transaction
from saw.identity.sealed import KEY_BYTES, SealKey
from saw.identity.ssh import HOST_TTL, USER_TTL, SshAuthority
from saw.sessions.messages import BASTION_NAME, Closing, Granted, HostKey, Redeem, Watched

LARGEST_PAGE = 1000
"""Most sessions in one page."""


class SessionRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate to log in at the bastion once; ``ttl_s`` bounds the time to connect (seconds).

    ``source_address`` may narrow from where it counts, never widen it. With ``forward_port`` the session carries connections to
    that port of the workspace and does nothing else; it takes a grant.
    """

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)]
    public_key: Annotated[str, msgspec.Meta(max_length=4096)]
    ttl_s: Annotated[int, msgspec.Meta(ge=10, le=300)] = 120
    source_address: Annotated[str, msgspec.Meta(max_length=256)] | None = None
    forward_port: Port | None = None


class EndRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a session must end."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class BastionSessions:
    """Requested, redeemed, watched and closed sessions (controls ID-02, ID-03).

    ``session_ca`` signs what logs in at bastions and what bastions show as their host certificates; ``workspaces_ca`` signs
    the recorder's own way to the workspace. Neither is taken for the other.
    """

    def __init__(
        self,
        services: Services,
        forwards: Forwards,
        session_ca: SshAuthority,
        workspaces_ca: SshAuthority,
        vault: SealKey,
    ) -> None:
        self._s = services
        self._session_ca = session_ca
        self._workspaces_ca = workspaces_ca
        self._vault = vault
        self._ends = SessionEnds(services)
        self._records = SessionRecords(services)
        self._forwards = forwards
        self._rules = services.config.sessions
        self._lost_after = timedelta(seconds=3 * self._rules.lease_s)
        self._up_since = services.clock()

    def admit(self, caller: Caller, workspace: str, *, person: str, sign_in: str) -> None:
        """Raise :class:`ForbiddenError` when :meth:`request` would now; that is audited as there."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_row(tx.connection, workspace)
            refused = self._barred(tx.connection, row, person, sign_in, now)
            if refused is not None:
                self._records.request(tx, caller, row, refused, detail={"sign_in": sign_in})
        if refused is not None:
            raise refused

    def request(
        self, caller: Caller, body: SessionRequest, *, person: str = "", sign_in: str = "", from_here: str | None = None
    ) -> dict[str, Any]:
        """Issue the certificate that logs in at the bastion once. ``person`` and their ``sign_in`` must be entitled.

        Its principal and key id are the session id, so that it opens nothing else, and it counts from where the bastion sees
        whoever asks (:mod:`saw.broker.session_source`); ``from_here``: this host logs in for them, and is seen there. Raises
        :class:`ForbiddenError`, and :class:`MalformedError` for addresses that are none.
        """
        now = self._s.clock()
        session, expires = self._s.new_id("ses"), now + timedelta(seconds=body.ttl_s)
        with self._s.store.write() as tx:
            row = get_row(tx.connection, body.workspace_id)
            asking = f"user:{person}" if person else caller.principal
            source = bound_source(from_here or known_source(self._rules, caller), body.source_address)
            certificate, grant = "", None
            refused = self._barred(tx.connection, row, person, sign_in, now)
            if refused is None and isinstance(source, ForbiddenError):
                refused = source
            if refused is None:
                grant, refused = self._granted(tx.connection, row, body.forward_port, asking, now)
            if refused is None and not isinstance(source, ForbiddenError):
                certificate = self._session_ca.issue_user(
                    body.public_key,
                    session,
                    session,
                    now,
                    body.ttl_s,
                    source_address=source,
                    force_command=f"saw session record {row.id}",
                    terminal=body.forward_port is None,
                )
                tx.connection.execute(
                    sessions.insert().values(
                        id=session,
                        workspace_id=row.id,
                        principal=caller.principal,
                        key_fingerprint=key_digest(body.public_key),
                        source_address=source,
                        issued_at=iso(now),
                        expires_at=iso(expires),
                        kind="bastion",
                        person=person,
                        sso_session=sign_in,
                        forward_port=body.forward_port,
                        forward_grant=None if grant is None else grant.id,
                    )
                )
            asked = {
                "key_sha256": key_digest(body.public_key),
                "source_address": (body.source_address if isinstance(source, ForbiddenError) else source) or "",
                "sign_in": sign_in,
                **_forwarded(body.forward_port, grant),
            }
            self._records.request(tx, caller, row, refused, session=session, expires=expires, detail=asked)
        if refused is not None:
            raise refused
        return {
            "certificate": certificate,
            "host_ca": self._session_ca.host_ca,
            "host_name": BASTION_NAME,
            "session_id": session,
            "expires_at": iso(expires),
        }

    def redeem(self, caller: Caller, body: Redeem) -> Granted:
        """Open the session, once: the first recorder wins. Raises :class:`ForbiddenError` or :class:`ConflictError`, audited."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = tx.connection.execute(
                select(sessions).where((sessions.c.id == body.session_id) & (sessions.c.kind == "bastion"))
            ).one_or_none()
            refused = self._unredeemable(tx.connection, row, body, now)
            self._records.opening(tx, caller, row, body, refused)
            granted = None if row is None or refused is not None else self._open(tx, caller, row, body, now)
        if refused is not None:
            raise refused
        assert granted is not None  # noqa: S101 - what is not refused was opened
        return granted

    def watch(self, caller: Caller, identifier: str) -> Watched:
        """Return whether an open session goes on, and remember that its bastion asked."""
        now = self._s.clock()
        with self._s.store.read() as connection:
            row = own_session(connection, caller, identifier)
        if row.closed_at is None and row.ended_at is None:
            stale = iso(now - timedelta(seconds=self._rules.lease_s / 3))
            if row.seen_at is None or row.seen_at <= stale:
                with self._s.store.write() as tx:
                    tx.connection.execute(sessions.update().where(sessions.c.id == identifier).values(seen_at=iso(now)))
                    # A live session is a use of the sign-in that it was opened with.
                    tx.connection.execute(
                        sso_sessions.update().where(sso_sessions.c.id == row.sso_session).values(seen_at=iso(now))
                    )
            return Watched("open")
        return Watched("ended", row.end_reason or "closed")

    def close(self, caller: Caller, identifier: str, body: Closing) -> dict[str, Any]:
        """Record the end that the recorder reports; the same report again changes nothing."""
        with self._s.store.write() as tx:
            row = own_session(tx.connection, caller, identifier)
            if row.recording_digest is not None or (row.closed_at is not None and row.end_reason != "bastion_lost"):
                return {"changed": False}
            self._close(tx, caller, row, row.end_reason if row.ended_at is not None else body.reason, body)
        return {"changed": True}

    def host_certificate(self, caller: Caller, body: HostKey) -> dict[str, Any]:
        """Certify a bastion's host key under the one name that clients look for."""
        now = self._s.clock()
        _, _, name = caller.principal.partition(":")
        certificate = self._session_ca.issue_host(body.public_key, [BASTION_NAME, name], now)
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.authentication(
                    now,
                    caller.subject(),
                    activity="ticket",
                    protocol="ssh-host-certificate",
                    message=f"host certificate of bastion {name} issued",
                    expires=now + HOST_TTL,
                    detail={"key_sha256": key_digest(body.public_key)},
                )
            )
        return {"certificate": certificate, "session_ca": self._session_ca.user_ca}

    def end(self, caller: Caller, identifier: str, body: EndRequest) -> dict[str, Any]:
        """Tell one session to end, on an operator's word."""
        with self._s.store.write() as tx:
            get_session(tx.connection, identifier)
            ended = self._ends.end(tx, caller, sessions.c.id == identifier, "ended_by_operator", body.reason)
        return {**self.show(identifier), "changed": bool(ended)}

    def show(self, identifier: str) -> dict[str, Any]:
        """Return one session."""
        with self._s.store.read() as connection:
            return session_view(get_session(connection, identifier), self._s.clock())

    def list(
        self,
        workspace: str | None,
        person: str | None = None,
        *,
        live: bool = False,
        after: str = "",
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Return ``{sessions, next}``, the newest first, of one workspace or person or of all; with ``live`` only those that are.

        ``next`` is the ``after`` of the page that follows, None at the end. Without ``limit`` all that live are on one page.
        """
        now = self._s.clock()
        query = select(sessions).where(sessions.c.kind == "bastion")
        if workspace is not None:
            query = query.where(sessions.c.workspace_id == workspace)
        if person is not None:
            query = query.where(sessions.c.person == person)
        if live:
            query = query.where(not_over(now))
        most = limit if live or limit is not None else LARGEST_PAGE
        with self._s.store.read() as connection:
            rows, following = newest_page(connection, query, sessions.c.issued_at, after, most)
        return {"sessions": [session_view(row, now) for row in rows], "next": following}

    def recording_key(self, caller: Caller, identifier: str) -> dict[str, Any]:
        """Hand out the key of one recording, so that it can be played; who asked for it is audited."""
        with self._s.store.write() as tx:
            row = get_session(tx.connection, identifier)
            if row.recording_key is None:
                why = "it was never opened"
                if row.recording_removed_at is not None:
                    why = f"it was removed at {row.recording_removed_at} (sessions.keep_recordings_days)"
                raise ConflictError(f"{identifier} has no recording", cure=why, code="session_not_recorded")
            key = self._vault.open(bound_to(identifier), row.recording_key)
            tx.record(
                self._s.events.api_activity(
                    self._s.clock(),
                    caller.subject(row.workspace_id),
                    "session.replay",
                    activity="read",
                    message="the key of a recording was handed out",
                    resource=("session", identifier),
                    detail={"session": identifier},
                )
            )
        return {"key": key.hex(), "digest": row.recording_digest, "chunks": row.recording_chunks}

    def tick(self) -> None:
        """End what lasts too long or whose person is entitled no more; close what a bastion has not asked about for long."""
        now = self._s.clock()
        opened = (sessions.c.kind == "bastion") & sessions.c.redeemed_at.is_not(None) & sessions.c.closed_at.is_(None)
        with self._s.store.write() as tx:
            self._ends.end(tx, BROKER, opened & (sessions.c.ends_at <= iso(now)), "max_duration")
            theirs = opened & (sessions.c.person != "") & sessions.c.ended_at.is_(None)
            for row in tx.connection.execute(select(sessions).where(theirs)).all():
                workspace = get_row(tx.connection, row.workspace_id)
                barred = self._barred(tx.connection, workspace, row.person, row.sso_session, now)
                if barred is not None:
                    self._ends.end(tx, BROKER, sessions.c.id == row.id, "not_entitled", barred.code)
            # While the broker was away no bastion could ask.
            asked_in_vain = now - self._up_since < self._lost_after
            lost = false() if asked_in_vain else opened & (sessions.c.seen_at <= iso(now - self._lost_after))
            for row in tx.connection.execute(select(sessions).where(lost)).all():
                self._close(tx, BROKER, row, row.end_reason or "bastion_lost", None)

    def _barred(
        self, connection: Connection, workspace: Row[Any], person: str, sign_in: str, now: datetime
    ) -> ForbiddenError | None:
        """Return why nobody, or not this person, may have a session with the workspace now; None when they may."""
        try:
            require_state(workspace, frozenset({State.ACTIVE}))
        except ForbiddenError as error:
            return error
        if not person:
            return None
        known = find_person(connection, person)
        alive = connection.execute(select(sso_sessions).where(sso_sessions.c.id == sign_in)).one_or_none()
        if alive is None or alive.person != person or alive.expires_at <= iso(now):
            return ForbiddenError(f"the sign-in of {person} is over", cure="saw login", code="sign_in_ended")
        if known is None or "user" not in known.roles or known.entitled_until <= iso(now):
            return ForbiddenError(
                f"{person} may open no session", cure="see sso.roles: it takes the role user", code="not_entitled"
            )
        if workspace.sponsor != person:
            return ForbiddenError(
                f"{workspace.id} is not the workspace of {person}", cure="ask its sponsor", code="not_your_workspace"
            )
        return None

    def _unredeemable(
        self, connection: Connection, row: Row[Any] | None, body: Redeem, now: datetime
    ) -> ForbiddenError | ConflictError | None:
        """Return why the session cannot be opened now; None when it can."""
        again = "ask for a new one: saw ssh"
        if row is None or row.key_fingerprint != body.key_sha256:
            return ForbiddenError("there is no such session", cure=again, code="session_unknown")
        if row.redeemed_at is not None:
            return ConflictError(f"{row.id} was used before", cure=again, code="session_used")
        if row.ended_at is not None:
            return ConflictError(f"{row.id} was ended: {row.end_reason}", cure=again, code="session_ended")
        if row.expires_at <= iso(now):
            return ForbiddenError(f"{row.id} was not used in time", cure=again, code="session_expired")
        workspace = connection.execute(select(workspaces).where(workspaces.c.id == row.workspace_id)).one()
        if row.forward_port is not None and (body.command or body.terminal):
            return ForbiddenError(f"{row.id} runs no command", cure="use saw expose", code="forward_alone")
        barred = self._barred(connection, workspace, row.person, row.sso_session, now)
        return barred or self._granted(connection, workspace, row.forward_port, holder(row), now)[1]

    def _granted(
        self, connection: Connection, workspace: Row[Any], port: int | None, asking: str, now: datetime
    ) -> tuple[Row[Any] | None, ForbiddenError | None]:
        """Return the grant of ``port``, or what refuses it; a session without a port takes no grant."""
        if port is None:
            return None, None
        found = self._forwards.require(connection, workspace, port, asking, now)
        return (None, found) if isinstance(found, ForbiddenError) else (found, None)

    def _open(self, tx: Transaction, caller: Caller, row: Row[Any], body: Redeem, now: datetime) -> Granted:
        workspace = get_row(tx.connection, row.workspace_id)
        key = self._s.random(KEY_BYTES)
        ends = now + timedelta(seconds=self._rules.max_duration_s)
        grant, _ = self._granted(tx.connection, workspace, row.forward_port, holder(row), now)
        if grant is not None:
            ends = min(ends, parse_iso(grant.expires_at))
        # The certificate need only last until ssh has logged in; the way there comes from the perimeter's side of the link.
        certificate = self._workspaces_ca.issue_user(
            body.leg_key,
            workspace.id,
            row.id,
            now,
            USER_TTL,
            source_address=workspace_source(self._rules, workspace.number),
            forward=row.forward_port is not None,
        )
        tx.connection.execute(
            sessions.update()
            .where((sessions.c.id == row.id) & sessions.c.redeemed_at.is_(None))
            .values(
                redeemed_at=iso(now),
                seen_at=iso(now),
                ends_at=iso(ends),
                bastion=caller.principal,
                client_address=body.address,
                command=body.command,
                terminal=body.terminal,
                recording_key=self._vault.seal(bound_to(row.id), key),
                forward_grant=None if grant is None else grant.id,
            )
        )
        return Granted(
            session_id=row.id,
            workspace_id=workspace.id,
            number=workspace.number,
            principal=holder(row),
            certificate=certificate,
            host_ca=self._workspaces_ca.host_ca,
            recording_key=key,
            ends_in_s=(ends - now).total_seconds(),
            lease_s=float(self._rules.lease_s),
            forward_port=row.forward_port,
        )

    def _close(self, tx: Transaction, caller: Caller, row: Row[Any], reason: str, said: Closing | None) -> None:
        now = self._s.clock()
        values: dict[str, Any] = {"closed_at": row.closed_at or iso(now), "end_reason": reason}
        if said is not None:
            values |= {
                "exit_code": said.exit_code,
                "bytes_in": said.bytes_in,
                "bytes_out": said.bytes_out,
                "recording_chunks": said.chunks,
                "recording_digest": said.digest,
            }
        tx.connection.execute(sessions.update().where(sessions.c.id == row.id).values(**values))
        self._records.closing(tx, caller, row, reason, said)
        tx.wake(session_key(row.id))


def _forwarded(port: int | None, grant: Row[Any] | None) -> dict[str, object]:
    """Return what an event says of the port that a session is for."""
    return {} if port is None else {"forward_port": port, "forward": "" if grant is None else grant.id}
