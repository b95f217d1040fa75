"""Decisions about sponsors have a number of the register, for whoever follows sponsors; which root the trail has told of last."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns. Decisions of before have number 0: whoever begins to follow reads the list first. Roots that are in the
    repository are told of once more at the next start: which of them the trail has can be removed from it by retention."""
    counter = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("sponsors", sa.Column("seq", counter, nullable=False, server_default="0"))
    op.create_index("sponsors_seq", "sponsors", ["seq"])
    op.add_column("registry", sa.Column("root_version", sa.Integer(), nullable=False, server_default="0"))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
