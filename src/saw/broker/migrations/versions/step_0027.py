"""Certificates of perimeters, bastions and machines, and workspaces that changed, are found without reading all there are."""

from __future__ import annotations

from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the two indices."""
    op.create_index("certificates_of_name", "certificates", ["kind", "name", "expires_at"])
    op.create_index("workspaces_watch_seq", "workspaces", ["watch_seq", "id"])


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
