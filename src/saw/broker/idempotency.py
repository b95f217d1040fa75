"""Requests that carry a key of whoever asks: the same key with the same request is answered again, with another one refused.

Changes may carry the version of what they change, as the caller has seen it: they are refused when it is another one now.
"""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import Column, Connection, Row, delete, select

from saw.broker.clock import iso
from saw.broker.context import Caller
from saw.broker.errors import ConflictError
from saw.broker.schema import workspace_requests
from saw.broker.store import Transaction

KEPT = timedelta(days=30)
"""How long the key of a request about a workspace is known."""

Version = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


def told_before(connection: Connection, asked_by: Column[Any], caller: str, key: str, digest: str) -> Row[Any] | None:
    """Return the row that ``caller`` made with ``key``, None where there is none.

    ``asked_by`` is the column that says who made a row; ``idempotency_key`` and ``request_sha256`` stand beside it. Raises
    :class:`ConflictError` when the key was used for a request with another ``digest``.
    """
    table = asked_by.table
    query = select(table).where((asked_by == caller) & (table.c.idempotency_key == key))
    row = connection.execute(query).one_or_none()
    if row is not None and row.request_sha256 != digest:
        about = row.id if "id" in table.c else row.workspace_id
        raise ConflictError(
            f"the idempotency key was used for another request ({about})",
            cure="use a new key for a new request",
            code="idempotency_mismatch",
        )
    return row


def require_version(row: Row[Any], version: int | None) -> None:
    """Raise :class:`ConflictError` when ``version`` is given and ``row`` has another one, which ``details`` names."""
    if version is not None and row.version != version:
        raise ConflictError(
            f"{row.id} is at version {row.version}, not {version}",
            cure="look at it again: somebody changed it meanwhile",
            code="version_conflict",
            details={"version": row.version},
        )


def take_request(tx: Transaction, caller: Caller, now: datetime, key: str | None, *request: object) -> bool:
    """Remember that ``caller`` asks for ``request`` under ``key``; tell whether it was done before, so that it is not done again.

    ``request`` is what is asked for: a word for it, the workspace and the body. A transaction that fails remembers nothing.
    Raises :class:`ConflictError` when the key was used for another request.
    """
    if key is None:
        return False
    table = workspace_requests
    tx.connection.execute(delete(table).where(table.c.asked_at < iso(now - KEPT)))
    digest = hashlib.sha256(msgspec.json.encode(request)).hexdigest()
    if told_before(tx.connection, table.c.asked_by, caller.principal, key, digest) is not None:
        return True
    tx.connection.execute(
        table.insert().values(
            asked_by=caller.principal,
            idempotency_key=key,
            request_sha256=digest,
            workspace_id=request[1],
            asked_at=iso(now),
        )
    )
    return False
