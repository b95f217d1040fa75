"""What people are told by webhook and e-mail: the outbox."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table."""
    op.create_table(
        "notifications",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("channel", sa.String(length=64), nullable=False),
        sa.Column("recipient", sa.String(length=256), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("review_id", sa.String(length=64), nullable=False),
        sa.Column("group_name", sa.String(length=256), nullable=False),
        sa.Column("urgent", sa.Boolean(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.Column("next_at", sa.String(length=32), nullable=False),
        sa.Column("until", sa.String(length=32), nullable=False),
        sa.Column("claim", sa.String(length=64)),
        sa.Column("ended_at", sa.String(length=32)),
        sa.Column("error_code", sa.String(length=64)),
        sa.Column("error", sa.String(length=256)),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("notifications_due", "notifications", ["channel", "state", "next_at"])
    op.create_index("notifications_ended", "notifications", ["state", "ended_at"])
    op.create_index("notifications_newest", "notifications", ["created_at", "id"])


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
