"""Numbers of workspaces that were given back, found without a look at every workspace; and how strong a sign-in was."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table, with what is free below the highest number in use. Every workspace keeps its number.

    Of a sign-in from before nothing is known, so it is not strong.
    """
    op.add_column("sso_sessions", sa.Column("acr", sa.String(length=255), nullable=False, server_default=""))
    freed = op.create_table("freed_numbers", sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False))
    rows = sa.table("workspaces", sa.column("number", sa.Integer()), sa.column("state", sa.String()))
    used = set(op.get_bind().execute(sa.select(rows.c.number).where(rows.c.state != "decommissioned")).scalars())
    free = [{"number": number} for number in range(1, max(used, default=0)) if number not in used]
    if free:
        op.bulk_insert(freed, free)


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
