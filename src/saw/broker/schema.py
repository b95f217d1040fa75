"""The tables of the broker (SQLAlchemy Core). ``migrations/`` holds the steps that make them; a test compares the two.

Times are texts as :mod:`saw.broker.clock` writes them. Digests and hashes are lower-case hex.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    text,
)

metadata = MetaData()

registry = Table(
    "registry",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", Integer, nullable=False),
)

workspaces = Table(
    "workspaces",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("number", Integer, nullable=False),
    Column("sponsor", String(256), nullable=False),
    Column("blueprint", String(64), nullable=False),
    Column("ring", String(64), nullable=False),
    Column("image", String(128), nullable=False),
    Column("image_sha256", String(64), nullable=False),
    Column("agent_id", String(64), nullable=False),
    Column("state", String(32), nullable=False),
    Column("state_reason", Text, nullable=False),
    Column("state_since", String(32), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("watch_seq", Integer, nullable=False),
    Column("ek_pub_pem", Text),
    Column("ak_id", String(64)),
    Column("ak_pub", LargeBinary),
    Column("tpm_clock", BigInteger),
    Column("tpm_reset_count", Integer),
    Column("tpm_restart_count", Integer),
    Column("policy_digest", String(64)),
    Column("lease_expires_at", String(32)),
    Column("svid_sha256", String(64)),
    Column("attested_at", String(32)),
    Column("reported_state", String(32)),
    Column("reported_digest", String(64)),
    Column("reported_reason", Text),
    Column("reported_verified", Boolean),
    Column("reported_at", String(32)),
    Index(
        "workspaces_number_in_use",
        "number",
        unique=True,
        sqlite_where=text("state != 'decommissioned'"),
        postgresql_where=text("state != 'decommissioned'"),
    ),
)

agents = Table(
    "agents",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("sponsor", String(256), nullable=False),
    Column("blueprint", String(64), nullable=False),
    Column("state", String(32), nullable=False),
    Column("created_at", String(32), nullable=False),
)

images = Table(
    "images",
    metadata,
    Column("name", String(128), primary_key=True),
    Column("image_sha256", String(64), primary_key=True),
    Column("record", Text, nullable=False),
    Column("registered_at", String(32), nullable=False),
    Column("envelope", Text, nullable=False, server_default=""),
    Column("state", String(32), nullable=False, server_default="candidate"),
    Column("state_reason", Text, nullable=False, server_default=""),
)

nonces = Table(
    "nonces",
    metadata,
    Column("nonce_sha256", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("expires_at", String(32), nullable=False),
)

challenges = Table(
    "challenges",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("ak_pub", LargeBinary, nullable=False),
    Column("secret_sha256", String(64), nullable=False),
    Column("expires_at", String(32), nullable=False),
)

releases = Table(
    "releases",
    metadata,
    Column("ring", String(64), primary_key=True),
    Column("blueprint", String(64), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("policy_digest", String(64), nullable=False, index=True),
    Column("bundle", LargeBinary, nullable=False),
    Column("lease_ttl_s", Integer, nullable=False),
    Column("released_at", String(32), nullable=False),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("principal", String(256), nullable=False),
    Column("key_fingerprint", String(64), nullable=False),
    Column("source_address", String(256)),
    Column("issued_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
)

certificates = Table(
    "certificates",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("name", String(64), nullable=False),
    Column("issued_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
)

audit_events = Table(
    "audit_events",
    metadata,
    Column("source", String(64), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("prev", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("event", Text, nullable=False),
)

audit_heads = Table(
    "audit_heads",
    metadata,
    Column("source", String(64), primary_key=True),
    Column("seq", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
)

#: How a release goes through its ring (:mod:`saw.broker.rollout`); one row for each release.
rollouts = Table(
    "rollouts",
    metadata,
    Column("ring", String(64), primary_key=True),
    Column("blueprint", String(64), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("policy_digest", String(64), nullable=False, index=True),
    Column("previous_revision", Integer),
    Column("previous_digest", String(64)),
    Column("returns_to", Integer),
    Column("state", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("state_by", String(256), nullable=False),
    Column("state_since", String(32), nullable=False),
    Column("opened_at", String(32), nullable=False),
    Column("everyone", Boolean, nullable=False),
    Column("rollback_due", Boolean, nullable=False),
    Column("warned", Text, nullable=False),
)

#: What a workspace made of a release that it was offered: its last word.
rollout_members = Table(
    "rollout_members",
    metadata,
    Column("ring", String(64), primary_key=True),
    Column("blueprint", String(64), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("workspace_id", String(64), primary_key=True),
    Column("state", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("offered_at", String(32), nullable=False),
    Column("said_at", String(32), nullable=False),
    Column("silent", Boolean, nullable=False),
)

#: Everything that a workspace ever said about a release, in order.
policy_states = Table(
    "policy_states",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("policy_digest", String(64), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("state", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("verified", Boolean, nullable=False),
    Column("at", String(32), nullable=False),
)

#: Calls that ring 2 decided under a policy, counted from the gatekeepers' events.
policy_calls = Table(
    "policy_calls",
    metadata,
    Column("workspace_id", String(64), primary_key=True),
    Column("policy_digest", String(64), primary_key=True),
    Column("allowed", Integer, nullable=False),
    Column("denied", Integer, nullable=False),
)

#: Rollbacks in escrow: publications that officers signed beforehand, for the release ``revision``.
rollbacks = Table(
    "rollbacks",
    metadata,
    Column("ring", String(64), primary_key=True),
    Column("blueprint", String(64), primary_key=True),
    Column("revision", Integer, primary_key=True, autoincrement=False),
    Column("policy_digest", String(64), nullable=False),
    Column("returns_to", Integer, nullable=False),
    Column("publication", LargeBinary, nullable=False),
    Column("state", String(32), nullable=False),
    Column("reason", Text, nullable=False),
    Column("deposited_by", String(256), nullable=False),
    Column("deposited_at", String(32), nullable=False),
)

#: What agents were handed for an engagement (:mod:`saw.broker.delegations`): the signed record, and whether it was revoked.
delegations = Table(
    "delegations",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("parent", String(64), index=True),
    Column("record", Text, nullable=False),
    Column("statement", Text, nullable=False),
    Column("issued_by", String(256), nullable=False),
    Column("issued_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Column("revoked_by", String(256)),
    Column("revoked_at", String(32)),
    Column("revoked_reason", Text),
)

#: People who may decide on reviews (:mod:`saw.broker.reviewers`). A name and a key are never used again.
reviewers = Table(
    "reviewers",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("groups", Text, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("key_sha256", String(64), nullable=False, unique=True),
    Column("state", String(32), nullable=False),
    Column("added_by", String(256), nullable=False),
    Column("added_at", String(32), nullable=False),
    Column("retired_by", String(256)),
    Column("retired_at", String(32)),
    Column("retired_reason", Text),
)

#: Calls that wait for people, or did (:mod:`saw.broker.reviews`). ``call`` and ``answer`` are encrypted; the path has no query.
reviews = Table(
    "reviews",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("agent_id", String(64), nullable=False),
    Column("sponsor", String(256), nullable=False),
    Column("perimeter", String(256), nullable=False),
    Column("policy_digest", String(64), nullable=False),
    Column("request_digest", String(64), nullable=False, index=True),
    Column("group_name", String(256), nullable=False),
    Column("quorum", Integer, nullable=False),
    Column("rule", String(256), nullable=False),
    Column("delegation", String(64), nullable=False),
    Column("binary", Text, nullable=False),
    Column("request_id", String(64), nullable=False),
    Column("method", String(32), nullable=False),
    Column("scheme", String(8), nullable=False),
    Column("host", String(256), nullable=False),
    Column("port", Integer, nullable=False),
    Column("path", Text, nullable=False),
    Column("call", LargeBinary),
    Column("held_bytes", Integer, nullable=False),
    Column("state", String(32), nullable=False, index=True),
    Column("detail", Text, nullable=False),
    Column("opened_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Column("approved_at", String(32)),
    Column("claimed_at", String(32)),
    Column("claim_sha256", String(64)),
    Column("claim_ends_at", String(32)),
    Column("ended_at", String(32)),
    Column("answer", LargeBinary),
    Column("answer_status", Integer),
    Column("answer_sha256", String(64)),
)

#: What reviewers signed, in order; ``public_key`` is the key that counted then.
review_decisions = Table(
    "review_decisions",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("review_id", String(64), nullable=False, index=True),
    Column("approver", String(256), nullable=False),
    Column("decision", String(32), nullable=False),
    Column("statement", Text, nullable=False),
    Column("signature", Text, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("key_sha256", String(64), nullable=False),
    Column("not_after", String(32), nullable=False),
    Column("decided_by", String(256), nullable=False),
    Column("decided_at", String(32), nullable=False),
)

#: The one nonce that an approver holds for a review; it is deleted when it is used.
review_nonces = Table(
    "review_nonces",
    metadata,
    Column("review_id", String(64), primary_key=True),
    Column("approver", String(256), primary_key=True),
    Column("nonce", String(64), nullable=False),
    Column("expires_at", String(32), nullable=False),
)
