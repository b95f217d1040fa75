"""Who has which role here: people as the identity provider told last, and programs as the configuration names them.

Of the groups of a person only those are told that mean something to this configuration: what else a provider knows of
somebody is nobody's business here. Nothing here changes anything.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, func, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.config import BrokerConfig
from saw.broker.context import Services
from saw.broker.schema import passkeys, people, sponsors, sso_sessions
from saw.broker.sponsor_states import sponsor_key
from saw.broker.sso_settings import ROLES, Role

PAGE = 50
"""People in one page."""


class FleetPeople:
    """Reads for the pages of the installation."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def listed(self, search: str, role: Role | None, after: str) -> dict[str, Any]:
        """Return a page of people by name, behind ``after``; ``next`` is the name to go on behind, empty at the end.

        ``search`` is a part of the name. ``role``: those whom the provider's last word gave it. ``counts`` tells whether that
        word is still good; without it nobody has any role.
        """
        query = select(people).where(people.c.name > after).order_by(people.c.name).limit(PAGE + 1)
        if search:
            query = query.where(people.c.name.icontains(search, autoescape=True))
        if role is not None:
            query = query.where(people.c.roles.contains(f'"{role}"', autoescape=True))
        now = iso(self._s.clock())
        named = groups_of(self._s.config)
        with self._s.store.read() as connection:
            rows = connection.execute(query).all()
            more, rows = len(rows) > PAGE, rows[:PAGE]
            names = [row.name for row in rows]
            signed_in = _signed_in(connection, names, now)
            keys = _passkeys(connection, names)
            disabled = _disabled(connection, names)
        found = []
        for row in rows:
            groups = jsontext.decode(row.groups, kind=tuple[str, ...])
            known = [group for group in groups if group in named]
            found.append(
                {
                    "name": row.name,
                    "roles": jsontext.decode(row.roles, kind=tuple[Role, ...]),
                    "groups": known,
                    "other_groups": len(groups) - len(known),
                    "first_seen_at": row.first_seen_at,
                    "checked_at": row.checked_at,
                    "entitled_until": row.entitled_until,
                    "counts": row.entitled_until > now,
                    "sign_ins": signed_in.get(row.name, 0),
                    "passkeys": keys.get(row.name, 0),
                    "disabled": sponsor_key(row.name) in disabled,
                }
            )
        return {"people": found, "next": rows[-1].name if more else ""}

    def rules(self) -> dict[str, Any]:
        """Return what the configuration says: which groups have which role, who decides, and which programs may do what."""
        config = self._s.config
        glass = config.break_glass
        return {
            "roles": [(role, config.sso.roles.get(role, ()) if config.sso else ()) for role in ROLES],
            "gate_groups": sorted({gate.group for gate in config.gates.values()}),
            "glass_group": None if glass is None else glass.group,
            "machines": sorted(config.machines.items()),
        }


def groups_of(config: BrokerConfig) -> frozenset[str]:
    """Return the groups that ``config`` names: those with a role, those that decide at gates, the one that breaks the glass."""
    given = {group for groups in (config.sso.roles.values() if config.sso else ()) for group in groups}
    deciding = {gate.group for gate in config.gates.values()}
    glass = set() if config.break_glass is None else {config.break_glass.group}
    return frozenset(given | deciding | glass)


def _signed_in(connection: Connection, names: list[str], now: str) -> dict[str, int]:
    query = (
        select(sso_sessions.c.person, func.count())
        .where(sso_sessions.c.person.in_(names), sso_sessions.c.expires_at > now)
        .group_by(sso_sessions.c.person)
    )
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def _passkeys(connection: Connection, names: list[str]) -> dict[str, int]:
    query = (
        select(passkeys.c.person, func.count())
        .where(passkeys.c.person.in_(names), passkeys.c.removed_at.is_(None))
        .group_by(passkeys.c.person)
    )
    return {row[0]: int(row[1]) for row in connection.execute(query)}


def _disabled(connection: Connection, names: list[str]) -> frozenset[str]:
    keys = {sponsor_key(name) for name in names}
    query = select(sponsors.c.name).where(sponsors.c.name.in_(keys), sponsors.c.state == "disabled")
    return frozenset(connection.execute(query).scalars())
