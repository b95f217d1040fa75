"""Passkeys of people: registered soon after a sign-in, with the person verified, audited, and never another person's."""

from __future__ import annotations

import base64
import hashlib
from datetime import timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, func, select
from webauthn import generate_registration_options, options_to_json, verify_registration_response
from webauthn.helpers.exceptions import WebAuthnException
from webauthn.helpers.structs import (
    AuthenticatorSelectionCriteria,
    PublicKeyCredentialDescriptor,
    ResidentKeyRequirement,
    UserVerificationRequirement,
)

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, NotFoundError
from saw.broker.people import find_person
from saw.broker.review_evidence import DecideByPasskey
from saw.broker.schema import passkeys, reviewers, sso_sessions
from saw.broker.sso.sessions import Session, Sessions
from saw.broker.sso_settings import SsoSettings
from saw.broker.store import Transaction
from saw.policy.keys import public_pem, raw_public
from saw.review.decide import ends_at
from saw.review.passkey import ALGORITHMS, Assertion, PasskeyRefused, challenge_of, public_key_of
from saw.review.statement import Decision, ReviewStatement, encode_statement

FRESH_FOR = timedelta(minutes=5)
"""How long after a sign-in at the provider a passkey can be registered or removed."""
CHALLENGE_FOR = timedelta(minutes=5)
MAX_PASSKEYS = 10
"""Most passkeys of one person at a time."""

Label = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+\Z")]
B64 = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]+\Z", max_length=32_768)]


class NewCredential(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ``navigator.credentials.create`` gave, base64url, and what the person calls it."""

    id: B64
    attestation_object: B64
    client_data: B64
    label: Label


class Answered(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statement that was decided on, and what ``navigator.credentials.get`` gave for it, base64url."""

    statement: Annotated[str, msgspec.Meta(max_length=8192)]
    id: B64
    authenticator_data: B64
    client_data: B64
    signature: B64


class Passkeys:
    """The register of passkeys (control REV-02)."""

    def __init__(self, services: Services, settings: SsoSettings, sessions: Sessions) -> None:
        self._s = services
        self._settings = settings
        self._sessions = sessions

    def mine(self, person: str) -> list[dict[str, Any]]:
        """Return the passkeys of a person that count."""
        with self._s.store.read() as connection:
            return [
                {name: row._mapping[name] for name in ("id", "label", "key_sha256", "added_at", "used_at")}  # noqa: SLF001
                for row in _active(connection, person)
            ]

    def options(self, session: Session) -> dict[str, Any]:
        """Return what a browser needs to make a passkey; the challenge is good once, for this session."""
        self.require_fresh(session)
        challenge = self._s.random(32)
        self._sessions.set_challenge(session, _b64(challenge), self._s.clock() + CHALLENGE_FOR)
        with self._s.store.read() as connection:
            held = [
                PublicKeyCredentialDescriptor(id=_raw(row.credential_id))
                for row in _active(connection, session.person.name)
            ]
        options = generate_registration_options(
            rp_id=self._settings.passkey_domain,
            rp_name="Secure Agent Workspace",
            user_name=session.person.name,
            user_id=hashlib.sha256(session.person.name.encode()).digest(),
            challenge=challenge,
            authenticator_selection=AuthenticatorSelectionCriteria(
                resident_key=ResidentKeyRequirement.PREFERRED, user_verification=UserVerificationRequirement.REQUIRED
            ),
            exclude_credentials=held,
            supported_pub_key_algs=list(ALGORITHMS),
        )
        found: dict[str, Any] = jsontext.decode(options_to_json(options))
        return found

    def register(self, caller: Caller, session: Session, body: NewCredential) -> dict[str, Any]:
        """Take a new passkey. Refusals are audited; the challenge is gone whatever comes of it."""
        self.require_fresh(session)
        now = self._s.clock()
        refused: BrokerError | None = None
        with self._s.store.write() as tx:
            there = sso_sessions.c.id == session.id
            row = tx.connection.execute(select(sso_sessions).where(there)).one_or_none()
            tx.connection.execute(sso_sessions.update().where(there).values(challenge=None, challenge_until=None))
            try:
                if row is None or row.challenge is None or row.challenge_until <= iso(now):
                    raise ForbiddenError(
                        "the challenge of this registration has ended or was used",
                        cure="begin again",
                        code="challenge_refused",
                    )
                identifier, print_ = self._take(tx, session, body, row.challenge)
            except BrokerError as error:
                refused, print_ = error, ""
            self._record(
                tx,
                caller,
                session,
                text="a passkey was registered",
                activity="create",
                refused=refused,
                told={"label": body.label, "key_sha256": print_},
            )
        if refused is not None:
            raise refused
        return {"id": identifier, "key_sha256": print_}

    def remove(self, caller: Caller, session: Session, identifier: str) -> None:
        """Take a passkey out of use: what it approved and was not claimed yet no longer counts."""
        self.require_fresh(session)
        there = (
            (passkeys.c.id == identifier) & (passkeys.c.person == session.person.name) & passkeys.c.removed_at.is_(None)
        )
        with self._s.store.write() as tx:
            row = tx.connection.execute(select(passkeys).where(there)).one_or_none()
            if row is None:
                raise NotFoundError(
                    "there is no such passkey of yours", cure="see your passkeys", code="unknown_passkey"
                )
            tx.connection.execute(passkeys.update().where(there).values(removed_at=iso(self._s.clock())))
            told = {"label": row.label, "key_sha256": row.key_sha256}
            self._record(tx, caller, session, text="a passkey was removed", activity="delete", refused=None, told=told)

    def request(
        self, shown: dict[str, Any], given: dict[str, Any], session: Session, decision: Decision, comment: str
    ) -> dict[str, Any]:
        """Return the statement to decide on, and what a browser needs to have it signed with one of the person's passkeys."""
        statement = ReviewStatement(
            review=shown["id"],
            request_digest=shown["request_digest"],
            render_digest=shown["render_digest"],
            policy_digest=shown["policy_digest"],
            decision=decision,
            approver=session.person.name,
            nonce=given["nonce"],
            not_after=ends_at(decision, shown, given),
            comment=comment,
        )
        raw = encode_statement(statement)
        with self._s.store.read() as connection:
            held = [row.credential_id for row in _active(connection, session.person.name)]
        if not held:
            raise ConflictError(
                "you have no passkey", cure="register one on the page of your passkeys", code="no_passkey"
            )
        return {
            "statement": raw.decode(),
            "challenge": _b64(challenge_of(raw)),
            "rp_id": self._settings.passkey_domain,
            "credentials": held,
        }

    def evidence(self, session: Session, body: Answered) -> DecideByPasskey:
        """Return an answer as evidence: domain and origin are the configuration's, not the browser's word."""
        try:
            assertion = msgspec.convert(
                {
                    "credential_id": body.id,
                    "authenticator_data": body.authenticator_data,
                    "client_data": body.client_data,
                    "signature": body.signature,
                    "rp_id": self._settings.passkey_domain,
                    "origin": self._settings.origin,
                },
                Assertion,
            )
        except msgspec.ValidationError as error:
            raise ForbiddenError(
                f"the passkey's answer is not valid: {error}", cure="decide again", code="signature_refused"
            ) from error
        return DecideByPasskey(session.person.name, body.statement, assertion, (session.acr, session.auth_time))

    def require_fresh(self, session: Session) -> None:
        """Raise ``sign_in_again`` unless the person has signed in at the provider within :data:`FRESH_FOR`."""
        if not self.is_fresh(session):
            raise ForbiddenError(
                "you signed in too long ago for this", cure="sign in again, then repeat it", code="sign_in_again"
            )

    def is_fresh(self, session: Session) -> bool:
        """Tell whether the sign-in of ``session`` is recent."""
        return self._s.clock() - session.auth_time <= FRESH_FOR

    def _take(self, tx: Transaction, session: Session, body: NewCredential, challenge: str) -> tuple[str, str]:
        name, connection = session.person.name, tx.connection
        credential = {
            "id": body.id,
            "rawId": body.id,
            "type": "public-key",
            "response": {"attestationObject": body.attestation_object, "clientDataJSON": body.client_data},
        }
        try:
            found = verify_registration_response(
                credential=credential,
                expected_challenge=_raw(challenge),
                expected_rp_id=self._settings.passkey_domain,
                expected_origin=self._settings.origin,
                require_user_verification=True,
                supported_pub_key_algs=list(ALGORITHMS),
            )
            key = public_key_of(found.credential_public_key)
        except PasskeyRefused as error:
            raise ForbiddenError(error.message, cure=error.cure, code=error.code) from error
        except (WebAuthnException, ValueError, TypeError, KeyError) as error:
            raise ForbiddenError(
                f"the passkey is refused: {error}", cure="begin again", code="passkey_refused"
            ) from error
        print_, identifier = hashlib.sha256(raw_public(key)).hexdigest(), self._s.new_id("pk")
        person = find_person(connection, name)
        if person is None or not person.roles:
            raise ForbiddenError(f"{name} has no role any more", cure="sign in again", code="no_role")
        known = passkeys.c.credential_id == _b64(found.credential_id)
        same = connection.execute(select(passkeys.c.id).where(known | (passkeys.c.key_sha256 == print_))).first()
        other = connection.execute(select(reviewers.c.name).where(reviewers.c.key_sha256 == print_)).first()
        if same is not None or other is not None:
            raise ConflictError("this passkey is registered already", cure="use another one", code="key_in_use")
        count = (
            select(func.count()).select_from(passkeys).where(passkeys.c.person == name, passkeys.c.removed_at.is_(None))
        )
        if connection.execute(count).scalar_one() >= MAX_PASSKEYS:
            raise ConflictError(f"you have {MAX_PASSKEYS} passkeys", cure="remove one first", code="too_many_passkeys")
        connection.execute(
            passkeys.insert().values(
                id=identifier,
                person=name,
                credential_id=_b64(found.credential_id),
                label=body.label,
                public_key=public_pem(key).decode(),
                key_sha256=print_,
                sign_count=found.sign_count,
                added_at=iso(self._s.clock()),
            )
        )
        return identifier, print_

    def _record(
        self,
        tx: Transaction,
        caller: Caller,
        session: Session,
        *,
        text: str,
        activity: Any,
        refused: BrokerError | None,
        told: dict[str, str],
    ) -> None:
        detail: dict[str, object] = {**told, "session": session.id}
        if refused is not None:
            text, detail["reason"] = "a passkey was refused", refused.code
        tx.record(
            self._s.events.account_change(
                self._s.clock(),
                caller.subject(),
                session.person.name,
                activity=activity,
                outcome="success" if refused is None else "failure",
                message=text,
                detail=detail,
            )
        )


def _active(connection: Connection, person: str) -> list[Row[Any]]:
    query = select(passkeys).where(passkeys.c.person == person, passkeys.c.removed_at.is_(None))
    return list(connection.execute(query.order_by(passkeys.c.added_at)).all())


def _b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _raw(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
