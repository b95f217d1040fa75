"""Signed release records of images, and where each image stands."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the envelope and the state. Records of before are unsigned, so nothing boots by them until they are signed."""
    for column in (
        sa.Column("envelope", sa.Text(), nullable=False, server_default=""),
        sa.Column("state", sa.String(length=32), nullable=False, server_default="candidate"),
        sa.Column("state_reason", sa.Text(), nullable=False, server_default=""),
    ):
        op.add_column("images", column)


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
