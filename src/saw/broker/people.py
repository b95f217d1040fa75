"""People as the identity provider tells them: a name, groups, and the roles that the configuration gives to the groups.

What is stored is the provider's last word and how long it counts. Nothing here is entered by an operator.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.errors import ForbiddenError
from saw.broker.reviewer_names import ReviewerName
from saw.broker.schema import people, reviewers
from saw.broker.sponsor_states import is_disabled
from saw.broker.sso_settings import Role, SsoSettings
from saw.broker.store import Store, Transaction

MAX_GROUPS = 512
"""Most groups of one person that are read."""


class Identity(msgspec.Struct, frozen=True):
    """Somebody as the provider says: its ``subject`` never changes hands, the name is what policy and sponsors use."""

    issuer: str
    subject: str
    name: str
    groups: tuple[str, ...]


class Person(msgspec.Struct, frozen=True):
    """Somebody who may sign in; ``entitled_until`` is when the provider must have been asked again."""

    name: str
    groups: tuple[str, ...]
    roles: tuple[Role, ...]
    entitled_until: str


class PersonRefused(ForbiddenError):
    """The provider knows somebody who may not come in here."""

    code = "person_refused"


def identity_of(settings: SsoSettings, subject: str, claims: Mapping[str, Any]) -> Identity:
    """Return who ``claims`` (of an ID token or of userinfo) are about; raise :class:`PersonRefused` for one without a name."""
    wanted = settings.provider
    name = claims.get(wanted.name_claim)
    if wanted.name_claim == "email" and claims.get("email_verified") is not True:
        raise PersonRefused(
            "the provider has not verified the e-mail address of this person",
            cure="have it verified there, or set sso.provider.name_claim to another claim",
            code="email_not_verified",
        )
    try:
        name = msgspec.convert(name.strip().lower() if isinstance(name, str) else name, ReviewerName)
    except msgspec.ValidationError as error:
        raise PersonRefused(
            f"the claim {wanted.name_claim} is not a name that can be used here",
            cure="let the provider send one, such as an e-mail address, and ask for its scope in sso.provider.scopes",
            code="no_name",
        ) from error
    given = claims.get(wanted.groups_claim, [])
    groups = [given] if isinstance(given, str) else given
    if not isinstance(groups, list) or len(groups) > MAX_GROUPS:
        raise PersonRefused(
            f"the claim {wanted.groups_claim} is no list of at most {MAX_GROUPS} groups",
            cure="let the provider send the groups that matter here",
            code="groups_refused",
        )
    usable = {item for item in groups if isinstance(item, str) and 0 < len(item) <= 255 and item.isprintable()}
    return Identity(wanted.issuer, subject, name, tuple(sorted(usable)))


def entitled(connection: Connection, settings: SsoSettings, who: Identity, now: datetime) -> Person:
    """Return the person that the provider's word about ``who`` makes, without storing it; they may have no role left.

    Raises :class:`PersonRefused` when name or subject is another's, or the person may not come in whatever the provider says.
    """
    same = connection.execute(select(people).where(people.c.name == who.name)).one_or_none()
    holder = connection.execute(
        select(people).where(people.c.issuer == who.issuer, people.c.subject == who.subject)
    ).one_or_none()
    if (same is not None and (same.issuer, same.subject) != (who.issuer, who.subject)) or (
        holder is not None and holder.name != who.name
    ):
        raise PersonRefused(
            f"the name {who.name} and this account of the provider do not belong together here",
            cure="an account keeps its name, and a name its account: give the person a new account with a new name",
            code="name_taken",
        )
    retired = connection.execute(select(reviewers.c.state).where(reviewers.c.name == who.name)).scalar_one_or_none()
    if retired == "retired":
        raise PersonRefused(
            f"{who.name} is a retired reviewer", cure="a retired name does not come back", code="person_retired"
        )
    if is_disabled(connection, who.name):
        raise PersonRefused(
            f"{who.name} is disabled as a sponsor",
            cure="the operator tells why (saw sponsor show), and can take it back",
            code="sponsor_disabled",
        )
    until = iso(now + timedelta(seconds=settings.session.absolute_s))
    return Person(who.name, who.groups, settings.roles_of(who.groups), until)


def admit(tx: Transaction, settings: SsoSettings, who: Identity, now: datetime) -> Person:
    """Store the provider's word about ``who`` and return the person. Raises as :func:`entitled` does; nothing is stored then."""
    person = entitled(tx.connection, settings, who, now)
    values = {
        "groups": msgspec.json.encode(person.groups).decode(),
        "roles": msgspec.json.encode(person.roles).decode(),
        "checked_at": iso(now),
        "entitled_until": person.entitled_until,
    }
    if find_person(tx.connection, who.name) is None:
        new = {"name": who.name, "issuer": who.issuer, "subject": who.subject, "first_seen_at": iso(now)}
        tx.connection.execute(people.insert().values(**new, **values))
    else:
        tx.connection.execute(people.update().where(people.c.name == who.name).values(**values))
    return person


def no_role(name: str) -> PersonRefused:
    """Return the refusal of somebody whose groups give no role."""
    return PersonRefused(
        f"no group of {name} has a role here", cure="see sso.roles (role variable broker_sso)", code="no_role"
    )


def disentitle(connection: Connection, name: str, now: datetime) -> None:
    """The provider no longer speaks for ``name``: groups and roles are gone until the next sign-in."""
    values = {"groups": "[]", "roles": "[]", "checked_at": iso(now), "entitled_until": iso(now)}
    connection.execute(people.update().where(people.c.name == name).values(**values))


def find_person(connection: Connection, name: str) -> Person | None:
    """Return the person ``name``, or None."""
    row = connection.execute(select(people).where(people.c.name == name)).one_or_none()
    return None if row is None else _person(row)


def may_approve(person: Person, group: str, now: datetime) -> bool:
    """Tell whether somebody decides for ``group`` at ``now``: role approver, in the group, and the provider's word is fresh."""
    return "approver" in person.roles and group in person.groups and person.entitled_until > iso(now)


def map_again(store: Store, settings: SsoSettings | None) -> None:
    """Give everybody the roles of the present configuration; without one, nobody has any."""
    with store.read() as connection:
        rows = connection.execute(select(people)).all()
    wanted = {row.name: settings.roles_of(_person(row).groups) if settings else () for row in rows}
    changed = {row.name: wanted[row.name] for row in rows if _person(row).roles != wanted[row.name]}
    if changed:
        with store.write() as tx:
            for name, roles in changed.items():
                raw = msgspec.json.encode(roles).decode()
                tx.connection.execute(people.update().where(people.c.name == name).values(roles=raw))


def _person(row: Row[Any]) -> Person:
    return Person(
        row.name,
        jsontext.decode(row.groups, kind=tuple[str, ...]),
        jsontext.decode(row.roles, kind=tuple[Role, ...]),
        row.entitled_until,
    )
