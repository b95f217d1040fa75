"""Requests that carry a key of whoever asks: the same key with the same request is answered again, with another one refused."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, Row, select

from saw.broker.errors import ConflictError


def told_before(connection: Connection, asked_by: Column[Any], caller: str, key: str, digest: str) -> Row[Any] | None:
    """Return the row that ``caller`` made with ``key``, None where there is none.

    ``asked_by`` is the column that says who made a row; ``idempotency_key`` and ``request_sha256`` stand beside it. Raises
    :class:`ConflictError` when the key was used for a request with another ``digest``.
    """
    table = asked_by.table
    query = select(table).where((asked_by == caller) & (table.c.idempotency_key == key))
    row = connection.execute(query).one_or_none()
    if row is not None and row.request_sha256 != digest:
        raise ConflictError(
            f"the idempotency key was used for another request ({row.id})",
            cure="use a new key for a new request",
            code="idempotency_mismatch",
        )
    return row
