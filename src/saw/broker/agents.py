"""The register of agents: made, changed under a version, retired, and succeeded by another one on the same workspace."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any

import msgspec
from sqlalchemy import Connection, Row

from saw.broker.agent_states import AgentMoves, agent_view, get_agent, unknown_agent
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegation_ends import held_by
from saw.broker.delegations import Delegations
from saw.broker.errors import ConflictError, MalformedError
from saw.broker.idempotency import Version, require_version, told_before
from saw.broker.registry import SponsorName, get_row
from saw.broker.schema import agents
from saw.broker.store import Transaction
from saw.jobs.messages import IdempotencyKey

_GIVEN = re.compile(r"agent-[0-9]+")

Name = Annotated[str, msgspec.Meta(pattern=r"^([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)?\Z")]
Claim = Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9][A-Za-z0-9 ._:/@+-]{0,127})?\Z")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Owner = Annotated[str, msgspec.Meta(max_length=256)]
Purpose = Annotated[str, msgspec.Meta(max_length=2000)]
Id = Annotated[str, msgspec.Meta(max_length=64)]


class RegisterAgent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A new agent. ``owner`` answers for it, ``harness`` and ``model`` are claims. ``workspace`` is the id of the one that it
    becomes the agent of; without one it is bound later. The same ``idempotency_key`` is the same agent."""

    sponsor: SponsorName
    name: Name = ""
    owner: Owner = ""
    purpose: Purpose = ""
    harness: Claim = ""
    model: Claim = ""
    workspace: Id = ""
    idempotency_key: IdempotencyKey | None = None


class ChangeAgent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is to be different; what is left out stays. ``version`` is the one that the caller has seen. ``workspace`` binds an
    agent that has none."""

    version: Version
    name: Name | msgspec.UnsetType = msgspec.UNSET
    owner: Owner | msgspec.UnsetType = msgspec.UNSET
    purpose: Purpose | msgspec.UnsetType = msgspec.UNSET
    harness: Claim | msgspec.UnsetType = msgspec.UNSET
    model: Claim | msgspec.UnsetType = msgspec.UNSET
    workspace: Id | msgspec.UnsetType = msgspec.UNSET


class RetireAgent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Why an agent ends for good; ``version``, where given, is the one that the caller has seen."""

    reason: Text
    version: Version | None = None


class SucceedAgent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The agent that follows one, which is retired with ``reason``. It inherits nothing: ``reissue`` names the delegations of
    the one before that are issued anew to it."""

    reason: Text
    name: Name = ""
    owner: Owner = ""
    purpose: Purpose = ""
    harness: Claim = ""
    model: Claim = ""
    reissue: Annotated[tuple[Id, ...], msgspec.Meta(max_length=256)] = ()
    version: Version | None = None
    idempotency_key: IdempotencyKey | None = None


class Agents:
    """Agents as operators and sponsors use them (control ID-04)."""

    def __init__(self, services: Services, delegations: Delegations) -> None:
        self._s = services
        self._moves = AgentMoves(services)
        self._delegations = delegations

    def register(self, caller: Caller, wanted: RegisterAgent) -> dict[str, Any]:
        """Register an agent, bound to a workspace of the same sponsor where one is named.

        Raises :class:`ConflictError` for a name in use, a workspace that has an agent, or a key that was used for another
        request (``idempotency_mismatch``).
        """
        _check_name(wanted.name)
        digest = _digest("register", wanted)
        with self._s.store.write() as tx:
            if (found := _same(tx.connection, caller, wanted.idempotency_key, digest)) is not None:
                return {**agent_view(found), "changed": False}
            row = self._add(tx, caller, wanted.sponsor, wanted, digest)
            if wanted.workspace:
                row = self._moves.bind(tx, caller, row, get_row(tx.connection, wanted.workspace))
            return {**agent_view(row), "changed": True}

    def show(self, identifier: str, sponsor: str | None = None) -> dict[str, Any]:
        """Return one agent; for ``sponsor`` (None: for everybody) one of somebody else does not exist."""
        with self._s.store.read() as connection:
            return agent_view(_of(connection, identifier, sponsor))

    def change(self, caller: Caller, identifier: str, wanted: ChangeAgent) -> dict[str, Any]:
        """Change what is said of an agent, or bind it. Raises :class:`ConflictError` for one that has changed meanwhile
        (``version_conflict``, with the present version), is retired, or cannot be bound."""
        given = {
            name: value
            for name in ("name", "owner", "purpose", "harness", "model")
            if (value := getattr(wanted, name)) is not msgspec.UNSET
        }
        with self._s.store.write() as tx:
            row = get_agent(tx.connection, identifier)
            require_version(row, wanted.version)
            _require_living(row)
            if given.get("name") == "":
                given["name"] = row.id
            values = {name: value for name, value in given.items() if value != getattr(row, name)}
            bound = row.workspace_id if wanted.workspace is msgspec.UNSET else wanted.workspace
            changed = bool(values) or bound != row.workspace_id
            if "name" in values:
                _check_name(values["name"], row.id)
                self._moves.require_free_name(tx.connection, values["name"])
            if values:
                said: dict[str, object] = {f"{name}_before": str(getattr(row, name))[:512] for name in values}
                said |= {name: value[:512] for name, value in values.items()}
                row = self._moves.change(tx, caller, row, "update", comment="changed", said=said, **values)
            if bound != row.workspace_id:
                row = self._moves.bind(tx, caller, row, get_row(tx.connection, bound))
            return {**agent_view(row), "changed": changed}

    def retire(
        self, caller: Caller, identifier: str, wanted: RetireAgent, sponsor: str | None = None
    ) -> dict[str, Any]:
        """End an agent for good: its delegations are revoked, its reviews cancelled, its calls refused. Once is enough."""
        with self._s.store.write() as tx:
            row = _of(tx.connection, identifier, sponsor)
            revoked: list[str] = []
            changed = row.state != "retired"
            if changed:
                require_version(row, wanted.version)
                row, revoked = self._moves.retire(tx, caller, row, wanted.reason)
            return {**agent_view(row), "changed": changed, "revoked": revoked}

    def succeed(self, caller: Caller, identifier: str, wanted: SucceedAgent) -> dict[str, Any]:
        """Retire an agent and register the one that follows, on the same workspace; return the new one.

        Either all of it happens or nothing: raises :class:`ConflictError` when there is a successor already, or a delegation
        that is to be issued anew does not count any more (``delegation_ended``).
        """
        _check_name(wanted.name)
        digest = _digest(f"succeed {identifier}", wanted)
        now = iso(self._s.clock())
        with self._s.store.write() as tx:
            if (found := _same(tx.connection, caller, wanted.idempotency_key, digest)) is not None:
                return {**agent_view(found), "changed": False, "revoked": [], "reissued": []}
            old = get_agent(tx.connection, identifier)
            if old.successor:
                raise ConflictError(
                    f"{old.id} has a successor, {old.successor}", cure="succeed that one", code="agent_succeeded"
                )
            held = {row.id: row for row in held_by(tx.connection, old, now)}
            if missing := [name for name in wanted.reissue if name not in held]:
                raise ConflictError(
                    f"{old.id} holds no delegation {missing[0]} that counts",
                    cure="look at saw delegation list again",
                    code="delegation_ended",
                )
            revoked: list[str] = []
            if old.state != "retired":
                require_version(old, wanted.version)
                old, revoked = self._moves.retire(tx, caller, old, wanted.reason)
            new = self._add(tx, caller, old.sponsor, wanted, digest, predecessor=old.id)
            self._moves.change(tx, caller, old, "update", comment=f"{new.id} follows", successor=new.id)
            if old.workspace_id:
                new = self._moves.bind(tx, caller, new, get_row(tx.connection, old.workspace_id))
            again = [held[name] for name in dict.fromkeys(wanted.reissue)]
            reissued = self._delegations.reissue(tx, caller, again, new.id)
            return {**agent_view(new), "changed": True, "revoked": revoked, "reissued": reissued}

    def _add(
        self,
        tx: Transaction,
        caller: Caller,
        sponsor: str,
        wanted: RegisterAgent | SucceedAgent,
        digest: str,
        **more: str,
    ) -> Row[Any]:
        said = {name: getattr(wanted, name) for name in ("name", "owner", "purpose", "harness", "model")}
        if wanted.idempotency_key is not None:
            more |= {"idempotency_key": wanted.idempotency_key, "request_sha256": digest}
        return self._moves.add(tx, caller, sponsor, registered_by=caller.principal, **said, **more)


def is_of(row: Row[Any], sponsor: str) -> bool:
    """Tell whether ``sponsor``, a person's name, is who an agent names as its own."""
    return str(row.sponsor).strip().casefold() == sponsor.casefold()


def _of(connection: Connection, identifier: str, sponsor: str | None) -> Row[Any]:
    row = get_agent(connection, identifier)
    if sponsor is not None and not is_of(row, sponsor):
        raise unknown_agent(identifier)
    return row


def _check_name(name: str, own: str = "") -> None:
    """Names such as ``agent-7`` are given by the register; nobody takes the one of a later agent."""
    if name != own and _GIVEN.fullmatch(name):
        raise MalformedError(f"the name {name} is like an id", cure="choose another name", code="name_refused")


def _require_living(row: Row[Any]) -> None:
    if row.state == "retired":
        raise ConflictError(f"{row.id} is retired", cure="register another agent", code="agent_retired")


def _digest(what: str, wanted: RegisterAgent | SucceedAgent) -> str:
    return hashlib.sha256(msgspec.json.encode([what, wanted])).hexdigest()


def _same(connection: Connection, caller: Caller, key: str | None, digest: str) -> Row[Any] | None:
    """Return the agent that this request made before; raise :class:`ConflictError` when another one used its key."""
    return None if key is None else told_before(connection, agents.c.registered_by, caller.principal, key, digest)
