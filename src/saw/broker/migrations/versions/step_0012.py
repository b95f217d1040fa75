"""Lifecycle jobs and what happened in their runs."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=64), primary_key=True),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("lane", sa.String(length=8), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("asked_by", sa.String(length=256), nullable=False),
        sa.Column("idempotency_key", sa.String(length=128), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("parameters", sa.Text(), nullable=False),
        sa.Column("image_sha256", sa.String(length=64)),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("asked_at", sa.String(length=32), nullable=False),
        sa.Column("queued_at", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.String(length=32)),
        sa.Column("ended_at", sa.String(length=32)),
        sa.Column("executor", sa.String(length=64)),
        sa.Column("external_id", sa.String(length=256)),
        sa.Column("worker", sa.String(length=256)),
        sa.Column("claim_sha256", sa.String(length=64)),
        sa.Column("lease_ends_at", sa.String(length=32)),
        sa.Column("cancel_asked_at", sa.String(length=32)),
        sa.Column("cancel_reason", sa.String(length=256)),
        sa.Column("progress", sa.Text(), nullable=False),
        sa.Column("error", sa.Text()),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.UniqueConstraint("asked_by", "idempotency_key"),
    )
    op.create_index("ix_jobs_workspace_id", "jobs", ["workspace_id"])
    op.create_index("ix_jobs_state", "jobs", ["state"])
    live = sa.text("state IN ('queued', 'running')")
    op.create_index(
        "jobs_one_live",
        "jobs",
        ["workspace_id", "lane"],
        unique=True,
        sqlite_where=live,
        postgresql_where=live,
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.String(length=64), primary_key=True),
        sa.Column("seq", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("at", sa.String(length=32), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
    )


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
