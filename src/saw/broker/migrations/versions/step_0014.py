"""What was read back at the far end of an approved push without an answer."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. What has ended before is not asked about unless its bytes are still kept."""
    op.add_column("reviews", sa.Column("read_back", sa.String(length=16)))
    op.add_column("reviews", sa.Column("read_back_detail", sa.Text()))
    op.add_column("reviews", sa.Column("read_back_at", sa.String(length=32)))
    op.add_column("reviews", sa.Column("read_back_since", sa.String(length=32)))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
