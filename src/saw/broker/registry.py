"""Workspaces, their agents and endorsement keys: creation, lifecycle steps, the kill switch."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy import Connection, Row, select

from saw.attest.verifier import load_ek
from saw.broker.agent_states import AgentMoves, get_agent
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.forward_ends import revoke_of_workspace
from saw.broker.idempotency import Version, require_version, take_request
from saw.broker.images import admit, find_image, require_bootable
from saw.broker.job_states import JobMoves
from saw.broker.lifecycle import State, check_step, parse_state
from saw.broker.notification_settings import Kind
from saw.broker.notifications import Notifications
from saw.broker.numbers import free_number, give_back
from saw.broker.review_states import Moves
from saw.broker.schema import workspaces
from saw.broker.session_ends import SessionEnds
from saw.broker.sponsor_states import require_enabled
from saw.broker.store import Transaction
from saw.errors import SawError
from saw.jobs.messages import IdempotencyKey

Name = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
SponsorName = Annotated[str, msgspec.Meta(pattern=r"^(?!\.{1,2}\Z)[^/]{1,256}\Z")]
"""A person's name; it is a part of addresses, so it has no slash and is no word for a folder."""
#: Workspace ids are DNS labels: the id is also the VM's name and its host name. ``saw.vm.spec`` takes the same.
_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

#: States in which a workspace begins to do something on behalf of its sponsor.
BEGINS = frozenset({State.PROVISIONING, State.ATTESTING})

#: Grants that a workspace loses when it leaves ``active``.
NO_GRANTS: dict[str, None] = {"lease_expires_at": None, "svid_sha256": None}


class CreateWorkspace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The profile of a workspace, fixed at creation. ``agent``: id of a registered agent that is bound to no workspace yet;
    without one, an agent is registered along with the workspace. The same ``idempotency_key`` is the same workspace.
    ``place``: whose numbers it gets one of (:class:`saw.broker.number_settings.NumberSettings`)."""

    id: Text
    sponsor: SponsorName
    blueprint: Name
    ring: Name
    image: Text
    agent: Annotated[str, msgspec.Meta(max_length=64)] = ""
    idempotency_key: IdempotencyKey | None = None
    place: Annotated[str, msgspec.Meta(max_length=64)] = ""


class RecordEk(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The endorsement key of the workspace's TPM (PEM, RSA 2048)."""

    ek_pub_pem: Annotated[str, msgspec.Meta(max_length=4096)]


class Reprovision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The registered image that a workspace is rebuilt from; its data disk and its TPM stay. ``version``, where given, is the
    one that the caller has seen; what was told under one ``idempotency_key`` is done once."""

    image: Text
    version: Version | None = None
    idempotency_key: IdempotencyKey | None = None


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A lifecycle step and why. ``version``, where given, is the one that the caller has seen; what was told under one
    ``idempotency_key`` is done once."""

    to: str
    reason: Text
    version: Version | None = None
    idempotency_key: IdempotencyKey | None = None


class Kill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why everything of a workspace must be refused at once, whatever its version. A kill that is told again under one
    ``idempotency_key`` does not kill what was released since."""

    reason: Text
    idempotency_key: IdempotencyKey | None = None


class Registry:
    """The register of workspaces and agents (controls ID-04, LIF-01, LIF-02)."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._reviews = Moves(services)
        self._sessions = SessionEnds(services)
        self._jobs = JobMoves(services)
        self._agents = AgentMoves(services)
        self._notifications = Notifications(services)
        self._candidate_rings = frozenset(services.config.image.candidate_rings)

    def create(self, caller: Caller, wanted: CreateWorkspace) -> dict[str, Any]:
        """Register a workspace and its agent.

        Raises :class:`MalformedError` for an id that no VM can have, :class:`ConflictError` for a used one, even a
        decommissioned one, and for a key that was used for another request (``idempotency_mismatch``).
        """
        if not _ID.fullmatch(wanted.id):
            raise MalformedError(
                f"workspace id {wanted.id!r} is not valid",
                cure="use at most 63 lower-case letters, digits and dashes, no dash at either end",
                code="id_refused",
            )
        now = self._s.clock()
        with self._s.store.write() as tx:
            profile = msgspec.structs.asdict(wanted)
            # What names no place is the same request as before there were places.
            asked = profile if wanted.place else {name: value for name, value in profile.items() if name != "place"}
            if take_request(tx, caller, now, wanted.idempotency_key, "create", wanted.id, asked):
                return {**public_view(get_row(tx.connection, wanted.id)), "changed": False}
            if tx.connection.execute(select(workspaces.c.id).where(workspaces.c.id == wanted.id)).first():
                raise ConflictError(
                    f"workspace {wanted.id} exists",
                    cure="choose another id; ids are never used again",
                    code="workspace_exists",
                )
            image = find_image(tx.connection, wanted.image)
            admit(image, wanted.ring, self._candidate_rings, now)
            number = free_number(tx.connection, self._s.config.numbers, wanted.place)
            profile = {
                name: value for name, value in profile.items() if name not in {"agent", "idempotency_key", "place"}
            }
            named = wanted.agent
            require_enabled(tx.connection, wanted.sponsor)
            agent = get_agent(tx.connection, named) if named else self._agents.add(tx, caller, wanted.sponsor)
            stamp = iso(now)
            tx.connection.execute(
                workspaces.insert().values(
                    **profile,
                    number=number,
                    image_sha256=image.image_sha256,
                    agent_id=agent.id,
                    state=State.REQUESTED,
                    state_reason="created",
                    state_since=stamp,
                    created_at=stamp,
                    watch_seq=0,
                )
            )
            detail = {"profile": {**profile, "number": number, "image_sha256": image.image_sha256}}
            tx.record(
                self._s.events.entity_management(
                    now,
                    caller.subject(wanted.id, agent=agent.id),
                    ("workspace", wanted.id),
                    activity="create",
                    detail=detail,
                )
            )
            self._agents.bind(tx, caller, agent, get_row(tx.connection, wanted.id))
            return {**public_view(get_row(tx.connection, wanted.id)), "changed": True}

    def show(self, workspace_id: str) -> dict[str, Any]:
        """Return one workspace as the operator sees it."""
        with self._s.store.read() as connection:
            return public_view(get_row(connection, workspace_id))

    def record_ek(self, caller: Caller, workspace_id: str, body: RecordEk) -> dict[str, Any]:
        """Record the endorsement key, once. The same key again changes nothing; another one is refused and audited."""
        pem = normal_ek(body.ek_pub_pem)
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_row(tx.connection, workspace_id)
            subject = caller.subject(workspace_id, agent=row.agent_id)
            conflict = row.ek_pub_pem is not None and row.ek_pub_pem != pem
            changed = row.ek_pub_pem is None
            if conflict:
                tx.record(
                    self._s.events.detection_finding(
                        now,
                        subject,
                        kind="ek_change_refused",
                        title=f"A second endorsement key was offered for {workspace_id}",
                    )
                )
            elif row.state == State.DECOMMISSIONED:
                raise ConflictError(
                    f"{workspace_id} is decommissioned", cure="create a new workspace", code="decommissioned"
                )
            elif changed:
                self._set(tx.connection, workspace_id, ek_pub_pem=pem)
                tx.record(
                    self._s.events.entity_management(
                        now, subject, ("workspace", workspace_id), activity="enroll", comment="endorsement key recorded"
                    )
                )
                tx.touch(workspace_id)
        if conflict:
            raise ConflictError(
                f"{workspace_id} already has another endorsement key",
                cure="a changed TPM means a new workspace",
                code="ek_recorded",
            )
        return {**self.show(workspace_id), "changed": changed}

    def reprovision(self, caller: Caller, workspace_id: str, body: Reprovision) -> dict[str, Any]:
        """Bind a workspace that does not run to another registered image: its expected measurements change with it.

        Allowed before it first runs and while it is stopped; raises :class:`ConflictError` otherwise (control ISO-01), and when
        it has changed meanwhile (``version_conflict``, with the present version).
        """
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_row(tx.connection, workspace_id)
            if take_request(tx, caller, now, body.idempotency_key, "image", workspace_id, body):
                return {**public_view(row), "changed": False}
            image = find_image(tx.connection, body.image)
            changed = (row.image, row.image_sha256) != (body.image, image.image_sha256)
            if changed:
                require_version(row, body.version)
                admit(image, row.ring, self._candidate_rings, now)
            if changed and row.state not in {State.REQUESTED, State.PROVISIONING, State.STOPPED}:
                raise ConflictError(
                    f"{workspace_id} is {row.state}; its image cannot change now",
                    cure="stop it first",
                    code="not_stopped",
                )
            if changed:
                self._set(tx.connection, workspace_id, image=body.image, image_sha256=image.image_sha256)
                tx.record(
                    self._s.events.entity_management(
                        now,
                        caller.subject(workspace_id, agent=row.agent_id),
                        ("workspace", workspace_id),
                        activity="update",
                        comment="rebuilt from another image",
                        detail={
                            "from": row.image_sha256,
                            "to": image.image_sha256,
                            "image": body.image,
                            "version": row.version + 1,
                        },
                    )
                )
                tx.touch(workspace_id)
        return {**self.show(workspace_id), "changed": changed}

    def transition(self, caller: Caller, workspace_id: str, step: Step) -> dict[str, Any]:
        """Take one lifecycle step. To the present state it changes nothing; a step that is not allowed is refused, and so is one
        from a version that is no more (``version_conflict``, with the present one). Nothing begins for a disabled sponsor
        (``sponsor_disabled``), nor on an image that may not run (``image_revoked``, ``image_expired``; control P0-04)."""
        to = parse_state(step.to)
        with self._s.store.write() as tx:
            row = get_row(tx.connection, workspace_id)
            if take_request(tx, caller, self._s.clock(), step.idempotency_key, "transition", workspace_id, step):
                return {**public_view(row), "changed": False}
            changed = row.state != to
            if changed:
                require_version(row, step.version)
                check_step(workspace_id, State(row.state), to)
                if to in BEGINS:
                    require_enabled(tx.connection, row.sponsor)
                    require_bootable(tx.connection, row, self._s.clock())
                self._move(tx, caller, row, to, step.reason)
        return {**self.show(workspace_id), "changed": changed}

    def kill(self, caller: Caller, workspace_id: str, reason: str, key: str | None = None) -> dict[str, Any]:
        """Quarantine at once: no lease, no SVID, no new nonce; perimeters are woken when this returns.

        No version is asked for: a kill goes before what others change. What was told under ``key`` is done once. On a full disk
        it takes the room that is set aside for it.
        """
        return self._s.store.urgently(lambda: self._kill(caller, workspace_id, reason, key))

    def _kill(self, caller: Caller, workspace_id: str, reason: str, key: str | None) -> dict[str, Any]:
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_row(tx.connection, workspace_id)
            if take_request(tx, caller, now, key, "kill", workspace_id, reason):
                return {**public_view(row), "changed": False}
            if row.state == State.DECOMMISSIONED:
                raise ConflictError(
                    f"{workspace_id} is decommissioned", cure="nothing is left to kill", code="decommissioned"
                )
            changed = row.state != State.QUARANTINED
            if changed:
                self.quarantine(tx, caller, row, reason)
            tx.record(
                self._s.events.api_activity(
                    now,
                    caller.subject(workspace_id, agent=row.agent_id, policy_digest=row.policy_digest or ""),
                    "workspace.kill",
                    activity="update",
                    message=reason,
                    resource=("workspace", workspace_id),
                )
            )
        return {**self.show(workspace_id), "changed": changed}

    def quarantine(self, tx: Transaction, caller: Caller, row: Row[Any], reason: str) -> None:
        """Cut a workspace off inside the transaction of whatever gives the reason; it is not decommissioned, nor cut off yet."""
        self._move(tx, caller, row, State.QUARANTINED, reason)

    def activate(self, tx: Transaction, caller: Caller, row: Row[Any]) -> None:
        """Mark the agent active when its workspace becomes so (called inside the attestation's transaction)."""
        self._agents.follow(tx, caller, row.id, State.ACTIVE, "the workspace has attested")

    def _move(self, tx: Transaction, caller: Caller, row: Row[Any], to: State, reason: str) -> None:
        now = self._s.clock()
        self._set(tx.connection, row.id, state=to, state_reason=reason, state_since=iso(now), **NO_GRANTS)
        subject = caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or "")
        activity = {State.QUARANTINED: "suspend", State.DECOMMISSIONED: "delete", State.STOPPED: "deactivate"}.get(
            to, "update"
        )
        tx.record(
            self._s.events.entity_management(
                now,
                subject,
                ("workspace", row.id),
                activity=activity,  # type: ignore[arg-type]
                comment=reason,
                detail={"from": row.state, "to": str(to), "version": row.version + 1},
            )
        )
        self._reviews.cancel_all(tx, caller, row.id, reason)
        self._agents.follow(tx, caller, row.id, to, reason)
        self._sessions.end_workspace(tx, caller, row.id, str(to), reason)
        if to is State.DECOMMISSIONED:
            give_back(tx.connection, row.number)
        if to in {State.QUARANTINED, State.DECOMMISSIONED}:
            revoke_of_workspace(self._s, tx, caller, row.id, reason)
        if to is State.QUARANTINED:
            self._jobs.workspace_killed(tx, caller, row.id, reason)
            self._notifications.tell(tx, kind=Kind.WORKSPACE_QUARANTINED, workspace=row.id)
        tx.touch(row.id)

    @staticmethod
    def _set(connection: Connection, workspace_id: str, **values: Any) -> None:
        """Write ``values`` as the next version."""
        values["version"] = workspaces.c.version + 1
        connection.execute(workspaces.update().where(workspaces.c.id == workspace_id).values(**values))


def get_row(connection: Connection, workspace_id: str) -> Row[Any]:
    """Return the row of a workspace or raise :class:`NotFoundError`."""
    row = connection.execute(select(workspaces).where(workspaces.c.id == workspace_id)).one_or_none()
    if row is None:
        raise unknown_workspace(workspace_id)
    return row


def unknown_workspace(workspace_id: str) -> NotFoundError:
    """Return the refusal of a workspace that does not exist, or not for the caller."""
    return NotFoundError(
        f"there is no workspace {workspace_id[:64]!r}",
        cure="saw workspace list shows them",
        code="unknown_workspace",
    )


def require_state(row: Row[Any], allowed: frozenset[State]) -> None:
    """Raise :class:`ForbiddenError` unless the workspace is in one of ``allowed``."""
    if State(row.state) not in allowed:
        raise ForbiddenError(
            f"{row.id} is {row.state}", cure="the operator decides about its state", code="workspace_not_admitted"
        )


def normal_ek(pem: str) -> str:
    """Return the endorsement key in one normal PEM form; raise :class:`MalformedError` when it is none."""
    try:
        key = load_ek(pem)
    except SawError as error:
        raise MalformedError(error.message, cure=error.cure, code="ek_malformed") from error
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


HIDDEN = frozenset({"ak_pub", "ek_pub_pem"})


def public_view(row: Row[Any]) -> dict[str, Any]:
    """Return what operators see of a workspace."""
    view = {key: value for key, value in zip(row._fields, row, strict=True) if key not in HIDDEN}
    return {**view, "ek_recorded": row.ek_pub_pem is not None}
