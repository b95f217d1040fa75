"""Workspaces count their versions, and requests about them may carry a key."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add column and table. Every workspace that is there begins at version 1."""
    op.add_column("workspaces", sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
    op.create_table(
        "workspace_requests",
        sa.Column("asked_by", sa.String(length=256), nullable=False),
        sa.Column("idempotency_key", sa.String(length=128), nullable=False),
        sa.Column("request_sha256", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("asked_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("asked_by", "idempotency_key"),
    )
    op.create_index("ix_workspace_requests_asked_at", "workspace_requests", ["asked_at"])


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
