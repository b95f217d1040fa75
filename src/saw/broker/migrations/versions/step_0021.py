"""Break-glass: that a review was let through by its keys, and the after-review that it owes since."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; no glass was broken before."""
    for name, length in (("broken_at", 32), ("after_state", 16), ("after_due_at", 32), ("after_at", 32)):
        op.add_column("reviews", sa.Column(name, sa.String(length=length)))
    op.add_column("reviews", sa.Column("broken_keys", sa.Integer()))
    op.create_index("ix_reviews_after_state", "reviews", ["after_state"])


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
