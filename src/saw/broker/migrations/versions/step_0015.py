"""What the far end of a push told about the state before it, while people look at it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. For reviews that are open already nothing is asked."""
    op.add_column("reviews", sa.Column("context", sa.LargeBinary()))
    op.add_column("reviews", sa.Column("context_state", sa.String(length=16)))
    op.add_column("reviews", sa.Column("context_detail", sa.Text()))
    op.add_column("reviews", sa.Column("context_at", sa.String(length=32)))
    op.add_column("reviews", sa.Column("context_step", sa.Integer()))
    op.add_column("reviews", sa.Column("render_digest", sa.String(length=64)))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
