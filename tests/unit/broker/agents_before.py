"""A database of a broker from before agents were things of their own, and what its agents are afterwards."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, select, text

from saw.broker.clock import iso
from saw.broker.schema import agents

STAMP = iso(datetime(2026, 11, 1, tzinfo=UTC))
#: Workspace, its state, and the state of its agent; the last one lost the row of its agent.
_BEFORE = (("ws-a", "active", "active"), ("ws-b", "decommissioned", "retired"), ("ws-c", "stopped", None))
AFTER = [
    ("agent-1", "agent-1", "ws-a", "active", 1, None),
    ("agent-2", "agent-2", "ws-b", "retired", 1, STAMP),
    ("agent-3", "agent-3", "ws-c", "registered", 1, None),
]


def fill_before(connection: Connection) -> None:
    """Make the tables as they were before the step, and put down three workspaces."""
    config = Config()
    config.set_main_option("script_location", "saw.broker:migrations")
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, "0016")
    for number, (name, state, agent) in enumerate(_BEFORE, 1):
        told = {"id": name, "number": number, "agent": f"agent-{number}", "state": state, "stamp": STAMP}
        connection.execute(
            text(
                "INSERT INTO workspaces (id, number, sponsor, blueprint, ring, image, image_sha256, agent_id, state, "
                "state_reason, state_since, created_at, watch_seq) VALUES (:id, :number, 'ada', 'coding', 'stable', 'i', "
                "'1', :agent, :state, 'as it was', :stamp, :stamp, 0)"
            ),
            told,
        )
        if agent is not None:
            connection.execute(
                text(
                    "INSERT INTO agents (id, workspace_id, sponsor, blueprint, state, created_at) "
                    "VALUES (:agent, :id, 'ada', 'coding', :is, :stamp)"
                ),
                {**told, "is": agent},
            )


def found_after(connection: Connection) -> list[tuple[Any, ...]]:
    """Return what is compared with :data:`AFTER`."""
    rows = connection.execute(select(agents).order_by(agents.c.id)).all()
    return [(row.id, row.name, row.workspace_id, row.state, row.version, row.retired_at) for row in rows]
