"""Grants of ports of workspaces, and the sessions by which they are used."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table and the columns of sessions; no session so far was one of a port."""
    op.create_table(
        "forward_grants",
        sa.Column("id", sa.String(length=64), primary_key=True),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("grantee", sa.String(length=256), nullable=False),
        sa.Column("reason", sa.String(length=256), nullable=False),
        sa.Column("granted_by", sa.String(length=256), nullable=False),
        sa.Column("granted_at", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.Column("revoked_by", sa.String(length=256)),
        sa.Column("revoked_at", sa.String(length=32)),
        sa.Column("revoked_reason", sa.String(length=256)),
    )
    op.create_index("ix_forward_grants_workspace_id", "forward_grants", ["workspace_id"])
    op.add_column("sessions", sa.Column("forward_port", sa.Integer()))
    op.add_column("sessions", sa.Column("forward_grant", sa.String(length=64)))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
