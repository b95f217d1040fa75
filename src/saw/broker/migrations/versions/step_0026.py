"""What agents used of their workspaces, by day and engagement, and what each workspace told last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None

_COUNTER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
_GROWING = ("cpu_ms", "read_bytes", "written_bytes", "oom_kills", "refused_tasks")


def upgrade() -> None:
    """Add the tables. Reports of before are in the trail and are not counted."""
    op.create_table(
        "resource_use",
        sa.Column("workspace_id", sa.String(length=64), primary_key=True),
        sa.Column("day", sa.String(length=10), primary_key=True),
        sa.Column("engagement", sa.String(length=64), primary_key=True),
        *(sa.Column(name, _COUNTER, nullable=False) for name in _GROWING),
        sa.Column("memory_peak", _COUNTER, nullable=False),
    )
    op.create_index("ix_resource_use_day", "resource_use", ["day"])
    op.create_table(
        "resource_boots",
        sa.Column("workspace_id", sa.String(length=64), primary_key=True),
        sa.Column("boot", sa.String(length=32), nullable=False),
        *(sa.Column(name, _COUNTER, nullable=False) for name in _GROWING),
    )


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
