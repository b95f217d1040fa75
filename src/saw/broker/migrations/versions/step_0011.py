"""When the recording of a session came from its bastion, when it was removed, and who holds it against that."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. What was recorded before stays where it is."""
    op.add_column("sessions", sa.Column("recording_stored_at", sa.String(length=32)))
    op.add_column("sessions", sa.Column("recording_removed_at", sa.String(length=32)))
    op.add_column("sessions", sa.Column("recording_held_at", sa.String(length=32)))
    op.add_column("sessions", sa.Column("recording_held_by", sa.String(length=256)))
    op.add_column("sessions", sa.Column("recording_held_reason", sa.String(length=256)))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
