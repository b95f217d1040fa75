"""A database of a broker from before delegations counted their changes, and what its delegations are afterwards."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, select, text

from saw.broker.clock import iso
from saw.broker.schema import delegations

STAMP = iso(datetime(2026, 11, 1, tzinfo=UTC))
AFTER = [("dlg-a", None, 1, 0, False), ("dlg-b", STAMP, 2, 0, False)]


def fill_before(connection: Connection) -> None:
    """Make the tables as they were before the step, and put down a delegation that counts and one that was revoked."""
    config = Config()
    config.set_main_option("script_location", "saw.broker:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "0022")
    for name, revoked, *_ in AFTER:
        connection.execute(
            text(
                "INSERT INTO delegations (id, workspace_id, record, statement, issued_by, issued_at, expires_at, revoked_at) "
                "VALUES (:id, 'ws-a', '{}', 's', 'operator:root', :stamp, :stamp, :revoked)"
            ),
            {"id": name, "stamp": STAMP, "revoked": revoked},
        )


def found_after(connection: Connection) -> list[tuple[Any, ...]]:
    """Return what is compared with :data:`AFTER`."""
    rows = connection.execute(select(delegations).order_by(delegations.c.id)).all()
    return [(row.id, row.revoked_at, row.version, row.seq, row.names_tools) for row in rows]
