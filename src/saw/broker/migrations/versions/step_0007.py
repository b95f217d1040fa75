"""Sessions through a bastion: redeemed once, ended with a reason, with the digest of their recording."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. Sessions of before went to their workspace directly."""
    for column in (
        sa.Column("kind", sa.String(length=16), server_default="direct", nullable=False),
        sa.Column("person", sa.String(length=256), server_default="", nullable=False),
        sa.Column("sso_session", sa.String(length=64), server_default="", nullable=False),
        sa.Column("command", sa.Text(), nullable=True),
        sa.Column("terminal", sa.Boolean(), nullable=True),
        sa.Column("client_address", sa.String(length=64), nullable=True),
        sa.Column("bastion", sa.String(length=256), nullable=True),
        sa.Column("redeemed_at", sa.String(length=32), nullable=True),
        sa.Column("ends_at", sa.String(length=32), nullable=True),
        sa.Column("seen_at", sa.String(length=32), nullable=True),
        sa.Column("end_reason", sa.String(length=256), nullable=True),
        sa.Column("ended_at", sa.String(length=32), nullable=True),
        sa.Column("closed_at", sa.String(length=32), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("bytes_in", sa.BigInteger(), nullable=True),
        sa.Column("bytes_out", sa.BigInteger(), nullable=True),
        sa.Column("recording_key", sa.LargeBinary(), nullable=True),
        sa.Column("recording_chunks", sa.BigInteger(), nullable=True),
        sa.Column("recording_digest", sa.String(length=64), nullable=True),
    ):
        op.add_column("sessions", column)


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
