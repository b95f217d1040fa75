"""What agents ask for beyond their policy: kept for people, answered by one, and never a grant (controls POL-01, NET-01).

Nothing that is decided about a call reads these rows. A request is *open* until a person accepts or declines it, or its time is
over. *Accepted* is a person's word that a signed release shall allow it; until such a release is in force, all stays refused.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Row, func, select

from saw.broker.agent_states import require_living
from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.delegation_ends import record_of
from saw.broker.errors import BusyError, ConflictError, ForbiddenError, MalformedError, NotFoundError
from saw.broker.handed_tools import require_self
from saw.broker.lifecycle import State
from saw.broker.notification_settings import Kind
from saw.broker.notifications import Notifications
from saw.broker.policy_request_ends import RequestRetention, make_room
from saw.broker.policy_request_views import (
    AnsweredRequest,
    AnswerRequest,
    JudgedRequest,
    PolicyRequest,
    PolicyRequestPage,
)
from saw.broker.registry import get_row, require_state
from saw.broker.releases import bundles_of
from saw.broker.review_states import other_policy
from saw.broker.schema import delegations, policy_requests, workspaces
from saw.broker.store import Transaction
from saw.policy.bundle import describe, read_content
from saw.policy.delegation import Scope, is_read
from saw.policy.loader import Bundle
from saw.policy.policy_request import Asked, AskedList, AskMore, Judged, canonical, judge
from saw.review.escapes import escape

OPEN_FOR = timedelta(days=14)
"""How long a request waits for a person."""
MOST_OPEN = 20
"""Most open requests of a workspace."""
MOST_KEPT = 200
"""Most requests of a workspace that are kept at all; of those that ended and are not held, the first make room."""
SHOWN = 50
"""Most requests that an agent is told of, the newest."""
STEP = 500
"""Most requests that one look expires."""
MAX_PAGE = 200
STATES = ("open", "accepted", "declined", "expired")
_ENDS: dict[str, Literal["accepted", "declined"]] = {"accept": "accepted", "decline": "declined"}


class PolicyRequests:
    """The requests, as workspaces make them and people answer them."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._notifications = Notifications(services)
        self._retention = RequestRetention(services)

    def ask(self, caller: Caller, body: AskMore) -> Asked:
        """Keep a request; the same again is the one that is open, or was answered under the same policy.

        Raises ``not_this_workspace``, ``policy_changed``, ``already_allowed``, ``never_allowed``, ``too_many_requests``,
        ``all_requests_held``.
        """
        require_self(caller, body.workspace_id)
        with self._s.store.read() as connection:
            # Before anything of a policy is read: of others than its own a workspace learns nothing.
            workspace = _asking(connection, body)
            judged = self._judged(connection, workspace, body, body.policy_digest)
        if judged.standing == "unknown":
            raise other_policy(body.workspace_id)
        if judged.standing == "allowed":
            raise ConflictError(
                f"{_call(body)} is allowed already: {judged.detail}",
                cure="make the call; what refuses it is no policy, see http://ring1.saw.internal/refusals",
                code="already_allowed",
            )
        if judged.standing == "never":
            raise ForbiddenError(
                f"no policy may allow {_call(body)}: {judged.detail}", cure="do without it", code="never_allowed"
            )
        now = self._s.clock()
        with self._s.store.write() as tx:
            workspace = _asking(tx.connection, body)
            require_living(tx.connection, workspace)
            self._expire(tx, workspace.id)
            found = _same(tx.connection, body)
            if found is not None:
                return _asked(found)
            _require_room(tx.connection, workspace.id)
            make_room(tx, self._s, workspace.id, MOST_KEPT)
            identifier = self._s.new_id("pr")
            tx.connection.execute(
                policy_requests.insert().values(
                    id=identifier,
                    workspace_id=workspace.id,
                    agent_id=workspace.agent_id,
                    sponsor=workspace.sponsor,
                    blueprint=workspace.blueprint,
                    ring=workspace.ring,
                    policy_digest=body.policy_digest,
                    ask_sha256=body.digest,
                    scheme=body.scheme,
                    host=body.host,
                    port=body.port,
                    method=body.method,
                    path=body.path,
                    program=body.program,
                    reason=body.reason,
                    standing=judged.standing,
                    state="open",
                    opened_at=iso(now),
                    expires_at=iso(now + OPEN_FOR),
                )
            )
            row = get_request(tx.connection, identifier)
            self._record(tx, caller, row, "open", "an agent asks for more than its policy allows")
            self._notifications.tell(tx, kind=Kind.POLICY_REQUESTED, workspace=workspace.id, request=row.id)
        return _asked(row)

    def mine(self, caller: Caller, workspace_id: str) -> AskedList:
        """Return the newest requests of the workspace that asks."""
        require_self(caller, workspace_id)
        query = select(policy_requests).where(policy_requests.c.workspace_id == workspace_id)
        query = query.order_by(policy_requests.c.opened_at.desc(), policy_requests.c.id.desc()).limit(SHOWN)
        with self._s.store.read() as connection:
            rows = connection.execute(query).all()
        now = iso(self._s.clock())
        return AskedList(requests=tuple(_asked(row, now) for row in rows))

    def listed(self, *, state: str, workspace: str, sponsor: str, after: str, limit: int) -> PolicyRequestPage:
        """Return a page of requests, the newest first; ``sponsor`` in any case of letters; empty texts filter nothing."""
        if state and state not in STATES:
            raise MalformedError(f"there is no state {state[:32]!r}", cure="use one of " + ", ".join(STATES))
        now = iso(self._s.clock())
        columns = policy_requests.c
        query = select(policy_requests).order_by(columns.opened_at.desc(), columns.id.desc())
        late = (columns.state == "open") & (columns.expires_at <= now)
        if state == "expired":
            query = query.where((columns.state == "expired") | late)
        elif state:
            query = query.where(columns.state == state, ~late)
        if workspace:
            query = query.where(columns.workspace_id == workspace)
        if sponsor:
            query = query.where(func.lower(columns.sponsor) == sponsor.lower())
        limit = max(1, min(limit, MAX_PAGE))
        with self._s.store.read() as connection:
            if after:
                last = get_request(connection, after)
                query = query.where(
                    (columns.opened_at < last.opened_at)
                    | ((columns.opened_at == last.opened_at) & (columns.id < last.id))
                )
            rows = connection.execute(query.limit(limit + 1)).all()
        more = len(rows) > limit
        return PolicyRequestPage(
            requests=tuple(PolicyRequest(**_fields(row, now)) for row in rows[:limit]),
            next=rows[limit - 1].id if more else None,
        )

    def show(self, identifier: str) -> JudgedRequest:
        """Return one request, judged by the policy that is in force in its workspace now."""
        with self._s.store.read() as connection:
            row = get_request(connection, identifier)
            workspace = connection.execute(select(workspaces).where(workspaces.c.id == row.workspace_id)).one_or_none()
            digest = None if workspace is None else workspace.policy_digest
            found = Judged(standing="unknown", detail="no policy is in force in the workspace")
            if workspace is not None and digest:
                found = self._judged(connection, workspace, _ask_of(row), digest)
        return JudgedRequest(**_fields(row, iso(self._s.clock())), now=found, policy_now=digest)

    def answer(self, caller: Caller, identifier: str, body: AnswerRequest) -> AnsweredRequest:
        """Note what a person says; it changes nothing of what is allowed. The same answer again changes nothing.

        Raises ``already_answered`` for another answer, ``request_expired`` for one that nobody answered in time.
        """
        to = _ENDS[body.decision]
        if not body.comment.strip():
            raise MalformedError("an answer says why", cure="write a comment")
        with self._s.store.write() as tx:
            row = get_request(tx.connection, identifier)
            self._expire(tx, row.workspace_id)
            row = get_request(tx.connection, identifier)
            changed = row.state == "open"
            if changed:
                values = {
                    "state": to,
                    "ended_at": iso(self._s.clock()),
                    "answered_by": caller.principal,
                    "comment": body.comment,
                }
                tx.connection.execute(policy_requests.update().where(policy_requests.c.id == row.id).values(**values))
                row = get_request(tx.connection, row.id)
                self._record(tx, caller, row, body.decision, body.comment)
        if row.state == "expired":
            raise ConflictError(
                f"{row.id} has expired", cure="the agent asks again when it needs it", code="request_expired"
            )
        if row.state != to:
            raise ConflictError(
                f"{row.id} was {row.state} by {row.answered_by}",
                cure="the agent may ask again",
                code="already_answered",
            )
        return AnsweredRequest(**_fields(row, iso(self._s.clock())), changed=changed)

    def tick(self) -> None:
        """Expire what nobody answered in time, and remove what ended long ago and is not held."""
        late = (policy_requests.c.state == "open") & (policy_requests.c.expires_at <= iso(self._s.clock()))
        with self._s.store.read() as connection:
            waiting = connection.execute(select(policy_requests.c.id).where(late).limit(1)).first() is not None
        if waiting:
            with self._s.store.write() as tx:
                self._expire(tx)
        self._retention.tick()

    def _expire(self, tx: Transaction, workspace_id: str = "") -> None:
        now = iso(self._s.clock())
        late = (policy_requests.c.state == "open") & (policy_requests.c.expires_at <= now)
        query = select(policy_requests).where(late)
        if workspace_id:
            query = query.where(policy_requests.c.workspace_id == workspace_id)
        for row in tx.connection.execute(query.limit(STEP)).all():
            values = {"state": "expired", "ended_at": now}
            tx.connection.execute(policy_requests.update().where(policy_requests.c.id == row.id).values(**values))
            self._record(tx, BROKER, row, "expire", "nobody answered in time")

    def _judged(self, connection: Connection, workspace: Row[Any], ask: AskMore, digest: str) -> Judged:
        """Return how the release ``digest`` stands to the ask, and whether a delegation covers what it allows."""
        raw = bundles_of(connection, {digest}).get(digest)
        if raw is None:
            return Judged(standing="unknown", detail=f"the policy {digest[:16]} is not released here")
        judged = judge(_bundle(digest, raw), ask.call())
        if judged.standing != "allowed":
            return judged
        if self._covered(connection, workspace, ask):
            return judged
        return Judged(
            standing="delegation",
            detail="the policy in force allows it, and no delegation of the agent covers it",
            impossible="a delegation would: saw delegation issue",
        )

    def _covered(self, connection: Connection, workspace: Row[Any], ask: AskMore) -> bool:
        """Tell whether no delegation is needed, or one that counts covers the call, as the perimeter would say."""
        ever = select(delegations.c.id).where(delegations.c.workspace_id == workspace.id).limit(1)
        if not self._s.config.delegation.required and connection.execute(ever).first() is None:
            return True
        now = self._s.clock()
        counting = delegations.c.revoked_at.is_(None) & (delegations.c.expires_at > iso(now))
        mine = select(delegations).where(counting, delegations.c.workspace_id == workspace.id)
        read = is_read(ask.method, ask.path, git_host=False, inference=False)
        return any(
            record.agent == workspace.agent_id
            and record.live(now)
            and (read or record.approval != "read-only")
            and Scope(record.resources).covers(ask.host, ask.port, ask.method, ask.path)
            for record in map(record_of, connection.execute(mine).all())
        )

    def _record(
        self,
        tx: Transaction,
        caller: Caller,
        row: Row[Any],
        step: Literal["open", "accept", "decline", "expire"],
        why: str,
    ) -> None:
        told = {
            name: getattr(row, name) for name in ("scheme", "host", "port", "method", "path", "program", "standing")
        }
        tx.record(
            self._s.events.api_activity(
                self._s.clock(),
                caller.subject(row.workspace_id, agent=row.agent_id, policy_digest=row.policy_digest),
                f"policy.request.{step}",
                activity="create" if step == "open" else "update",
                resource=("policy_request", row.id),
                status_detail=why,
                detail={**told, "reason_by_agent": escape(row.reason)},
            )
        )


def get_request(connection: Connection, identifier: str) -> Row[Any]:
    """Return the row of a request or raise :class:`NotFoundError`."""
    row = connection.execute(select(policy_requests).where(policy_requests.c.id == identifier)).one_or_none()
    if row is None:
        raise unknown_request(identifier)
    return row


def unknown_request(identifier: str) -> NotFoundError:
    """Return the refusal of a request that does not exist, or not for the caller."""
    return NotFoundError(
        f"there is no policy request {identifier[:64]!r}",
        cure="saw policy requests list shows them",
        code="unknown_policy_request",
    )


@functools.lru_cache(maxsize=8)
def _bundle(digest: str, raw: bytes) -> Bundle:
    """Return the content of the release ``digest``; it was verified when it was published."""
    if describe(raw)[0] != digest:
        raise ConflictError("the stored policy is another one", cure="saw broker check", code="policy_changed")
    return read_content(raw)


def _asking(connection: Connection, body: AskMore) -> Row[Any]:
    """Return the workspace that asks; raise unless it is active, under the policy that it names, and asks for one call."""
    workspace = get_row(connection, body.workspace_id)
    require_state(workspace, frozenset({State.ACTIVE}))
    if workspace.policy_digest != body.policy_digest:
        raise other_policy(workspace.id)
    try:
        same = canonical(body.path) == body.path
    except ValueError as error:
        raise MalformedError(f"no rule can name the path: {error}", cure="send its canonical form") from error
    if not same:
        raise MalformedError("the path is not in its canonical form", cure=f"ask for {canonical(body.path)}")
    return workspace


def _same(connection: Connection, body: AskMore) -> Row[Any] | None:
    """Return the request that asks for the same and is open, or was answered under the policy that is in force."""
    columns = policy_requests.c
    answered = columns.state.in_(("accepted", "declined")) & (columns.policy_digest == body.policy_digest)
    query = select(policy_requests).where(
        columns.workspace_id == body.workspace_id,
        columns.ask_sha256 == body.digest,
        (columns.state == "open") | answered,
    )
    return connection.execute(query.order_by(columns.opened_at.desc(), columns.id.desc()).limit(1)).one_or_none()


def _require_room(connection: Connection, workspace_id: str) -> None:
    columns = policy_requests.c
    query = select(func.count()).select_from(policy_requests)
    query = query.where(columns.workspace_id == workspace_id, columns.state == "open")
    if connection.execute(query).scalar_one() >= MOST_OPEN:
        raise BusyError(
            f"{workspace_id} asks for too much: at most {MOST_OPEN} requests are open",
            cure="wait until people have answered",
            code="too_many_requests",
        )


def _call(body: AskMore) -> str:
    return f"{body.method} {body.scheme}://{body.host}:{body.port}{body.path}"


def _ask_of(row: Row[Any]) -> AskMore:
    names = ("workspace_id", "policy_digest", "host", "port", "scheme", "method", "path", "program", "reason")
    return AskMore(**{name: getattr(row, name) for name in names})


def _state(row: Row[Any], now: str) -> str:
    return "expired" if row.state == "open" and now and row.expires_at <= now else str(row.state)


def _asked(row: Row[Any], now: str = "") -> Asked:
    names = Asked.__struct_fields__
    return msgspec.convert({name: value for name, value in _fields(row, now).items() if name in names}, Asked)


def _fields(row: Row[Any], now: str) -> dict[str, Any]:
    same = (
        "id", "host", "port", "scheme", "method", "path", "program", "reason", "policy_digest", "opened_at", "expires_at",
        "sponsor", "blueprint", "ring", "standing", "answered_by",
    )  # fmt: skip
    return {
        **{name: getattr(row, name) for name in same},
        "workspace": row.workspace_id,
        "agent": row.agent_id,
        "state": _state(row, now),
        "answered_at": row.ended_at if row.answered_by else None,
        "comment": row.comment or "",
    }
