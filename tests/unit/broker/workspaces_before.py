"""A database of a broker from before workspaces counted their versions, and what its workspaces are afterwards."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, func, select, text

from saw.broker.clock import iso
from saw.broker.schema import workspace_requests, workspaces

STAMP = iso(datetime(2026, 11, 1, tzinfo=UTC))
AFTER = ([("ws-a", "active", 1), ("ws-b", "decommissioned", 1)], 0)


def fill_before(connection: Connection) -> None:
    """Make the tables as they were before the step, and put down two workspaces."""
    config = Config()
    config.set_main_option("script_location", "saw.broker:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "0017")
    for number, (name, state, _) in enumerate(AFTER[0], 1):
        connection.execute(
            text(
                "INSERT INTO workspaces (id, number, sponsor, blueprint, ring, image, image_sha256, agent_id, state, "
                "state_reason, state_since, created_at, watch_seq) VALUES (:id, :number, 'ada', 'coding', 'stable', 'i', "
                "'1', :agent, :state, 'as it was', :stamp, :stamp, 0)"
            ),
            {"id": name, "number": number, "agent": f"agent-{number}", "state": state, "stamp": STAMP},
        )


def found_after(connection: Connection) -> tuple[list[tuple[Any, ...]], int]:
    """Return what is compared with :data:`AFTER`."""
    rows = connection.execute(select(workspaces).order_by(workspaces.c.id)).all()
    kept = connection.execute(select(func.count()).select_from(workspace_requests)).scalar_one()
    return [(row.id, row.state, row.version) for row in rows], kept
