"""Reviews: who may decide, calls that wait, decisions, nonces."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "reviewers",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("groups", sa.Text(), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("key_id", sa.String(length=64), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("added_by", sa.String(length=256), nullable=False),
        sa.Column("added_at", sa.String(length=32), nullable=False),
        sa.Column("retired_by", sa.String(length=256), nullable=True),
        sa.Column("retired_at", sa.String(length=32), nullable=True),
        sa.Column("retired_reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("key_sha256"),
    )
    op.create_table(
        "reviews",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("workspace_id", sa.String(length=64), nullable=False),
        sa.Column("agent_id", sa.String(length=64), nullable=False),
        sa.Column("sponsor", sa.String(length=256), nullable=False),
        sa.Column("perimeter", sa.String(length=256), nullable=False),
        sa.Column("policy_digest", sa.String(length=64), nullable=False),
        sa.Column("request_digest", sa.String(length=64), nullable=False),
        sa.Column("group_name", sa.String(length=256), nullable=False),
        sa.Column("quorum", sa.Integer(), nullable=False),
        sa.Column("rule", sa.String(length=256), nullable=False),
        sa.Column("delegation", sa.String(length=64), nullable=False),
        sa.Column("binary", sa.Text(), nullable=False),
        sa.Column("request_id", sa.String(length=64), nullable=False),
        sa.Column("method", sa.String(length=32), nullable=False),
        sa.Column("scheme", sa.String(length=8), nullable=False),
        sa.Column("host", sa.String(length=256), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("call", sa.LargeBinary(), nullable=True),
        sa.Column("held_bytes", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=32), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("opened_at", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.Column("approved_at", sa.String(length=32), nullable=True),
        sa.Column("claimed_at", sa.String(length=32), nullable=True),
        sa.Column("claim_sha256", sa.String(length=64), nullable=True),
        sa.Column("claim_ends_at", sa.String(length=32), nullable=True),
        sa.Column("ended_at", sa.String(length=32), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("answer_status", sa.Integer(), nullable=True),
        sa.Column("answer_sha256", sa.String(length=64), nullable=True),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_reviews_request_digest"), "reviews", ["request_digest"], unique=False)
    op.create_index(op.f("ix_reviews_state"), "reviews", ["state"], unique=False)
    op.create_index(op.f("ix_reviews_workspace_id"), "reviews", ["workspace_id"], unique=False)
    op.create_table(
        "review_decisions",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("review_id", sa.String(length=64), nullable=False),
        sa.Column("approver", sa.String(length=256), nullable=False),
        sa.Column("decision", sa.String(length=32), nullable=False),
        sa.Column("statement", sa.Text(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("not_after", sa.String(length=32), nullable=False),
        sa.Column("decided_by", sa.String(length=256), nullable=False),
        sa.Column("decided_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(op.f("ix_review_decisions_review_id"), "review_decisions", ["review_id"], unique=False)
    op.create_table(
        "review_nonces",
        sa.Column("review_id", sa.String(length=64), nullable=False),
        sa.Column("approver", sa.String(length=256), nullable=False),
        sa.Column("nonce", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("review_id", "approver"),
    )


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
