"""Whether a session lives, and what the provider says of it: asked when its word is old, written down, or kept on a full disk.

On the full disk of a SQLite file the word is kept in memory (:mod:`saw.broker.sso.unwritten`) and counts from there as long as
from the database: people go on to read, and the room for kills is left to the kill. Replicas on PostgreSQL keep nothing: what
one of them knew alone would be news to the others.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, StorageFull
from saw.broker.people import Person, PersonRefused, admit, disentitle, entitled, find_person, identity_of, no_role
from saw.broker.schema import sso_sessions
from saw.broker.session_ends import SessionEnds
from saw.broker.sso.claims import person_claims
from saw.broker.sso.provider import Provider, ProviderRefused
from saw.broker.sso.sealed import Seal, SealBroken
from saw.broker.sso.sign_outs import end_sign_ins
from saw.broker.sso.unwritten import Unwritten, Word
from saw.broker.sso_settings import SsoSettings
from saw.broker.store import Transaction
from saw.identity.oidc import TokenRefused

logger = logging.getLogger("saw.broker")

CHECKS_AT_ONCE = 256
"""Most sessions about which the provider is asked in one go; the others are next."""
_LOCKS = 64


class NotSignedIn(BrokerError):
    """No live session is behind the call."""

    code = "not_signed_in"
    status = 401


@dataclass(frozen=True)
class Live:
    """A session that has not ended: its ``row``, and what counts of the person (None: nobody knows them) and of the provider's
    word, whether it is written down or not. ``stored`` is the person as the database has them."""

    row: Row[Any]
    person: Person | None
    stored: Person | None
    checked_at: datetime
    refresh: bytes | None


class Rechecks:
    """The provider's word about all sessions (control ID-01)."""

    def __init__(self, services: Services, settings: SsoSettings, provider: Provider, seal: Seal) -> None:
        self._s = services
        self._settings = settings
        self._provider = provider
        self._seal = seal
        self._ends = SessionEnds(services)
        self._unwritten = Unwritten()
        # A refresh token may be used once: two calls of one session must not both use it.
        self._checking = tuple(threading.Lock() for _ in range(_LOCKS))

    def live(self, digest: str) -> Live:
        """Return the session whose secret has this digest; raise :class:`NotSignedIn` when it has ended."""
        now = self._s.clock()
        held = self._unwritten.held
        with self._s.store.read() as connection:
            row = connection.execute(select(sso_sessions).where(sso_sessions.c.secret_sha256 == digest)).one_or_none()
            stored = None if row is None else find_person(connection, row.person)
        idle = iso(now - timedelta(seconds=self._settings.session.idle_s))
        word = held.words.get(digest)
        if (
            row is None
            or row.expires_at <= iso(now)
            or row.seen_at <= idle
            or (word is not None and word.lost)
            or row.created_at <= held.ended(row.person)
        ):
            raise NotSignedIn("nobody is signed in, or the session has ended", cure="sign in again")
        newest = held.about(row.person)
        person = stored if newest is None or newest.over != stored else self._as_said(newest)
        if word is None:
            return Live(row, person, stored, parse_iso(row.checked_at), row.refresh)
        return Live(row, person, stored, word.at, word.refresh)

    def check(self, caller: Caller, digest: str, *, fresh: bool) -> None:
        """Ask the provider whether somebody still has a role, when its word is old, always with ``fresh``.

        Raises as :meth:`saw.broker.sso.sessions.Sessions.current` does; the session then has ended.
        """
        with self._alone(digest):
            self._check(caller, digest, fresh=fresh)

    def due(self) -> list[str]:
        """Return the digests of sessions that are to be checked now; those whose check was longest ago are first."""
        due = iso(self._s.clock() - timedelta(seconds=self._settings.session.recheck_s))
        held = self._unwritten.held
        wanted = (sso_sessions.c.checked_at <= due) & sso_sessions.c.refresh.is_not(None)
        query = select(sso_sessions.c.checked_at, sso_sessions.c.secret_sha256).where(wanted)
        query = query.order_by(sso_sessions.c.checked_at).limit(CHECKS_AT_ONCE + len(held.words))
        found = []
        with self._s.store.read() as connection:
            for checked_at, digest in connection.execute(query).all():
                word = held.words.get(digest)
                at = checked_at if word is None else iso(word.at)
                if at <= due and (word is None or not (word.lost or word.gone)):
                    found.append((at, digest))
        return [digest for _, digest in sorted(found)[:CHECKS_AT_ONCE]]

    def write_down(self) -> None:
        """Write down what was kept, as far as there is room."""
        for word in sorted(self._unwritten.held.words.values(), key=lambda word: word.at):
            with self._alone(word.digest):
                if self._unwritten.held.words.get(word.digest) is not word:
                    continue
                try:
                    with self._s.store.write() as tx:
                        self._take_late(tx, word)
                except StorageFull:
                    return
                self._unwritten.drop(word)

    def end_unwritten(self, caller: Caller, wanted: ColumnElement[bool], why: str) -> None:
        """There is no room to end the sessions that ``wanted`` selects: they count no more, and end when there is."""
        if self._s.store.shared:
            return
        with self._s.store.read() as connection:
            rows = connection.execute(select(sso_sessions).where(wanted)).all()
        for row in rows:
            self._unwritten.keep(Word(row.secret_sha256, row.person, self._s.clock(), caller, lost=why))

    @contextmanager
    def _alone(self, digest: str) -> Iterator[None]:
        """Let one call of all replicas at a time use the refresh token of a session."""
        with self._checking[int(digest[:8], 16) % _LOCKS], self._s.store.exclusively(f"sso-session {digest}"):
            yield

    def _as_said(self, word: Word) -> Person:
        groups = () if word.who is None else word.who.groups
        roles = () if word.gone else self._settings.roles_of(groups)
        return Person(word.person, groups, roles, iso(word.at + timedelta(seconds=self._settings.session.absolute_s)))

    def _check(self, caller: Caller, digest: str, *, fresh: bool) -> None:
        now = self._s.clock()
        before = self._unwritten.held.words.get(digest)
        found = self.live(digest)
        young = now - found.checked_at < timedelta(seconds=self._settings.session.recheck_s)
        if young and (not fresh or found.refresh is None):
            return
        if found.refresh is None:
            # The provider gives no way to ask: what it said at the sign-in stands until the session ends, but is not fresh.
            if fresh:
                raise NotSignedIn(
                    "the provider's word about you is too old for this", cure="sign in again", code="sign_in_again"
                )
            return
        self._unwritten.require_room(digest)
        word, lost = self._ask(caller, digest, found, now)
        try:
            with self._s.store.write() as tx:
                gone = self._take(tx, word)
        except StorageFull:
            if self._s.store.shared:
                raise
            gone = self._keep(word)
        else:
            if before is not None:
                self._unwritten.drop(before)
        if lost is not None:
            raise NotSignedIn(
                "the provider has ended the session", cure="sign in again", code="session_ended"
            ) from lost
        if gone is not None:
            raise gone

    def _ask(
        self, caller: Caller, digest: str, found: Live, now: datetime
    ) -> tuple[Word, BrokerError | TokenRefused | None]:
        """Use the refresh token. Returns what the provider said, and the error when it speaks for the session no more."""
        row, refresh = found.row, found.refresh or b""
        word = Word(digest, row.person, now, caller, found.stored, refresh=refresh)
        lost: BrokerError | TokenRefused
        try:
            tokens = self._provider.refresh(self._seal.open(row.id, refresh).decode())
            token, claims = person_claims(self._settings, self._provider, tokens, now, nonce=None, max_age_s=None)
        except (ProviderRefused, TokenRefused) as error:
            lost = error
        except SealBroken as error:
            lost = NotSignedIn(error.message, cure=error.cure)
        else:
            if tokens.refresh_token is not None:
                word = replace(word, refresh=self._seal.close(row.id, tokens.refresh_token.encode()))
            try:
                return replace(word, who=identity_of(self._settings, token.sub, claims)), None
            except PersonRefused as error:
                return replace(word, refused=error), None
        return replace(word, lost=lost.code), lost

    def _keep(self, word: Word) -> PersonRefused | None:
        """Keep what there is no room for; return why the person may not come in any more."""
        with self._s.store.read() as connection:
            gone = None if word.lost else self._refusal(connection, word)
        self._unwritten.keep(word if gone is None else replace(word, gone=gone.code, refused=None))
        logger.warning("no room for what the provider says of a session: it is kept in memory until there is")
        return gone

    def _take(self, tx: Transaction, word: Word) -> PersonRefused | None:
        """Write down what the provider has just said; return why the person may not come in any more."""
        if word.lost:
            self._end_lost(tx, word, last=True)
            return None
        gone = self._admitted(tx, word)
        if gone is None:
            self._note(tx, word)
        else:
            end_sign_ins(self._s, tx, word.caller, sso_sessions.c.person == word.person, gone.code)
        return gone

    def _take_late(self, tx: Transaction, word: Word) -> None:
        """Write down what was kept. What the database says of the person since is newer, and sessions begun since are others."""
        stored = find_person(tx.connection, word.person)
        if word.lost:
            self._end_lost(tx, word, last=stored == word.over)
            return
        newest = self._unwritten.held.about(word.person) or word
        gone = None
        if stored == newest.over and (newest.who is None or newest.who.name == word.person):
            gone = self._admitted(tx, newest)
        why = word.gone or newest.gone or ("" if gone is None else gone.code)
        if why:
            theirs = (sso_sessions.c.person == word.person) & (sso_sessions.c.created_at <= iso(word.at))
            end_sign_ins(self._s, tx, word.caller, theirs, why)
        else:
            self._note(tx, word)

    def _refusal(self, connection: Connection, word: Word) -> PersonRefused | None:
        """Return why ``word`` does not let the person come in, None where it does."""
        if word.who is None:
            return word.refused
        try:
            person = entitled(connection, self._settings, word.who, word.at)
        except PersonRefused as error:
            return error
        if not person.roles:
            return no_role(person.name)
        if person.name != word.person:
            return PersonRefused("the session is another person's", cure="sign in again")
        return None

    def _admitted(self, tx: Transaction, word: Word) -> PersonRefused | None:
        """Store what ``word`` says of the person; return why they may not come in."""
        gone = self._refusal(tx.connection, word)
        try:
            person = None if word.who is None else admit(tx, self._settings, word.who, word.at)
        except PersonRefused:
            person = None
        if person is None:
            disentitle(tx.connection, word.person, word.at)
        elif "user" not in person.roles:  # their sessions with workspaces end, whatever else they are
            self._ends.end_person(tx, word.caller, person.name, "no_role")
        return gone

    def _note(self, tx: Transaction, word: Word) -> None:
        mine = sso_sessions.c.secret_sha256 == word.digest
        tx.connection.execute(sso_sessions.update().where(mine).values(checked_at=iso(word.at), refresh=word.refresh))

    def _end_lost(self, tx: Transaction, word: Word, *, last: bool) -> None:
        """End the session; with ``last`` the person has no role either when it was the last one."""
        end_sign_ins(self._s, tx, word.caller, sso_sessions.c.secret_sha256 == word.digest, word.lost)
        others = select(sso_sessions.c.id).where(sso_sessions.c.person == word.person)
        if last and tx.connection.execute(others).first() is None:
            disentitle(tx.connection, word.person, word.at)
