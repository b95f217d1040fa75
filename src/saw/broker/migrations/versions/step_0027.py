"""Certificates of perimeters, bastions and machines, and workspaces that changed, are found without reading all there are."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two indices."""
    others = sa.text("kind != 'svid'")
    op.create_index(
        "certificates_of_parts",
        "certificates",
        ["kind", "name", "issued_at"],
        sqlite_where=others,
        postgresql_where=others,
    )
    op.create_index("workspaces_watch_seq", "workspaces", ["watch_seq", "id"])


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
