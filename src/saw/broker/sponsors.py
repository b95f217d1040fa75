"""The register of sponsors: the people on whose behalf agents act, and the switch for one who left.

A sponsor is whoever a workspace or an agent names. Disabled, nothing goes on and nothing begins on that person's behalf: all of
it in one transaction, so that nobody finds half of it done.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import Connection, select
from starlette.datastructures import QueryParams

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegation_ends import DelegationEnds
from saw.broker.errors import ConflictError, NotFoundError
from saw.broker.http import filters_of
from saw.broker.idempotency import Version
from saw.broker.lifecycle import State
from saw.broker.people import disentitle
from saw.broker.registry import Registry
from saw.broker.schema import agents, delegations, people, registry, reviewers, sponsors, sso_sessions, workspaces
from saw.broker.session_ends import SessionEnds
from saw.broker.sponsor_states import SponsorState, sponsor_key
from saw.broker.sso.sign_outs import end_sign_ins
from saw.broker.store import Transaction
from saw.broker.wake import SPONSORS

LARGEST_PAGE = 1000
_TOLD = 64
"""Most ids that one event names."""

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class SwitchSponsor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why a sponsor is disabled or enabled. ``version``, where given, is the one that the caller has seen."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    version: Version | None = None


class Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Filters of the list; ``after`` is the name that the page begins behind."""

    state: str = ""
    text: Annotated[str, msgspec.Meta(max_length=256)] = ""
    after: Annotated[str, msgspec.Meta(max_length=256)] = ""
    limit: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_PAGE)] = LARGEST_PAGE


def wanted(query: QueryParams) -> Wanted:
    """Return what ``query`` asks for; raises as :func:`saw.broker.http.filters_of`."""
    return filters_of(query, Wanted, (), "see docs/agents.md")


class Sponsors:
    """Sponsors as operators use them (control ID-04)."""

    def __init__(self, services: Services, registry: Registry) -> None:
        self._s = services
        self._registry = registry
        self._delegations = DelegationEnds(services)
        self._sessions = SessionEnds(services)

    def listed(self, asked: Wanted) -> dict[str, Any]:
        """Return ``{sponsors, next, seq}`` in the order of names: everybody whom a workspace, an agent or a decision names.

        Behind ``seq`` :func:`saw.broker.sponsor_list.changes` goes on.
        """
        with self._s.store.read() as connection:
            seq = connection.execute(select(registry.c.seq)).scalar_one()
            found = sorted(views_of(connection).items())
        text = asked.text.casefold()
        chosen = [
            view
            for key, view in found
            if key > sponsor_key(asked.after) and asked.state in ("", view["state"]) and text in key
        ]
        more = len(chosen) > asked.limit
        chosen = chosen[: asked.limit]
        return {"sponsors": chosen, "next": chosen[-1]["name"] if more else None, "seq": seq}

    def show(self, name: str) -> dict[str, Any]:
        """Return one sponsor; raise :class:`NotFoundError` for a name that nothing names."""
        with self._s.store.read() as connection:
            return _one(connection, name)

    def disable(self, caller: Caller, name: str, body: SwitchSponsor) -> dict[str, Any]:
        """End everything on behalf of a sponsor at once, and let nothing begin until the sponsor is enabled.

        Workspaces are quarantined (leases, certificates, sessions, ports, jobs and open reviews end with that), delegations
        revoked, and the person is signed out here. Once is enough. Raises :class:`NotFoundError` for a name that nothing names,
        which is more often a slip than a person.
        """
        key = sponsor_key(name)
        with self._s.store.write() as tx:
            present = _one(tx.connection, name)
            if present["state"] == "disabled":
                return {**present, "changed": False}
            _require_version(present, body.version)
            now = iso(self._s.clock())
            self._set(tx, caller, present, "disabled", body.reason)
            why = f"sponsor disabled: {body.reason}"[:256]
            quarantined, names = [], []
            for row in tx.connection.execute(select(workspaces).order_by(workspaces.c.id)).all():
                if sponsor_key(row.sponsor) == key and row.state != State.DECOMMISSIONED:
                    names.append(row.id)
                    if row.state != State.QUARANTINED:
                        self._registry.quarantine(tx, caller, row, why)
                        quarantined.append(row.id)
            counting = delegations.c.revoked_at.is_(None) & (delegations.c.expires_at > now)
            held = tx.connection.execute(select(delegations).where(counting & delegations.c.workspace_id.in_(names)))
            revoked = self._delegations.end(tx, caller, held.all(), why)
            gone = [row for row in tx.connection.execute(select(people.c.name)).scalars() if sponsor_key(row) == key]
            for person in gone:
                disentitle(tx.connection, person, self._s.clock())
                self._sessions.end_person(tx, caller, person, why)
            signed_in = end_sign_ins(self._s, tx, caller, sso_sessions.c.person.in_(gone), "sponsor_disabled")
            ended = {"quarantined": quarantined, "revoked": revoked, "sign_ins": signed_in}
            told = {"quarantined": quarantined[:_TOLD], "revoked": revoked[:_TOLD], "sign_ins": signed_in}
            self._record(tx, caller, present, "deactivate", reason=body.reason, **told)
            return {**_one(tx.connection, name), "changed": True, **ended}

    def enable(self, caller: Caller, name: str, body: SwitchSponsor) -> dict[str, Any]:
        """Let things begin on behalf of a sponsor again. Nothing comes back by itself: workspaces stay quarantined until each is
        released, delegations stay revoked."""
        with self._s.store.write() as tx:
            present = _one(tx.connection, name)
            if present["state"] == "active":
                return {**present, "changed": False}
            _require_version(present, body.version)
            self._set(tx, caller, present, "active", body.reason)
            self._record(tx, caller, present, "activate", reason=body.reason)
            return {**_one(tx.connection, name), "changed": True}

    def _set(self, tx: Transaction, caller: Caller, present: dict[str, Any], state: SponsorState, reason: str) -> None:
        key, version = sponsor_key(present["name"]), present["version"]
        tx.wake(SPONSORS)
        values: dict[str, Any] = {
            "state": state,
            "reason": reason,
            "changed_at": iso(self._s.clock()),
            "changed_by": caller.principal,
            "version": version + 1,
            "seq": tx.touch(),
        }
        if present["changed_at"] is None:
            tx.connection.execute(sponsors.insert().values(name=key, **values))
        else:
            tx.connection.execute(sponsors.update().where(sponsors.c.name == key).values(**values))

    def _record(
        self,
        tx: Transaction,
        caller: Caller,
        present: dict[str, Any],
        activity: Literal["activate", "deactivate"],
        **told: Any,
    ) -> None:
        tx.record(
            self._s.events.entity_management(
                self._s.clock(),
                caller.subject(""),
                ("sponsor", present["name"]),
                activity=activity,
                comment=told.pop("reason"),
                detail={"version": present["version"] + 1, **told},
            )
        )


def _require_version(present: dict[str, Any], version: int | None) -> None:
    if version is not None and present["version"] != version:
        raise ConflictError(
            f"{present['name']} is at version {present['version']}, not {version}",
            cure="look at it again: somebody changed it meanwhile",
            code="version_conflict",
            details={"version": present["version"]},
        )


_NEW: dict[str, Any] = {"state": "active", "reason": "", "changed_at": None, "changed_by": None, "version": 1}
"""A sponsor about whom nothing was ever decided."""


def _people(connection: Connection) -> set[str]:
    """Return everybody who signed in, or is a registered reviewer."""
    named = (select(people.c.name), select(reviewers.c.name))
    return {sponsor_key(name) for query in named for name in connection.execute(query).scalars()}


def _one(connection: Connection, name: str) -> dict[str, Any]:
    """Return one sponsor; somebody who signed in or reviews and sponsors nothing (yet) is one, too."""
    key = sponsor_key(name)
    found = views_of(connection).get(key)
    if found is None and key in _people(connection):
        found = {**_NEW, "name": key, "workspaces": {}, "agents": ()}
    if found is None:
        raise NotFoundError(
            f"no workspace and no agent names {name[:64]!r} as its sponsor, and nobody of that name signed in or reviews",
            cure="saw sponsor list shows them",
            code="unknown_sponsor",
        )
    return found


def views_of(connection: Connection) -> dict[str, dict[str, Any]]:
    """Return every sponsor by key. Names are compared in one place, here: databases fold case each in a way of its own."""
    found: dict[str, dict[str, Any]] = {}
    for row in connection.execute(select(sponsors)).all():
        found[row.name] = {
            "name": row.name,
            "state": row.state,
            "reason": row.reason,
            "changed_at": row.changed_at,
            "changed_by": row.changed_by,
            "version": row.version,
        }
    places: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    actors: dict[str, list[str]] = defaultdict(list)
    spelled = select(workspaces.c.id, workspaces.c.sponsor, workspaces.c.state).order_by(workspaces.c.id)
    for identifier, sponsor, state in _named(found, connection.execute(spelled).all()):
        if state != State.DECOMMISSIONED:
            places[sponsor][state].append(identifier)
    spelled = select(agents.c.id, agents.c.sponsor, agents.c.state).order_by(agents.c.id)
    for identifier, sponsor, state in _named(found, connection.execute(spelled).all()):
        if state != "retired":
            actors[sponsor].append(identifier)
    return {
        key: {
            **view,
            "workspaces": {state: tuple(ids) for state, ids in sorted(places[key].items())},
            "agents": tuple(actors[key]),
        }
        for key, view in found.items()
    }


def _named(found: dict[str, dict[str, Any]], rows: Iterable[Any]) -> Iterable[tuple[str, str, str]]:
    """Yield id, sponsor's key and state of ``rows``; a sponsor that is new to ``found`` is put there as it is written first."""
    for row in rows:
        key = sponsor_key(row.sponsor)
        if key not in found:
            found[key] = {**_NEW, "name": key}
        yield row.id, key, row.state
