"""Rollouts of releases: offers, states, counted calls, rollbacks in escrow."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables of the rollout."""
    op.create_table(
        "rollouts",
        sa.Column("ring", sa.String(length=64), nullable=False),
        sa.Column("blueprint", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("previous_revision", sa.Integer(), nullable=True),
        sa.Column("previous_digest", sa.String(length=64), nullable=True),
        sa.Column("returns_to", sa.Integer(), nullable=True),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("state_by", sa.String(length=256), nullable=False),
        sa.Column("state_since", sa.String(length=32), nullable=False),
        sa.Column("opened_at", sa.String(length=32), nullable=False),
        sa.Column("everyone", sa.Boolean(), nullable=False),
        sa.Column("rollback_due", sa.Boolean(), nullable=False),
        sa.Column("warned", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("ring", "blueprint", "revision"),
    )
    op.create_index(op.f("ix_rollouts_policy_digest"), "rollouts", ["policy_digest"], unique=False)
    op.create_table(
        "rollout_members",
        sa.Column("ring", sa.String(length=64), nullable=False),
        sa.Column("blueprint", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("offered_at", sa.String(length=32), nullable=False),
        sa.Column("said_at", sa.String(length=32), nullable=False),
        sa.Column("silent", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("ring", "blueprint", "revision", "workspace_id"),
    )
    op.create_table(
        "policy_states",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("verified", sa.Boolean(), nullable=False),
        sa.Column("at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_policy_states_workspace_id"), "policy_states", ["workspace_id"], unique=False)
    op.create_table(
        "policy_calls",
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("allowed", sa.Integer(), nullable=False),
        sa.Column("denied", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("workspace_id", "policy_digest"),
    )
    op.create_table(
        "rollbacks",
        sa.Column("ring", sa.String(length=64), nullable=False),
        sa.Column("blueprint", sa.String(length=64), nullable=False),
        sa.Column("revision", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("returns_to", sa.Integer(), nullable=False),
        sa.Column("publication", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("deposited_by", sa.String(length=256), nullable=False),
        sa.Column("deposited_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("ring", "blueprint", "revision"),
    )


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
