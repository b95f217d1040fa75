"""Reviews are of two kinds: calls of agents, and changes to the fleet."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """All that is there are calls."""
    op.add_column("reviews", sa.Column("kind", sa.String(length=16), server_default="call", nullable=False))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
