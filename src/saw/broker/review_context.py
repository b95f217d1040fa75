"""Reading what a push or a write would change: its perimeter asks the far end while people look, and the answer is kept beside
the call.

Of a push two steps at most: the commits that it replaces or builds on, with their folders; then the contents that are compared.
Of a write of JSON one: what a ``GET`` of the same URL shows, where policy lets the workspace see it.
``context_state`` of a review is NULL where there is nothing to ask, ``asked`` until ``context_at``, and at the end ``read`` or
``unreadable``. Only a review that is ``pending`` changes: what people have approved stays as they saw it.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import Row, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.review_read_back import ASKED_FOR
from saw.broker.review_states import Moves, get_review, review_key, stored, unknown_review
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.schema import reviews
from saw.broker.store import Transaction
from saw.policy.gitproto import PushUnreadable
from saw.review.digest import request_digest
from saw.review.git_push import PushShown, show_push
from saw.review.messages import Context, ContextResult, PushContext, ReadContext, ReadState, ReviewedCall, StateContext
from saw.review.read_back import PUSH
from saw.review.render import context_kind, render
from saw.review.state_diff import state_of
from saw.review.statement import render_digest

GIVE_UP = timedelta(minutes=10)
"""How long a far end that does not answer is asked again, from when the review was opened."""
LAST_STEP = 2
MOST_TEXTS = 32
"""Most texts of pushes that are remembered."""


class Contexts:
    """The questions, by perimeter."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)

    def give(self, caller: Caller) -> ReadContext | ReadState | None:
        """Return what the calling perimeter shall read, None when there is nothing now."""
        now = self._s.clock()
        due = (
            (reviews.c.perimeter == caller.principal)
            & (reviews.c.state == "pending")
            & (reviews.c.context_state == "asked")
            & (reviews.c.context_at <= iso(now))
        )
        query = select(reviews.c.id).where(due).order_by(reviews.c.opened_at, reviews.c.id).limit(16)
        with self._s.store.read() as connection:
            waiting = connection.execute(query).scalars().all()
        for identifier in waiting:
            found = self._give(identifier)
            if found is not None:
                return found
        return None

    def told(self, caller: Caller, identifier: str, result: ContextResult) -> dict[str, Any]:
        """Keep what a perimeter read; an answer to nothing that is asked changes nothing.

        Raises :class:`NotFoundError` for another perimeter's review.
        """
        with self._s.store.read() as connection:
            row = get_review(connection, identifier)
        if row.perimeter != caller.principal:
            raise unknown_review(identifier)
        now = self._s.clock()
        if row.state != "pending" or row.context_state != "asked" or row.context_step != result.step:
            return {"recorded": False}
        if result.outcome == "unreached" and now < parse_iso(row.opened_at) + GIVE_UP:
            with self._s.store.write() as tx:
                self._set(tx, row, context_detail=result.detail, context_at=iso(now + ASKED_FOR))
            return {"recorded": True}
        try:
            call, before = self._kept(row)
        except BytesChanged:
            return {"recorded": False}
        if not isinstance(before, PushContext):
            self._end(caller, row, call, _state(result))
            return {"recorded": True}
        if result.outcome == "read":
            made = PushContext(state="read", packs=(*before.packs, result.pack))
            shown = _shown(call, made)
            if row.context_step < LAST_STEP and shown.others:
                more = PushContext(state="asked", packs=made.packs)
                self._end(caller, row, call, more, context_step=row.context_step + 1, context_at=iso(now))
                return {"recorded": True}
        elif before.packs:
            made = PushContext(state="read", detail=result.detail, packs=before.packs)
        else:
            made = PushContext(state="unreadable", detail=result.detail)
        self._end(caller, row, call, made)
        return {"recorded": True}

    def _give(self, identifier: str) -> ReadContext | ReadState | None:
        """Return the question about one review, and have it asked again later; settle what needs no question."""
        now = self._s.clock()
        with self._s.store.read() as connection:
            row = get_review(connection, identifier)
        try:
            call, before = self._kept(row)
        except BytesChanged:
            with self._s.store.write() as tx:
                self._set(
                    tx, row, context_state="unreadable", context_detail="the stored call is not what was reviewed"
                )
            return None
        where: dict[str, Any] = {name: getattr(row, name) for name in ("id", "workspace_id", "policy_digest", "binary")}
        where |= {"scheme": call.scheme, "host": call.host, "port": call.port}
        question: ReadContext | ReadState
        if isinstance(before, PushContext):
            shown = _shown(call, before)
            wants = (shown.commits or shown.others) if row.context_step == 1 else shown.others
            if not wants or not row.path.endswith(PUSH):
                self._end(BROKER, row, call, PushContext(state="read", packs=before.packs))
                return None
            repository = row.path.removesuffix(PUSH)
            question = ReadContext(**where, repository=repository, step=row.context_step, wants=wants)
        else:
            question = ReadState(**where, path=call.path)
        with self._s.store.write() as tx:
            return question if self._set(tx, row, context_at=iso(now + ASKED_FOR)) else None

    def _kept(self, row: Row[Any]) -> tuple[ReviewedCall, Context]:
        with self._s.store.read() as connection:
            raw = stored(connection, row.id, "call")
            call = self._vault.open(row.id, "call", raw or b"", ReviewedCall)
            found = context_of(self._vault, row, call, stored(connection, row.id, "context"))
        return call, found or PushContext(state="asked")

    def _end(self, caller: Caller, row: Row[Any], call: ReviewedCall, made: Context, **values: Any) -> None:
        """Keep what was read. Approvals of what was shown before no longer count (:mod:`saw.broker.review_evidence`)."""
        sealed = self._vault.seal(row.id, "context", made)
        digest = render_digest(render(row.workspace_id, call, made))
        values |= {
            "context": sealed,
            "context_state": made.state,
            "context_detail": made.detail,
            "render_digest": digest,
        }
        with self._s.store.write() as tx:
            before = stored(tx.connection, row.id, "context")
            values["held_bytes"] = row.held_bytes + len(sealed) - len(before or b"")
            if not self._set(tx, row, **values):
                return
            tx.wake(review_key(row.id))
            if made.state != "asked":
                if isinstance(made, PushContext):
                    what, size = "push", sum(len(pack) for pack in made.packs)
                else:
                    what, size = "write", len(made.body)
                said: dict[str, object] = {
                    "context": made.state,
                    "detail": made.detail,
                    "bytes": size,
                    "render_digest": digest,
                }
                self._moves.record(tx, caller, row, f"the state before the {what}: {made.state}", said=said)

    @staticmethod
    def _set(tx: Transaction, row: Row[Any], **values: Any) -> bool:
        """Change a review that is as ``row`` says; tell whether it was."""
        there = (
            (reviews.c.id == row.id)
            & (reviews.c.state == row.state)
            & (reviews.c.context_state == row.context_state)
            & (reviews.c.context_step == row.context_step)
            & (reviews.c.context_at == row.context_at)
            & (reviews.c.held_bytes == row.held_bytes)
        )
        return bool(tx.connection.execute(reviews.update().where(there).values(**values)).rowcount)


class Texts:
    """What reviewers see of calls. A push is taken apart once for each state that it is shown in, since a decision looks at it
    several times."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, bytes], str] = {}

    def of(self, workspace_id: str, call: ReviewedCall, context: Context | None) -> str:
        """Return the text about a call."""
        if context is None:
            return render(workspace_id, call)
        key = (request_digest(workspace_id, call), hashlib.sha256(msgspec.msgpack.encode(context)).digest())
        if key not in self._kept:
            if len(self._kept) >= MOST_TEXTS:
                self._kept.clear()
            self._kept[key] = render(workspace_id, call, context)
        return self._kept[key]


def context_of(vault: Vault, row: Row[Any], call: ReviewedCall, sealed: bytes | None) -> Context | None:
    """Return what the far end was asked about ``call``, that of ``row``; None where nothing is.

    Raises :class:`BytesChanged`. While nothing was read, it is what the row says.
    """
    kind = context_kind(call)
    if row.context_state is None or kind is None:
        return None
    if sealed is None:
        return kind(state=row.context_state, detail=row.context_detail if row.context_state == "unreadable" else "")
    return vault.open(row.id, "context", sealed, kind)


def _state(result: ContextResult) -> StateContext:
    """Return what a perimeter's word about a state comes to."""
    if result.outcome == "read" and result.answer is not None:
        return state_of(result.answer)
    return StateContext(state="unreadable", detail=result.detail or "the perimeter read nothing")


def _shown(call: ReviewedCall, context: PushContext) -> PushShown:
    coding = dict(call.headers).get("content-encoding", "")
    try:
        return show_push(call.body, coding, context)
    except PushUnreadable:
        return PushShown((), (), ())


__all__ = ["GIVE_UP", "Contexts", "Texts", "context_of"]
