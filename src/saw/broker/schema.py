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
    UniqueConstraint,
    false,
    text,
)

metadata = MetaData()

#: A counter; SQLite's own whole numbers have 64 bits already.
_COUNTER = BigInteger().with_variant(Integer(), "sqlite")

registry = Table(
    "registry",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("seq", _COUNTER, nullable=False),
    # The authority (SHA-256 of its certificate) whose brokers share a database of PostgreSQL.
    Column("installation", String(64)),
    # The newest root of the TUF repository of which the trail tells.
    Column("root_version", Integer, nullable=False, server_default="0"),
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
    Column("watch_seq", _COUNTER, nullable=False),
    Column("ek_pub_pem", Text),
    Column("ak_id", String(64)),
    Column("ak_pub", LargeBinary),
    Column("tpm_clock", BigInteger),
    Column("tpm_reset_count", _COUNTER),
    Column("tpm_restart_count", _COUNTER),
    Column("policy_digest", String(64)),
    Column("lease_expires_at", String(32)),
    Column("svid_sha256", String(64)),
    Column("attested_at", String(32)),
    Column("reported_state", String(32)),
    Column("reported_digest", String(64)),
    Column("reported_reason", Text),
    Column("reported_verified", Boolean),
    Column("reported_at", String(32)),
    # Counts changes of what operators decide about: state, image, agent and endorsement key.
    Column("version", Integer, nullable=False, server_default="1"),
    Index("workspaces_watch_seq", "watch_seq", "id"),
    Index(
        "workspaces_number_in_use",
        "number",
        unique=True,
        sqlite_where=text("state != 'decommissioned'"),
        postgresql_where=text("state != 'decommissioned'"),
    ),
)

#: Numbers below the highest in use that no workspace has (:mod:`saw.broker.numbers`).
freed_numbers = Table("freed_numbers", metadata, Column("number", Integer, primary_key=True, autoincrement=False))

#: Requests about workspaces that carried a key (:mod:`saw.broker.idempotency`), for as long as the key is known.
workspace_requests = Table(
    "workspace_requests",
    metadata,
    Column("asked_by", String(256), primary_key=True),
    Column("idempotency_key", String(128), primary_key=True),
    Column("request_sha256", String(64), nullable=False),
    Column("workspace_id", String(64), nullable=False),
    Column("asked_at", String(32), nullable=False, index=True),
)

#: Sponsors about whom something was decided (:mod:`saw.broker.sponsors`); whoever has no row is active. ``name`` is as
#: :func:`saw.broker.sponsor_states.sponsor_key` writes it.
sponsors = Table(
    "sponsors",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("state", String(16), nullable=False),
    Column("reason", Text, nullable=False),
    Column("changed_at", String(32), nullable=False),
    Column("changed_by", String(256), nullable=False),
    Column("version", Integer, nullable=False),
    # The register's number as of the last decision.
    Column("seq", _COUNTER, nullable=False, server_default="0"),
    Index("sponsors_seq", "seq"),
)

#: Agents (:mod:`saw.broker.agents`): those of all workspaces, past ones too. A row never goes, so no id comes back.
agents = Table(
    "agents",
    metadata,
    Column("id", String(64), primary_key=True),
    # Both empty while it is bound to no workspace; kept when it is retired.
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("sponsor", String(256), nullable=False),
    Column("blueprint", String(64), nullable=False),
    Column("state", String(32), nullable=False),
    Column("created_at", String(32), nullable=False),
    Column("name", String(64), nullable=False, server_default=""),
    Column("owner", String(256), nullable=False, server_default=""),
    Column("purpose", Text, nullable=False, server_default=""),
    # What somebody said that it is; nothing proves it.
    Column("harness", String(128), nullable=False, server_default=""),
    Column("model", String(128), nullable=False, server_default=""),
    Column("version", Integer, nullable=False, server_default="1"),
    # The registry's sequence number of its last change.
    Column("seq", _COUNTER, nullable=False, server_default="0"),
    Column("predecessor", String(64)),
    Column("successor", String(64)),
    Column("retired_at", String(32)),
    Column("retired_by", String(256)),
    Column("retired_reason", Text),
    Column("registered_by", String(256)),
    Column("idempotency_key", String(128)),
    Column("request_sha256", String(64)),
    Index("agents_seq", "seq"),
    Index("agents_request", "registered_by", "idempotency_key", unique=True),
    Index(
        "agents_name_in_use",
        "name",
        unique=True,
        sqlite_where=text("state != 'retired'"),
        postgresql_where=text("state != 'retired'"),
    ),
    Index(
        "agents_one_of_workspace",
        "workspace_id",
        unique=True,
        sqlite_where=text("state != 'retired' AND workspace_id != ''"),
        postgresql_where=text("state != 'retired' AND workspace_id != ''"),
    ),
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
    Column("kind", String(16), nullable=False, server_default="direct"),
    Column("person", String(256), nullable=False, server_default=""),
    Column("sso_session", String(64), nullable=False, server_default=""),
    Column("command", Text),
    Column("terminal", Boolean),
    Column("client_address", String(64)),
    Column("bastion", String(256)),
    Column("redeemed_at", String(32)),
    Column("ends_at", String(32)),
    Column("seen_at", String(32)),
    Column("end_reason", String(256)),
    Column("ended_at", String(32)),
    Column("closed_at", String(32)),
    Column("exit_code", Integer),
    Column("bytes_in", BigInteger),
    Column("bytes_out", BigInteger),
    Column("recording_key", LargeBinary),
    Column("recording_chunks", BigInteger),
    Column("recording_digest", String(64)),
    Column("recording_stored_at", String(32)),
    Column("recording_removed_at", String(32)),
    Column("recording_held_at", String(32)),
    Column("recording_held_by", String(256)),
    Column("recording_held_reason", String(256)),
    Column("forward_port", Integer),
    Column("forward_grant", String(64)),
)

#: Ports of workspaces that people may reach (:mod:`saw.broker.forwards`).
forward_grants = Table(
    "forward_grants",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("port", Integer, nullable=False),
    Column("grantee", String(256), nullable=False),
    Column("reason", String(256), nullable=False),
    Column("granted_by", String(256), nullable=False),
    Column("granted_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Column("revoked_by", String(256)),
    Column("revoked_at", String(32)),
    Column("revoked_reason", String(256)),
)

#: Certificates that were issued. Of a workspace's own, made anew with each lease, those that ended go
#: (:func:`saw.broker.certificates.note_svid`); the trail tells of all.
certificates = Table(
    "certificates",
    metadata,
    Column("sha256", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("name", String(64), nullable=False),
    Column("issued_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Index("certificates_of_name", "kind", "name", "expires_at"),
)

audit_events = Table(
    "audit_events",
    metadata,
    Column("source", String(64), primary_key=True),
    Column("seq", _COUNTER, primary_key=True, autoincrement=False),
    Column("prev", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("event", Text, nullable=False),
    # Place in the order of arrival over all chains, dense from 1.
    Column("position", BigInteger, nullable=False, server_default="0"),
    # When it reached the broker, milliseconds since 1970 UTC; None once its content (then an empty text) was removed.
    Column("at", BigInteger),
    Index("audit_events_position", "position", unique=True),
    Index("audit_events_at", "at", "position"),
)

audit_heads = Table(
    "audit_heads",
    metadata,
    Column("source", String(64), primary_key=True),
    Column("seq", _COUNTER, nullable=False),
    Column("hash", String(64), nullable=False),
)

#: How much of the trail was found to be what a signed checkpoint says (:mod:`saw.broker.covered`); one row at most.
#: ``edge``: hashes of the whole subtrees over the first ``size`` leaves. ``signed_…``: the last tree that was found right.
audit_covered = Table(
    "audit_covered",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("size", BigInteger, nullable=False),
    Column("edge", Text, nullable=False),
    Column("signed_size", BigInteger, nullable=False),
    Column("signed_root", String(64), nullable=False),
)

#: Legal holds (:mod:`saw.broker.holds`): of a workspace, of a time, or of both together. Released ones stay.
audit_holds = Table(
    "audit_holds",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64)),
    Column("since", String(32)),
    Column("until", String(32)),
    Column("reason", String(256), nullable=False),
    Column("added_by", String(256), nullable=False),
    Column("added_at", String(32), nullable=False),
    Column("released_by", String(256)),
    Column("released_at", String(32)),
    Column("released_reason", String(256)),
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
    Column("id", _COUNTER, primary_key=True),
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
    Column("allowed", _COUNTER, nullable=False),
    Column("denied", _COUNTER, nullable=False),
)

#: What calls of model services cost, one row for each charge of a gatekeeper's ledger. Amounts are millionths of the currency.
charges = Table(
    "charges",
    metadata,
    Column("source", String(64), primary_key=True),
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False),
    Column("engagement", String(256), nullable=False),
    Column("blueprint", String(256), nullable=False),
    Column("budget", String(256), nullable=False),
    Column("scope", String(16), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("period", String(16), nullable=False),
    Column("start", String(10), nullable=False),
    Column("end", String(10), nullable=False, index=True),
    Column("currency", String(3), nullable=False),
    Column("limit", BigInteger, nullable=False),
    Column("model", String(256), nullable=False),
    Column("service", String(256), nullable=False),
    Column("state", String(16), nullable=False),
    Column("reserved", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    Column("metered", Boolean, nullable=False),
    Column("input_tokens", BigInteger, nullable=False),
    Column("output_tokens", BigInteger, nullable=False),
    Column("at", String(40), nullable=False),
    Column("day", String(10), nullable=False, index=True),
)

#: What a workspace counts since its boot and only grows (:class:`saw.audit.workspace_usage.Used`).
RESOURCES = ("cpu_ms", "read_bytes", "written_bytes", "oom_kills", "refused_tasks")

#: What agents used of their workspaces (:mod:`saw.broker.resource_use`), added up by day and engagement.
resource_use = Table(
    "resource_use",
    metadata,
    Column("workspace_id", String(64), primary_key=True),
    Column("day", String(10), primary_key=True, index=True),
    Column("engagement", String(64), primary_key=True),
    *(Column(name, _COUNTER, nullable=False) for name in RESOURCES),
    Column("memory_peak", _COUNTER, nullable=False),
)

#: What each workspace told last, counted since the boot that it named.
resource_boots = Table(
    "resource_boots",
    metadata,
    Column("workspace_id", String(64), primary_key=True),
    Column("boot", String(32), nullable=False),
    *(Column(name, _COUNTER, nullable=False) for name in RESOURCES),
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
    Column("version", Integer, nullable=False, server_default="1"),
    # The registry's sequence number of its last change.
    Column("seq", _COUNTER, nullable=False, server_default=text("0")),
    Column("names_tools", Boolean, nullable=False, server_default=false()),
    Column("idempotency_key", String(128)),
    Column("request_sha256", String(64)),
    Index("delegations_seq", "seq"),
    Index("delegations_issued", "issued_at", "id"),
    Index("delegations_request", "issued_by", "idempotency_key", unique=True),
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

#: Calls that wait for people, or did (:mod:`saw.broker.reviews`), changes to the fleet (:mod:`saw.broker.gates`) and calls of
#: tools inside workspaces (:mod:`saw.broker.tool_reviews`). ``call`` and ``answer`` are encrypted; the path has no query. Of a
#: gate ``call`` is the statement; of a gate and a tool ``perimeter`` is who asked; of a tool ``host`` is server and tool.
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
    Column("kind", String(16), nullable=False, server_default="call"),
    Column("read_back", String(16)),
    Column("read_back_detail", Text),
    Column("read_back_at", String(32)),
    Column("read_back_since", String(32)),
    Column("context", LargeBinary),
    Column("context_state", String(16)),
    Column("context_detail", Text),
    Column("context_at", String(32)),
    Column("context_step", Integer),
    Column("render_digest", String(64)),
    Column("broken_at", String(32)),
    Column("broken_keys", Integer),
    Column("after_state", String(16), index=True),
    Column("after_due_at", String(32)),
    Column("after_at", String(32)),
)

#: What reviewers signed, in order; ``public_key`` is the key that counted then.
review_decisions = Table(
    "review_decisions",
    metadata,
    Column("id", _COUNTER, primary_key=True),
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
    Column("kind", String(16), nullable=False, server_default="key"),
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

#: People who signed in by single sign-on (:mod:`saw.broker.people`): a name belongs to one subject of one provider for good.
people = Table(
    "people",
    metadata,
    Column("name", String(256), primary_key=True),
    Column("issuer", String(512), nullable=False),
    Column("subject", String(256), nullable=False),
    Column("groups", Text, nullable=False),
    Column("roles", Text, nullable=False),
    Column("first_seen_at", String(32), nullable=False),
    Column("checked_at", String(32), nullable=False),
    Column("entitled_until", String(32), nullable=False),
    UniqueConstraint("issuer", "subject"),
)

#: Passkeys of people. A removed one stays, so that what it signed can be explained; a key is never another person's.
passkeys = Table(
    "passkeys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("person", String(256), nullable=False, index=True),
    Column("credential_id", String(1400), nullable=False, unique=True),
    Column("label", String(64), nullable=False),
    Column("public_key", Text, nullable=False),
    Column("key_sha256", String(64), nullable=False, unique=True),
    Column("sign_count", _COUNTER, nullable=False),
    Column("added_at", String(32), nullable=False),
    Column("used_at", String(32)),
    Column("removed_at", String(32)),
)

#: Live sessions of people, each under the SHA-256 of its secret. ``refresh`` is the provider's refresh token, encrypted.
sso_sessions = Table(
    "sso_sessions",
    metadata,
    Column("secret_sha256", String(64), primary_key=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("person", String(256), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("provider_sid", String(256), nullable=False, index=True),
    Column("auth_time", String(32), nullable=False),
    # What the provider said about how strong the sign-in was; empty: nothing.
    Column("acr", String(255), nullable=False, server_default=""),
    Column("created_at", String(32), nullable=False),
    Column("seen_at", String(32), nullable=False),
    Column("checked_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Column("refresh", LargeBinary),
    Column("challenge", String(64)),
    Column("challenge_until", String(32)),
)

#: Sign-ins that have begun: one row for each state (browser) or handle (command line); it is deleted when it is used.
sso_logins = Table(
    "sso_logins",
    metadata,
    Column("secret_sha256", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("browser_sha256", String(64), nullable=False),
    Column("sealed", LargeBinary, nullable=False),
    Column("poll_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False, index=True),
)

#: Logout tokens of the provider that were used, until they end by themselves.
sso_logout_tokens = Table(
    "sso_logout_tokens",
    metadata,
    Column("jti_sha256", String(64), primary_key=True),
    Column("expires_at", String(32), nullable=False),
)

#: Lifecycle jobs (:mod:`saw.broker.jobs`). A workspace has one live job at a time, besides one that kills it.
jobs = Table(
    "jobs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("lane", String(8), nullable=False),
    Column("workspace_id", String(64), nullable=False, index=True),
    Column("asked_by", String(256), nullable=False),
    Column("idempotency_key", String(128), nullable=False),
    Column("request_sha256", String(64), nullable=False),
    Column("parameters", Text, nullable=False),
    Column("image_sha256", String(64)),
    Column("state", String(16), nullable=False, index=True),
    Column("attempt", Integer, nullable=False),
    Column("asked_at", String(32), nullable=False),
    Column("queued_at", String(32), nullable=False),
    Column("started_at", String(32)),
    Column("ended_at", String(32)),
    Column("executor", String(64)),
    Column("external_id", String(256)),
    Column("worker", String(256)),
    Column("claim_sha256", String(64)),
    Column("lease_ends_at", String(32)),
    Column("cancel_asked_at", String(32)),
    Column("cancel_reason", String(256)),
    Column("progress", Text, nullable=False),
    Column("error", Text),
    Column("seq", Integer, nullable=False),
    UniqueConstraint("asked_by", "idempotency_key"),
    Index(
        "jobs_one_live",
        "workspace_id",
        "lane",
        unique=True,
        sqlite_where=text("state IN ('queued', 'running')"),
        postgresql_where=text("state IN ('queued', 'running')"),
    ),
)

#: What happened in the runs of a job, in order; the newest of each job are kept.
job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(64), primary_key=True),
    Column("seq", Integer, primary_key=True, autoincrement=False),
    Column("attempt", Integer, nullable=False),
    Column("at", String(32), nullable=False),
    Column("event", Text, nullable=False),
)

#: What people are told (:mod:`saw.broker.notifications`): a row for each message, channel and address. ``body`` is sent as it is.
notifications = Table(
    "notifications",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("channel", String(64), nullable=False),
    # An address of the channel's; empty for a webhook.
    Column("recipient", String(256), nullable=False),
    Column("workspace_id", String(64), nullable=False),
    Column("review_id", String(64), nullable=False),
    Column("group_name", String(256), nullable=False),
    Column("urgent", Boolean, nullable=False),
    Column("body", Text, nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("created_at", String(32), nullable=False),
    # When it is tried next; of one that is being sent, when it counts as lost.
    Column("next_at", String(32), nullable=False),
    # After that it is given up.
    Column("until", String(32), nullable=False),
    Column("claim", String(64)),
    Column("ended_at", String(32)),
    Column("error_code", String(64)),
    Column("error", String(256)),
    Index("notifications_due", "channel", "state", "next_at"),
    Index("notifications_ended", "state", "ended_at"),
    Index("notifications_newest", "created_at", "id"),
)

#: What agents ask for beyond their policy (:mod:`saw.broker.policy_requests`). ``ask_sha256`` tells the same ask again.
policy_requests = Table(
    "policy_requests",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("workspace_id", String(64), nullable=False),
    Column("agent_id", String(64), nullable=False),
    Column("sponsor", String(256), nullable=False),
    Column("blueprint", String(64), nullable=False),
    Column("ring", String(64), nullable=False),
    Column("policy_digest", String(64), nullable=False),
    Column("ask_sha256", String(64), nullable=False),
    Column("scheme", String(8), nullable=False),
    Column("host", String(256), nullable=False),
    Column("port", Integer, nullable=False),
    Column("method", String(32), nullable=False),
    Column("path", String(1024), nullable=False),
    Column("program", String(256), nullable=False),
    # The agent's own words.
    Column("reason", Text, nullable=False),
    # How the policy in force stood to it when it was asked.
    Column("standing", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("opened_at", String(32), nullable=False),
    Column("expires_at", String(32), nullable=False),
    Column("ended_at", String(32)),
    Column("answered_by", String(256)),
    Column("comment", Text),
    Index("policy_requests_newest", "opened_at", "id"),
    Index("policy_requests_workspace", "workspace_id", "state"),
    Index(
        "policy_requests_one_open",
        "workspace_id",
        "ask_sha256",
        unique=True,
        sqlite_where=text("state = 'open'"),
        postgresql_where=text("state = 'open'"),
    ),
)
