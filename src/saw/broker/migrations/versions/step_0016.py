"""When each audit event arrived, what of the trail is known to be signed, and legal holds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables. Events that are there already arrived when they say that they happened, else now."""
    op.add_column("audit_events", sa.Column("at", sa.BigInteger()))
    if op.get_bind().dialect.name == "postgresql":
        said, now = "CAST(event AS json) ->> 'time'", "CAST(extract(epoch FROM now()) * 1000 AS bigint)"
        known = f"{said} ~ '^[0-9]{{1,15}}$'"
    else:
        said, now = "json_extract(event, '$.time')", "CAST(strftime('%s', 'now') AS INTEGER) * 1000"
        known = "json_type(event, '$.time') = 'integer'"
    at = f"CASE WHEN {known} THEN CAST({said} AS bigint) ELSE {now} END"
    op.execute(f"UPDATE audit_events SET at = {at}")  # noqa: S608 - fixed texts
    op.create_index("audit_events_at", "audit_events", ["at", "position"])
    op.create_table(
        "audit_covered",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("edge", sa.Text(), nullable=False),
        sa.Column("signed_size", sa.BigInteger(), nullable=False),
        sa.Column("signed_root", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "audit_holds",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64)),
        sa.Column("since", sa.String(length=32)),
        sa.Column("until", sa.String(length=32)),
        sa.Column("reason", sa.String(length=256), nullable=False),
        sa.Column("added_by", sa.String(length=256), nullable=False),
        sa.Column("added_at", sa.String(length=32), nullable=False),
        sa.Column("released_by", sa.String(length=256)),
        sa.Column("released_at", sa.String(length=32)),
        sa.Column("released_reason", sa.String(length=256)),
        sa.PrimaryKeyConstraint("id"),
    )


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
