"""Who may see and do what on the pages, by role and by sponsorship; what is not said here is refused."""

from __future__ import annotations

from saw.broker.people import Person
from saw.broker.sso_settings import Role

_EVERYTHING = frozenset({"security", "operator", "auditor"})
INTERVENE: frozenset[Role] = frozenset({"security", "operator"})
"""Roles that cut a workspace off."""
_EXAMINE = frozenset({"security", "auditor"})


def is_sponsor(person: Person, sponsor: str) -> bool:
    """Tell whether ``sponsor``, as a workspace names its own, is this person."""
    return sponsor.strip().casefold() == person.name.casefold()


def sees_everything(person: Person) -> bool:
    """Those whose work it is to look see all workspaces and reviews."""
    return bool(_EVERYTHING & set(person.roles))


def has_workspaces(person: Person) -> bool:
    """Tell whether there is any workspace that the person's roles let them see."""
    return sees_everything(person) or "user" in person.roles


def sees_workspace(person: Person, sponsor: str) -> bool:
    """Users see what they sponsor."""
    return sees_everything(person) or _is_user_of(person, sponsor)


def may_attach(person: Person, sponsor: str) -> bool:
    """The bastion's rule (:mod:`saw.broker.bastion_sessions`), which takes the sponsor's name letter by letter."""
    return "user" in person.roles and sponsor == person.name


def may_intervene(person: Person) -> bool:
    """Cut a workspace off, or end what others have begun."""
    return bool(INTERVENE & set(person.roles))


def may_revoke(person: Person, sponsor: str) -> bool:
    """A sponsor takes back what the own agent was handed: that only narrows."""
    return may_intervene(person) or _is_user_of(person, sponsor)


def may_end(person: Person, holder: str) -> bool:
    """People end their own sessions. ``holder`` is the principal; a sponsor does not end an operator's."""
    return may_intervene(person) or holder == f"user:{person.name}"


def may_replay(person: Person, sponsor: str) -> bool:
    """Recordings are for the sponsor of the workspace and for those who examine what happened."""
    return bool(_EXAMINE & set(person.roles)) or _is_user_of(person, sponsor)


def reads_trail(person: Person) -> bool:
    """The whole trail is for those who examine what happened."""
    return bool(_EXAMINE & set(person.roles))


def _is_user_of(person: Person, sponsor: str) -> bool:
    return "user" in person.roles and is_sponsor(person, sponsor)
