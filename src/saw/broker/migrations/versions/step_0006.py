"""Single sign-on: people, passkeys, sessions, sign-ins that have begun; and how a decision was signed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables. Decisions of before were signed with registered keys."""
    op.create_table(
        "passkeys",
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("person", sa.String(length=256), nullable=False),
        sa.Column("credential_id", sa.String(length=1400), nullable=False),
        sa.Column("label", sa.String(length=64), nullable=False),
        sa.Column("public_key", sa.Text(), nullable=False),
        sa.Column("key_sha256", sa.String(length=64), nullable=False),
        sa.Column("sign_count", sa.Integer(), nullable=False),
        sa.Column("added_at", sa.String(length=32), nullable=False),
        sa.Column("used_at", sa.String(length=32), nullable=True),
        sa.Column("removed_at", sa.String(length=32), nullable=True),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("credential_id"),
        sa.UniqueConstraint("key_sha256"),
    )
    op.create_index(op.f("ix_passkeys_person"), "passkeys", ["person"], unique=False)
    op.create_table(
        "people",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("issuer", sa.String(length=512), nullable=False),
        sa.Column("subject", sa.String(length=256), nullable=False),
        sa.Column("groups", sa.Text(), nullable=False),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("first_seen_at", sa.String(length=32), nullable=False),
        sa.Column("checked_at", sa.String(length=32), nullable=False),
        sa.Column("entitled_until", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("name"),
        sa.UniqueConstraint("issuer", "subject"),
    )
    op.create_table(
        "sso_logins",
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("browser_sha256", sa.String(length=64), nullable=False),
        sa.Column("sealed", sa.LargeBinary(), nullable=False),
        sa.Column("poll_at", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("secret_sha256"),
    )
    op.create_index(op.f("ix_sso_logins_expires_at"), "sso_logins", ["expires_at"], unique=False)
    op.create_table(
        "sso_logout_tokens",
        sa.Column("jti_sha256", sa.String(length=64), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.PrimaryKeyConstraint("jti_sha256"),
    )
    op.create_table(
        "sso_sessions",
        sa.Column("secret_sha256", sa.String(length=64), nullable=False),
        sa.Column("id", sa.String(length=64), nullable=False),
        sa.Column("person", sa.String(length=256), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("provider_sid", sa.String(length=256), nullable=False),
        sa.Column("auth_time", sa.String(length=32), nullable=False),
        sa.Column("created_at", sa.String(length=32), nullable=False),
        sa.Column("seen_at", sa.String(length=32), nullable=False),
        sa.Column("checked_at", sa.String(length=32), nullable=False),
        sa.Column("expires_at", sa.String(length=32), nullable=False),
        sa.Column("refresh", sa.LargeBinary(), nullable=True),
        sa.Column("challenge", sa.String(length=64), nullable=True),
        sa.Column("challenge_until", sa.String(length=32), nullable=True),
        sa.PrimaryKeyConstraint("secret_sha256"),
        sa.UniqueConstraint("id"),
    )
    op.create_index(op.f("ix_sso_sessions_person"), "sso_sessions", ["person"], unique=False)
    op.create_index(op.f("ix_sso_sessions_provider_sid"), "sso_sessions", ["provider_sid"], unique=False)
    op.add_column("review_decisions", sa.Column("kind", sa.String(length=16), server_default="key", nullable=False))


def downgrade() -> None:
    """Steps go forward only."""
    raise NotImplementedError("restore a backup instead")
