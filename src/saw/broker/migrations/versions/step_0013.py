"""Counters of 64 bits on PostgreSQL (SQLite's have them), and whose database this is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

WIDER = (
    ("registry", "seq"),
    ("workspaces", "watch_seq"),
    ("workspaces", "tpm_reset_count"),
    ("workspaces", "tpm_restart_count"),
    ("audit_events", "seq"),
    ("audit_heads", "seq"),
    ("policy_calls", "allowed"),
    ("policy_calls", "denied"),
    ("passkeys", "sign_count"),
)


def upgrade() -> None:
    """Widen what counts up, or is an unsigned number of 32 bits."""
    op.add_column("registry", sa.Column("installation", sa.String(length=64)))
    if op.get_bind().dialect.name == "postgresql":
        for table, column in WIDER:
            op.alter_column(table, column, type_=sa.BigInteger())
        # Made from a whole number: the key counts up by itself.
        for table in ("policy_states", "review_decisions"):
            op.alter_column(table, "id", type_=sa.BigInteger())


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
