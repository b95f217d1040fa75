"""Delegations count their changes, and may be asked for under a key; which of them names tools."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. None so far names tools; one that was revoked has changed once."""
    op.add_column("delegations", sa.Column("version", sa.Integer(), nullable=False, server_default="1"))
    op.add_column(
        "delegations",
        sa.Column(
            "seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False, server_default=sa.text("0")
        ),
    )
    op.add_column("delegations", sa.Column("names_tools", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("delegations", sa.Column("idempotency_key", sa.String(length=128)))
    op.add_column("delegations", sa.Column("request_sha256", sa.String(length=64)))
    op.create_index("delegations_seq", "delegations", ["seq"])
    op.create_index("delegations_issued", "delegations", ["issued_at", "id"])
    op.create_index("delegations_request", "delegations", ["issued_by", "idempotency_key"], unique=True)
    rows = sa.table("delegations", sa.column("version"), sa.column("revoked_at"))
    op.execute(rows.update().where(rows.c.revoked_at.is_not(None)).values(version=2))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
