"""Sessions of people: a random secret that only its holder has, looked up by its hash, ended by time or by the provider.

A session says who somebody is. What they may do is looked up each time, and the provider is asked again when its word is old.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Select, select

from saw.audit import Subject
from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import BrokerError, StorageFull
from saw.broker.people import Person, PersonRefused, admit, identity_of, no_role
from saw.broker.schema import people, sso_logins, sso_logout_tokens, sso_sessions
from saw.broker.session_ends import SessionEnds
from saw.broker.sso.provider import Provider, ProviderUnavailable, Tokens
from saw.broker.sso.rechecks import NotSignedIn, Rechecks
from saw.broker.sso.sealed import Seal
from saw.broker.sso.sign_outs import PROTOCOL, end_sign_ins
from saw.broker.sso_settings import SsoSettings
from saw.broker.store import Transaction
from saw.identity.oidc import IdToken, TokenRefused

logger = logging.getLogger("saw.broker")

Kind = Literal["browser", "cli"]
SEEN_EVERY = timedelta(seconds=30)
"""How exactly the use of a session is remembered."""
MAX_SESSIONS = 32
"""Most live sessions of one person; the one that was unused longest ends for a new one."""


class Session(msgspec.Struct, frozen=True):
    """A live session: whose it is, and when the person signed in at the provider. ``secret`` is the holder's."""

    id: str
    secret: str
    kind: Kind
    person: Person
    auth_time: datetime
    created_at: str
    checked_at: datetime
    expires_at: str
    acr: str = ""

    @property
    def principal(self) -> str:
        """The person as a principal of audit events."""
        return f"user:{self.person.name}"

    @property
    def csrf(self) -> str:
        """The token that a change has to carry; it belongs to this session alone."""
        mac = hmac.new(self.secret.encode(), b"saw-csrf/1", hashlib.sha256).digest()
        return base64.urlsafe_b64encode(mac).rstrip(b"=").decode()


def new_secret(services: Services) -> str:
    """Return 256 random bits as text."""
    return base64.urlsafe_b64encode(services.random(32)).rstrip(b"=").decode()


def digest_of(secret: str) -> str:
    """Return under which hash ``secret`` is stored."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Sessions:
    """All live sessions (control ID-01)."""

    def __init__(self, services: Services, settings: SsoSettings, provider: Provider, seal: Seal) -> None:
        self._s = services
        self._settings = settings
        self._seal = seal
        self._ends = SessionEnds(services)
        self._checks = Rechecks(services, settings, provider, seal)

    def start(
        self, caller: Caller, kind: Kind, token: IdToken, tokens: Tokens, claims: dict[str, Any], *, old: str = ""
    ) -> Session:
        """Let somebody in whose ID token was verified; ``old`` is the secret of a session that this one takes the place of.

        Raises :class:`PersonRefused`; that is audited too, and takes roles away that the person had.
        """
        now = self._s.clock()
        secret, identifier = new_secret(self._s), self._s.new_id("ss")
        refused: PersonRefused | None = None
        with self._s.store.write() as tx:
            if old:
                self._end(tx, caller, sso_sessions.c.secret_sha256 == digest_of(old), "replaced by a new sign-in")
            name = ""
            try:
                who = identity_of(self._settings, token.sub, claims)
                name = who.name
                person = admit(tx, self._settings, who, now)
                if not person.roles:
                    self._end(tx, caller, sso_sessions.c.person == name, "no_role")
                    refused = no_role(name)
            except PersonRefused as error:
                refused = error
            if refused is None:
                self._without_user(tx, caller, person)
                expires = now + timedelta(seconds=self._settings.session.absolute_s)
                self._make_room(tx, caller, person.name)
                refresh = tokens.refresh_token
                tx.connection.execute(
                    sso_sessions.insert().values(
                        secret_sha256=digest_of(secret),
                        id=identifier,
                        person=person.name,
                        kind=kind,
                        provider_sid=token.sid,
                        auth_time=iso(_signed_in(token)),
                        acr=token.acr,
                        created_at=iso(now),
                        seen_at=iso(now),
                        checked_at=iso(now),
                        expires_at=iso(expires),
                        refresh=None if refresh is None else self._seal.close(identifier, refresh.encode()),
                    )
                )
            self.record_sign_in(tx, caller, name=name, session=identifier, refused=refused, kind=kind)
        if refused is not None:
            raise refused
        return Session(identifier, secret, kind, person, _signed_in(token), iso(now), now, iso(expires), token.acr)

    def record_sign_in(
        self,
        tx: Transaction,
        caller: Caller,
        *,
        name: str,
        session: str,
        refused: BrokerError | TokenRefused | None,
        kind: str,
    ) -> None:
        """Audit a sign-in that worked or was refused."""
        subject = Subject(
            principal=f"user:{name}" if name else caller.principal, request_id=caller.request_id, address=caller.address
        )
        good = refused is None
        tx.record(
            self._s.events.authentication(
                self._s.clock(),
                subject,
                outcome="success" if good else "failure",
                message="signed in" if good else "a sign-in was refused",
                protocol=PROTOCOL,
                session_uid=session if good else "",
                status_detail="" if refused is None else refused.code,
                detail={"kind": kind, "provider": self._settings.provider.issuer},
            )
        )

    def current(self, caller: Caller, secret: str, *, fresh: bool = False) -> Session:
        """Return the live session of ``secret``. The provider is asked again when its word is old, always with ``fresh``.

        On a full disk its word counts all the same (:mod:`saw.broker.sso.rechecks`).

        Raises :class:`NotSignedIn`; :class:`PersonRefused` when the person has no role any more;
        :class:`saw.broker.sso.provider.ProviderUnavailable` when the provider has to be asked and does not answer.
        """
        session = self._find(secret)
        now = self._s.clock()
        if fresh or now - session.checked_at >= timedelta(seconds=self._settings.session.recheck_s):
            self._checks.check(caller, digest_of(secret), fresh=fresh)
            session = self._find(secret)
        return session

    def seen(self, secret: str) -> None:
        """Remember that the session was used."""
        now = self._s.clock()
        mine = sso_sessions.c.secret_sha256 == digest_of(secret)
        with self._s.store.read() as connection:
            seen = connection.execute(select(sso_sessions.c.seen_at).where(mine)).scalar_one_or_none()
        if seen is not None and seen <= iso(now - SEEN_EVERY):
            try:
                with self._s.store.write() as tx:
                    tx.connection.execute(sso_sessions.update().where(mine).values(seen_at=iso(now)))
            except StorageFull:  # people go on to read; without the stamp the session ends sooner, not later
                logger.warning("no room to note that a session was used")

    def sign_out(self, caller: Caller, secret: str) -> None:
        """End the session of ``secret``; one that is not there is nothing to do."""
        with self._s.store.write() as tx:
            self._end(tx, caller, sso_sessions.c.secret_sha256 == digest_of(secret), "signed out")

    def end_by_provider(self, caller: Caller, jti: str, until: float, *, subject: str, sid: str) -> int:
        """End what a logout token names and return how many sessions that were; the token counts once.

        Raises :class:`TokenRefused` when it was used before; :class:`StorageFull` when there is no room to note that: on the full
        disk of a SQLite file the sessions have ended all the same.
        """
        key = hashlib.sha256(jti.encode()).hexdigest()
        used = select(sso_logout_tokens.c.jti_sha256).where(sso_logout_tokens.c.jti_sha256 == key)
        wanted = sso_sessions.c.provider_sid == sid
        if not sid:
            issuer = self._settings.provider.issuer
            named = select(people.c.name).where(people.c.issuer == issuer, people.c.subject == subject)
            wanted = sso_sessions.c.person.in_(named)
        why = "signed out at the provider"
        try:
            with self._s.store.write() as tx:
                _require_unused(tx.connection, used)
                ends = iso(datetime.fromtimestamp(until, self._s.clock().tzinfo))
                tx.connection.execute(sso_logout_tokens.insert().values(jti_sha256=key, expires_at=ends))
                return self._end(tx, caller, wanted, why)
        except StorageFull:
            with self._s.store.read() as connection:
                _require_unused(connection, used)
            self._checks.end_unwritten(caller, wanted, why)
            raise

    def set_challenge(self, session: Session, challenge: str, until: datetime) -> None:
        """Keep the one challenge for a new passkey of this session."""
        with self._s.store.write() as tx:
            tx.connection.execute(
                sso_sessions.update()
                .where(sso_sessions.c.id == session.id)
                .values(challenge=challenge, challenge_until=iso(until))
            )

    def tick(self) -> None:
        """Ask the provider about live sessions whose check is due, and remove what has ended by time."""
        self._checks.write_down()
        now = self._s.clock()
        idle = iso(now - timedelta(seconds=self._settings.session.idle_s))
        over = (sso_sessions.c.expires_at <= iso(now)) | (sso_sessions.c.seen_at <= idle)
        try:
            with self._s.store.write() as tx:
                self._end(tx, BROKER, over, "ended by time")
                tx.connection.execute(sso_logins.delete().where(sso_logins.c.expires_at <= iso(now)))
                tx.connection.execute(sso_logout_tokens.delete().where(sso_logout_tokens.c.expires_at <= iso(now)))
        except StorageFull:  # what has ended counts no more, whether it is removed or not
            logger.warning("no room to remove sessions that have ended")
        for digest in self._checks.due():
            try:
                self._checks.check(BROKER, digest, fresh=False)
            except ProviderUnavailable:
                # Nobody is let in by that: a check that is due refuses the call. The next one would only wait as long.
                break
            except BrokerError:
                continue

    def _find(self, secret: str) -> Session:
        found = self._checks.live(digest_of(secret))
        row, person = found.row, found.person
        if person is None or not person.roles or person.entitled_until <= iso(self._s.clock()):
            raise NotSignedIn("the session has ended", cure="sign in again")
        return Session(
            row.id,
            secret,
            row.kind,
            person,
            parse_iso(row.auth_time),
            row.created_at,
            found.checked_at,
            row.expires_at,
            row.acr,
        )

    def _make_room(self, tx: Transaction, caller: Caller, name: str) -> None:
        query = select(sso_sessions.c.id).where(sso_sessions.c.person == name).order_by(sso_sessions.c.seen_at)
        held = tx.connection.execute(query).scalars().all()
        if len(held) >= MAX_SESSIONS:
            self._end(tx, caller, sso_sessions.c.id == held[0], "too many sessions")

    def _without_user(self, tx: Transaction, caller: Caller, person: Person) -> None:
        """End the sessions with workspaces of somebody who is no user any more, whatever else they are."""
        if "user" not in person.roles:
            self._ends.end_person(tx, caller, person.name, "no_role")

    def _end(self, tx: Transaction, caller: Caller, wanted: Any, why: str) -> int:
        return end_sign_ins(self._s, tx, caller, wanted, why)


def _signed_in(token: IdToken) -> datetime:
    """When the person signed in at the provider; without its word, when the token was issued is not taken for it."""
    return datetime.fromtimestamp(token.auth_time or 0, UTC)


def _require_unused(connection: Connection, used: Select[Any]) -> None:
    if connection.execute(used).first() is not None:
        raise TokenRefused("token_used", "this logout token was used", "send a new one")
