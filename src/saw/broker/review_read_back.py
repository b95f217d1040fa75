"""Reading back what became of an approved push without an answer: asked of its perimeter, never sent again (REV-03).

A review stays ``unknown``; what was found is kept beside it. ``read_back`` of its row is NULL until somebody is asked, then
``asked`` until ``read_back_at``, and at the end ``arrived``, ``not_arrived`` or ``undecided``.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Row, select

from saw.broker.clock import iso, parse_iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ConflictError
from saw.broker.review_states import Moves, get_review, stored, unknown_review
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.schema import reviews
from saw.broker.store import Transaction
from saw.review.messages import ReadBack, ReadBackResult, ReviewedCall
from saw.review.read_back import PUSH

SETTLE = timedelta(seconds=20)
"""How long after its end a push is left alone: what is still on its way shall have arrived."""
ASKED_FOR = timedelta(seconds=60)
"""How long a perimeter has to tell what it read; then it is asked again."""
GIVE_UP = timedelta(hours=1)
"""How long a far end that cannot be read is asked again, from the end of the review or from the last word of an operator."""


class ReadAgain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``POST /v1/reviews/{id}/read-back``: read back once more."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class ReadBacks:
    """The questions, by perimeter."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)

    def give(self, caller: Caller) -> ReadBack | None:
        """Return a push that the calling perimeter shall look for, None when there is none now."""
        now = iso(self._s.clock())
        due = (
            (reviews.c.perimeter == caller.principal)
            & (reviews.c.state == "unknown")
            & (reviews.c.kind == "call")
            & (reviews.c.method == "POST")
            & reviews.c.path.endswith(PUSH, autoescape=True)
            & reviews.c.call.is_not(None)
            & (
                (reviews.c.read_back.is_(None) & (reviews.c.ended_at <= iso(self._s.clock() - SETTLE)))
                | ((reviews.c.read_back == "asked") & (reviews.c.read_back_at <= now))
            )
        )
        query = select(reviews.c.id).where(due).order_by(reviews.c.ended_at, reviews.c.id)
        with self._s.store.read() as connection:
            if connection.execute(query).first() is None:
                return None
        with self._s.store.write() as tx:
            for identifier in tx.connection.execute(query).scalars().all():
                found = self._ask(tx, get_review(tx.connection, identifier))
                if found is not None:
                    return found
        return None

    def told(self, caller: Caller, identifier: str, result: ReadBackResult) -> dict[str, Any]:
        """Keep what a perimeter read; an answer to nothing that is asked changes nothing.

        Raises :class:`NotFoundError` for another perimeter's review.
        """
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_review(tx.connection, identifier)
            if row.perimeter != caller.principal:
                raise unknown_review(identifier)
            if row.state != "unknown" or row.read_back != "asked":
                return {"recorded": False}
            since = parse_iso(row.read_back_since or row.ended_at)
            if result.outcome == "unreached" and now < since + GIVE_UP:
                self._set(tx, row, "asked", result.detail, at=iso(now + ASKED_FOR))
                return {"recorded": True}
            outcome = "undecided" if result.outcome == "unreached" else result.outcome
            self._end(tx, caller, row, outcome, result.detail)
        return {"recorded": True}

    def again(self, caller: Caller, identifier: str, body: ReadAgain) -> dict[str, Any]:
        """Ask once more about a push that is ``unknown``.

        Raises :class:`ConflictError` when it is not, when it is no push, or when its bytes are no longer kept.
        """
        with self._s.store.write() as tx:
            row = get_review(tx.connection, identifier)
            kept = stored(tx.connection, identifier, "call") is not None
            if row.state != "unknown" or not kept or row.kind != "call" or not row.path.endswith(PUSH):
                why = "its bytes are no longer kept" if row.state == "unknown" and not kept else f"it is {row.state}"
                raise ConflictError(
                    f"{identifier} cannot be read back: {why}"
                    + ("" if row.path.endswith(PUSH) else ", and no Git push"),
                    cure="look at the far end yourself",
                    code="nothing_to_read_back",
                )
            now = iso(self._s.clock())
            self._set(tx, row, "asked", "", at=now, since=now)
            self._moves.record(tx, caller, row, f"read back once more: {body.reason}")
        return {"id": identifier, "read_back": "asked"}

    def _ask(self, tx: Transaction, row: Row[Any]) -> ReadBack | None:
        try:
            call = self._vault.open(row.id, "call", stored(tx.connection, row.id, "call") or b"", ReviewedCall)
        except BytesChanged:
            self._set(tx, row, "undecided", "the stored call is not what was reviewed", at=iso(self._s.clock()))
            return None
        self._set(tx, row, "asked", row.read_back_detail or "", at=iso(self._s.clock() + ASKED_FOR))
        return ReadBack(
            id=row.id, workspace_id=row.workspace_id, policy_digest=row.policy_digest, call=call, binary=row.binary
        )

    def _end(self, tx: Transaction, caller: Caller, row: Row[Any], outcome: str, detail: str) -> None:
        self._set(tx, row, outcome, detail, at=iso(self._s.clock()))
        said: dict[str, object] = {"read_back": outcome, "detail": detail}
        self._moves.record(tx, caller, row, f"read back: {outcome}", said=said)

    @staticmethod
    def _set(tx: Transaction, row: Row[Any], outcome: str, detail: str, *, at: str, since: str | None = None) -> None:
        values = {"read_back": outcome, "read_back_detail": detail, "read_back_at": at}
        if since is not None:
            values["read_back_since"] = since
        tx.connection.execute(reviews.update().where(reviews.c.id == row.id).values(**values))


def read_back_words(row: Row[Any]) -> str:
    """Return what was read back of a review, for people and agents; empty when nothing was."""
    if row.read_back in {None, "asked"}:
        return ""
    word = str(row.read_back).replace("_", " ")
    return f"read back: {word}" + (f" ({row.read_back_detail})" if row.read_back_detail else "")


__all__ = ["ReadAgain", "ReadBacks", "read_back_words"]
