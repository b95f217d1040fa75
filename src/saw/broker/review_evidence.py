"""What makes a decision count: the signature of a registered key, or of a passkey of somebody who is signed in.

Both are over the same statement, and both are looked at again when a call is claimed: an approval counts while it could be
given now.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.errors import BrokerError, ForbiddenError
from saw.broker.people import find_person, may_approve
from saw.broker.reviewers import is_self_approval, may_decide
from saw.broker.schema import passkeys, review_decisions, reviewers
from saw.broker.sponsor_states import is_disabled
from saw.policy.errors import KeyFileError
from saw.policy.keys import parse_public_key
from saw.review.passkey import Assertion, verify_by_passkey
from saw.review.receipt import SignedDecision
from saw.review.statement import MAX_STATEMENT, Decision, ReviewStatement, StatementRefused, verify_review


class Decide(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A statement in canonical form (:mod:`saw.review.statement`) and the signature over it, hexadecimal."""

    statement: Annotated[str, msgspec.Meta(max_length=MAX_STATEMENT)]
    signature: Annotated[str, msgspec.Meta(max_length=512)]


class DecideByPasskey(msgspec.Struct, frozen=True):
    """A statement in canonical form and what the authenticator answered; ``person`` is whose session brought it.
    ``signed_in``: what the provider said of that sign-in, its ``acr`` and when it was."""

    person: str
    statement: str
    assertion: Assertion
    signed_in: tuple[str, datetime]


class Proof(msgspec.Struct, frozen=True):
    """A decision's signature as it is stored; ``passkey`` and ``sign_count`` are None for a registered key; ``acr``: how
    strong the sign-in was, empty where nobody said."""

    kind: str
    signature: str
    public_key: str
    key_sha256: str
    passkey: str | None = None
    sign_count: int | None = None
    acr: str = ""


def in_group(connection: Connection, name: str, group: str, now: datetime, *, passkey: bool) -> bool:
    """Tell whether ``name`` decides for ``group`` at ``now``, as a registered reviewer or as somebody who signs in; a person
    who is disabled as a sponsor decides nothing."""
    if is_disabled(connection, name):
        return False
    if passkey:
        person = find_person(connection, name)
        return person is not None and may_approve(person, group, now)
    row = connection.execute(select(reviewers).where(reviewers.c.name == name)).one_or_none()
    return row is not None and may_decide(row, group)


def prove(connection: Connection, said: ReviewStatement, body: Decide | DecideByPasskey) -> Proof:
    """Return the proof in ``body``; raise :class:`BrokerError` unless it is by a key that ``said.approver`` has now.

    For a passkey that is whoever is signed in: the caller has compared the two.
    """
    try:
        if isinstance(body, Decide):
            person = connection.execute(select(reviewers).where(reviewers.c.name == said.approver)).one()
            key = parse_public_key(person.public_key.encode(), person.name)
            verify_review(body.statement.encode(), body.signature, key)
            return Proof("key", body.signature, person.public_key, person.key_sha256)
        held = _held(connection, body.assertion.credential_id, said.approver)
        if held is None:
            raise _refused("this passkey is not registered, or not yours", "register it on the page of your passkeys")
        key = parse_public_key(held.public_key.encode(), "of a passkey")
        _, count = verify_by_passkey(body.statement.encode(), body.assertion, key, sign_count=held.sign_count)
    except StatementRefused as error:
        raise _refused(error.message, error.cure) from error
    raw = msgspec.json.encode(body.assertion).decode()
    return Proof("passkey", raw, held.public_key, held.key_sha256, held.id, count, body.signed_in[0])


def use_passkey(connection: Connection, proof: Proof, now: datetime) -> None:
    """Remember the authenticator's counter, so that the same answer never counts a second time."""
    if proof.passkey is not None:
        values = {"sign_count": proof.sign_count, "used_at": iso(now)}
        connection.execute(passkeys.update().where(passkeys.c.id == proof.passkey).values(**values))


def signed_decision(row: Row[Any]) -> SignedDecision:
    """Return a stored decision as a receipt carries it."""
    how: dict[str, Any] = {"signature": row.signature}
    if row.kind == "passkey":
        how = {"passkey": jsontext.decode(row.signature, kind=Assertion)}
    return SignedDecision(statement=row.statement, public_key=row.public_key, decided_at=row.decided_at, **how)


def counting(
    connection: Connection, review: Row[Any], now: datetime, *, decision: Decision = "approve", group: str = ""
) -> dict[str, Row[Any]]:
    """Return the approvals of ``review`` that count at ``now``, by approver; everything about them is looked at again.

    An approval counts while its signature holds under a key that its approver has now, it is about this very request,
    policy and text, it has not ended, and its approver is active, in the group, and not the sponsor. ``decision`` asks for
    another one in favour, ``group`` for one by people of another group than the review's.
    """
    group = group or review.group_name
    query = select(review_decisions).where(
        review_decisions.c.review_id == review.id, review_decisions.c.decision == decision
    )
    found: dict[str, Row[Any]] = {}
    for row in connection.execute(query.order_by(review_decisions.c.id)).all():
        by_passkey = row.kind == "passkey"
        if is_self_approval(review, row.approver):
            continue
        if not in_group(connection, row.approver, group, now, passkey=by_passkey):
            continue
        try:
            said = _said(connection, row)
        except (StatementRefused, KeyFileError, msgspec.DecodeError):
            continue
        wanted = (review.id, review.request_digest, review.policy_digest, decision, row.approver)
        if said is None or said.not_after <= iso(now):
            continue
        # What was shown has changed since: it was another text that this person approved.
        if review.render_digest and said.render_digest != review.render_digest:
            continue
        if (said.review, said.request_digest, said.policy_digest, said.decision, said.approver) == wanted:
            found[row.approver] = row
    return found


def _said(connection: Connection, row: Row[Any]) -> ReviewStatement | None:
    """Return the statement of a stored decision, verified under the key that its approver has now."""
    if row.kind != "passkey":
        query = select(reviewers.c.public_key).where(reviewers.c.name == row.approver)
        key = parse_public_key(connection.execute(query).scalar_one().encode(), "of a reviewer")
        return verify_review(row.statement.encode(), row.signature, key)
    assertion = jsontext.decode(row.signature, kind=Assertion)
    held = _held(connection, assertion.credential_id, row.approver)
    if held is None:
        return None
    key = parse_public_key(held.public_key.encode(), "of a passkey")
    return verify_by_passkey(row.statement.encode(), assertion, key)[0]


def _held(connection: Connection, credential_id: str, person: str) -> Row[Any] | None:
    mine = (passkeys.c.credential_id == credential_id) & (passkeys.c.person == person)
    return connection.execute(select(passkeys).where(mine, passkeys.c.removed_at.is_(None))).one_or_none()


def _refused(message: str, cure: str) -> BrokerError:
    return ForbiddenError(message, cure=cure, code="signature_refused")
