"""Audit events have a place in the order of arrival, so that one number says up to where the whole trail was read."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Number what is there: SQLite's row numbers are the order of arrival, elsewhere it is by chain."""
    op.add_column("audit_events", sa.Column("position", sa.BigInteger(), server_default="0", nullable=False))
    order = "rowid" if op.get_bind().dialect.name == "sqlite" else "source, seq"
    op.execute(
        "UPDATE audit_events SET position = numbered.place FROM "  # noqa: S608 - two fixed texts
        f"(SELECT source, seq, row_number() OVER (ORDER BY {order}) AS place FROM audit_events) AS numbered "
        "WHERE numbered.source = audit_events.source AND numbered.seq = audit_events.seq"
    )
    op.create_index("audit_events_position", "audit_events", ["position"], unique=True)


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
