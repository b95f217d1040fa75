"""Agents with a name, a purpose, claims and a life of their own: what followed whom, who retired it and when."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_LIVING = "state != 'retired'"
_BOUND = "state != 'retired' AND workspace_id != ''"


def upgrade() -> None:
    """Add the columns. Each workspace has its agent in a row, named as its id; it retires with a workspace that has ended."""
    for name, kind in (
        ("name", sa.String(length=64)),
        ("owner", sa.String(length=256)),
        ("purpose", sa.Text()),
        ("harness", sa.String(length=128)),
        ("model", sa.String(length=128)),
    ):
        op.add_column("agents", sa.Column(name, kind, nullable=False, server_default=""))
    counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("agents", sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
    op.add_column("agents", sa.Column("seq", counter, nullable=False, server_default="0"))
    for name, kind in (
        ("predecessor", sa.String(length=64)),
        ("successor", sa.String(length=64)),
        ("retired_at", sa.String(length=32)),
        ("retired_by", sa.String(length=256)),
        ("retired_reason", sa.Text()),
        ("registered_by", sa.String(length=256)),
        ("idempotency_key", sa.String(length=128)),
        ("request_sha256", sa.String(length=64)),
    ):
        op.add_column("agents", sa.Column(name, kind))
    op.execute(
        "INSERT INTO agents (id, workspace_id, sponsor, blueprint, state, created_at) "
        "SELECT agent_id, id, sponsor, blueprint, "
        "CASE state WHEN 'active' THEN 'active' WHEN 'decommissioned' THEN 'retired' ELSE 'registered' END, created_at "
        "FROM workspaces WHERE agent_id NOT IN (SELECT id FROM agents)"
    )
    op.execute("UPDATE agents SET name = id")
    op.execute(
        "UPDATE agents SET "
        "retired_at = (SELECT state_since FROM workspaces WHERE workspaces.id = agents.workspace_id), "
        "retired_reason = (SELECT state_reason FROM workspaces WHERE workspaces.id = agents.workspace_id) "
        "WHERE state = 'retired'"
    )
    op.create_index("agents_seq", "agents", ["seq"])
    op.create_index("agents_request", "agents", ["registered_by", "idempotency_key"], unique=True)
    for name, column, where in (
        ("agents_name_in_use", "name", _LIVING),
        ("agents_one_of_workspace", "workspace_id", _BOUND),
    ):
        op.create_index(
            name, "agents", [column], unique=True, sqlite_where=sa.text(where), postgresql_where=sa.text(where)
        )


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
