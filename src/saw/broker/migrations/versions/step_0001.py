"""The first tables of the broker."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table and the one row of the registry."""
    op.create_table(
        "agents",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("sponsor", sa.String(length=256), nullable=False),
        sa.Column("blueprint", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_agents_workspace_id"), "agents", ["workspace_id"], unique=False)
    op.create_table(
        "audit_events",
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("prev", sa.String(length=64), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("source", "seq"),
    )
    op.create_table(
        "audit_heads",
        sa.Column("source", sa.String(length=64), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("source"),
    )
    op.create_table(
        "certificates",
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("issued_at", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("sha256"),
    )
    op.create_table(
        "challenges",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("ak_pub", sa.LargeBinary(), nullable=False),
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_challenges_workspace_id"), "challenges", ["workspace_id"], unique=False)
    op.create_table(
        "images",
        sa.Column("name", sa.String(length=128), nullable=False),
        sa.Column("image_sha256", sa.String(length=64), nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
        sa.Column("registered_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("name", "image_sha256"),
    )
    op.create_table(
        "nonces",
        sa.Column("nonce_sha256", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("nonce_sha256"),
    )
    op.create_index(op.f("ix_nonces_workspace_id"), "nonces", ["workspace_id"], unique=False)
    op.create_table(
        "registry",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "releases",
        sa.Column("ring", sa.String(length=64), nullable=False),
        sa.Column("blueprint", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("bundle", sa.LargeBinary(), nullable=False),
        sa.Column("lease_ttl_s", sa.Integer(), nullable=False),
        sa.Column("released_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("ring", "blueprint", "revision"),
    )
    op.create_index(op.f("ix_releases_policy_digest"), "releases", ["policy_digest"], unique=False)
    op.create_table(
        "sessions",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("principal", sa.String(length=256), nullable=False),
        sa.Column("key_fingerprint", sa.String(length=64), nullable=False),
        sa.Column("source_address", sa.String(length=256), nullable=True),
        sa.Column("issued_at", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_sessions_workspace_id"), "sessions", ["workspace_id"], unique=False)
    op.create_table(
        "workspaces",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("sponsor", sa.String(length=256), nullable=False),
        sa.Column("blueprint", sa.String(length=64), nullable=False),
        sa.Column("ring", sa.String(length=64), nullable=False),
        sa.Column("image", sa.String(length=128), nullable=False),
        sa.Column("image_sha256", sa.String(length=64), nullable=False),
        sa.Column("agent_id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=False),
        sa.Column("state_since", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.Column("watch_seq", sa.Integer(), nullable=False),
        sa.Column("ek_pub_pem", sa.Text(), nullable=True),
        sa.Column("ak_id", sa.String(length=64), nullable=True),
        sa.Column("ak_pub", sa.LargeBinary(), nullable=True),
        sa.Column("tpm_clock", sa.BigInteger(), nullable=True),
        sa.Column("tpm_reset_count", sa.Integer(), nullable=True),
        sa.Column("tpm_restart_count", sa.Integer(), nullable=True),
        sa.Column("policy_digest", sa.String(length=64), nullable=True),
        sa.Column("lease_expires_at", sa.String(length=32), nullable=True),
        sa.Column("svid_sha256", sa.String(length=64), nullable=True),
        sa.Column("attested_at", sa.String(length=32), nullable=True),
        sa.Column("reported_state", sa.String(length=32), nullable=True),
        sa.Column("reported_digest", sa.String(length=64), nullable=True),
        sa.Column("reported_reason", sa.Text(), nullable=True),
        sa.Column("reported_verified", sa.Boolean(), nullable=True),
        sa.Column("reported_at", sa.String(length=32), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "workspaces_number_in_use",
        "workspaces",
        ["number"],
        unique=True,
        sqlite_where=sa.text("state != 'decommissioned'"),
        postgresql_where=sa.text("state != 'decommissioned'"),
    )
    op.execute("INSERT INTO registry (id, seq) VALUES (1, 0)")


def downgrade() -> None:
    """There is nothing before the first step."""
    raise NotImplementedError("restore a backup instead")
