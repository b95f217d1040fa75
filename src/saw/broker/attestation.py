"""Attestation: from the recorded endorsement key to an SVID and a lease (POL-03, POL-05).

Nonces and challenges are deleted when they are used, before anything is verified, in a transaction of their own: a replay
finds nothing, whatever happens afterwards. An SVID is issued in the transaction that checks the state once more, so a kill
that was answered first always wins.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import datetime, timedelta
from typing import Any, NoReturn

from sqlalchemy import Connection, Row, delete, select

from saw.attest.messages import (
    AK_UNKNOWN,
    ActivateAnswer,
    ActivateRequest,
    EnrolAnswer,
    EnrolRequest,
    Evidence,
    Lease,
    NonceAnswer,
    NonceRequest,
    QuoteAnswer,
)
from saw.attest.verifier import Expectation, Verdict, make_credential, verify_evidence
from saw.broker.certificates import note_svid
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ForbiddenError, MalformedError, NotAttestedError, StorageFull
from saw.broker.images import expected_boot
from saw.broker.lifecycle import MAY_ATTEST, MAY_ENROL, State
from saw.broker.postgres import DatabaseBusy, DatabaseUnavailable
from saw.broker.registry import Registry, get_row, normal_ek, require_state
from saw.broker.releases import offline_granted, released_digests
from saw.broker.rollout import assigned_release
from saw.broker.schema import challenges, nonces, workspaces
from saw.errors import SawError
from saw.identity.ssh import SshAuthority
from saw.identity.x509 import Authority, parse_svid

NONCE_TTL = timedelta(seconds=60)
CHALLENGE_TTL = timedelta(seconds=120)
FALLBACK_LEASE_S = 120
LONGEST_LEASE_S = 600
SSH_HOST_TTL = timedelta(hours=1)
#: Outstanding nonces or challenges of one workspace; asking for more drops the oldest. The rate limit of the TLS side
#: keeps a caller below it, so that nobody can flush another's nonce before it expires.
MAX_OUTSTANDING = 512


class Attestation:
    """The four calls of the attestation protocol."""

    def __init__(self, services: Services, registry: Registry, authority: Authority, ssh: SshAuthority) -> None:
        self._s = services
        self._registry = registry
        self._authority = authority
        self._ssh = ssh

    def enrol(self, caller: Caller, body: EnrolRequest) -> EnrolAnswer:
        """Answer a challenge that only the recorded TPM, holding this attestation key, can solve."""
        with self._s.store.read() as connection:
            row = get_row(connection, body.workspace_id)
        require_state(row, MAY_ENROL)
        if row.ek_pub_pem is None or not hmac.compare_digest(normal_ek(body.ek_pub_pem), row.ek_pub_pem):
            self._refuse(caller, row, "unknown_ek", "the endorsement key is not the one recorded for this workspace")
            raise ForbiddenError(
                f"the endorsement key is not the one recorded for {row.id}",
                cure="the operator records the key of the workspace's TPM once, at creation",
                code="unknown_ek",
            )
        secret = self._s.random(32)
        try:
            blob, encrypted = make_credential(row.ek_pub_pem, body.ak_pub, secret, self._s.random)
        except SawError as error:
            self._refuse(caller, row, "ak_refused", error.message)
            raise MalformedError(error.message, cure=error.cure, code="ak_refused") from error
        challenge_id = self._s.new_id("chl")
        now = self._s.clock()
        with self._s.store.write() as tx:
            _expire(tx.connection, challenges, row.id, now)
            tx.connection.execute(
                challenges.insert().values(
                    id=challenge_id,
                    workspace_id=row.id,
                    ak_pub=body.ak_pub,
                    secret_sha256=hashlib.sha256(secret).hexdigest(),
                    expires_at=iso(now + CHALLENGE_TTL),
                )
            )
            tx.record(
                self._s.events.api_activity(
                    now,
                    caller.subject(row.id, agent=row.agent_id),
                    "attest.enrol",
                    activity="create",
                    resource=("attestation-key", _ak_id(body.ak_pub)),
                )
            )
        return EnrolAnswer(challenge_id=challenge_id, credential_blob=blob, secret=encrypted)

    def activate(self, caller: Caller, body: ActivateRequest) -> ActivateAnswer:
        """Enrol the attestation key when the secret is right. A challenge is gone after one answer, right or wrong."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            challenge = tx.connection.execute(
                delete(challenges).where(challenges.c.id == body.challenge_id).returning(*challenges.c)
            ).one_or_none()
        if challenge is None or challenge.expires_at <= iso(now):
            raise ForbiddenError(
                "the challenge is unknown, used or expired", cure="enrol again", code="challenge_unknown"
            )
        ak_id = _ak_id(challenge.ak_pub)
        solved = hmac.compare_digest(hashlib.sha256(body.secret).hexdigest(), challenge.secret_sha256)
        with self._s.store.write() as tx:
            row = get_row(tx.connection, challenge.workspace_id)
            require_state(row, MAY_ENROL)
            if solved:
                tx.connection.execute(
                    workspaces.update().where(workspaces.c.id == row.id).values(ak_id=ak_id, ak_pub=challenge.ak_pub)
                )
            tx.record(
                self._s.events.authentication(
                    now,
                    caller.subject(row.id, agent=row.agent_id),
                    activity="ticket",
                    outcome="success" if solved else "failure",
                    protocol="tpm2-activate-credential",
                    status_detail="" if solved else "challenge_failed",
                    detail={"ak_id": ak_id},
                )
            )
        if not solved:
            raise ForbiddenError("the challenge was not solved", cure="enrol again", code="challenge_failed")
        return ActivateAnswer(ak_id=ak_id)

    def nonce(self, caller: Caller, body: NonceRequest) -> NonceAnswer:
        """Answer a single-use nonce; a workspace that may not attest gets none."""
        nonce = self._s.random(32)
        now = self._s.clock()
        with self._s.store.write() as tx:
            row = get_row(tx.connection, body.workspace_id)
            admitted = State(row.state) in MAY_ATTEST
            if admitted:
                _expire(tx.connection, nonces, row.id, now)
                tx.connection.execute(
                    nonces.insert().values(
                        nonce_sha256=hashlib.sha256(nonce).hexdigest(),
                        workspace_id=row.id,
                        expires_at=iso(now + NONCE_TTL),
                    )
                )
        if not admitted:
            self._refuse(caller, row, "workspace_not_admitted", f"the workspace is {row.state}")
        require_state(row, MAY_ATTEST)
        return NonceAnswer(nonce=nonce, expires_in=NONCE_TTL.total_seconds())

    def quote(self, caller: Caller, evidence: Evidence) -> QuoteAnswer:
        """Verify evidence; answer an SVID and a lease or raise :class:`NotAttestedError`. Either way it is audited."""
        now = self._s.clock()
        with self._s.store.write() as tx:
            used = tx.connection.execute(
                delete(nonces)
                .where(
                    nonces.c.nonce_sha256 == hashlib.sha256(evidence.nonce).hexdigest(),
                    nonces.c.workspace_id == evidence.workspace_id,
                )
                .returning(nonces.c.expires_at)
            ).scalar_one_or_none()
            row = get_row(tx.connection, evidence.workspace_id)
            release = assigned_release(tx.connection, row)
            released = released_digests(tx.connection, row.ring, row.blueprint)
            pcrs, image = expected_boot(tx.connection, row.image, row.image_sha256, now)
        refused = self._precondition(row, release, used, now) or (_of_image(image) if image else None)
        if refused is not None:
            self._reject(caller, row, [refused])
        assert release is not None  # noqa: S101 - _precondition refuses without a release
        verdict = _verify(evidence, row, pcrs, released, release.policy_digest)
        if not verdict.ok or verdict.policy_digest is None or verdict.clock is None:
            failures = [_failure(item.code, item.component, item.detail) for item in verdict.failures]
            self._reject(caller, row, failures or [_failure("verifier_exception", "verifier", "no verdict")])
        try:
            return self._grant(caller, row, evidence, verdict, release.lease_ttl_s)
        except NotAttestedError as error:
            self._reject(caller, row, error.failures)
        except (StorageFull, DatabaseBusy, DatabaseUnavailable):
            raise  # says nothing about the workspace
        except Exception as error:  # noqa: BLE001 - whatever goes wrong in granting must end as "not attested"
            self._reject(caller, row, [_failure("verifier_exception", "issue", type(error).__name__)])

    def _precondition(
        self, row: Row[Any], release: Row[Any] | None, nonce_expiry: str | None, now: datetime
    ) -> dict[str, str] | None:
        if State(row.state) not in MAY_ATTEST:
            return _failure("workspace_not_admitted", "registry", f"the workspace is {row.state}")
        if nonce_expiry is None or nonce_expiry <= iso(now):
            return _failure("nonce_unknown", "nonce", "the nonce is unknown, used or expired")
        if row.ak_pub is None:
            return _failure(AK_UNKNOWN, "quote", "no attestation key is enrolled")
        if release is None:
            return _failure("no_release", "policy", f"no policy is released to {row.ring}/{row.blueprint}")
        return None

    def _grant(
        self, caller: Caller, before: Row[Any], evidence: Evidence, verdict: Verdict, lease_ttl_s: int
    ) -> QuoteAnswer:
        digest, clock = verdict.policy_digest, verdict.clock
        assert digest is not None  # noqa: S101 - a good verdict has both
        assert clock is not None  # noqa: S101
        ttl = min(lease_ttl_s, LONGEST_LEASE_S)
        now = self._s.clock()
        expires = now + timedelta(seconds=ttl)
        svid_pem = self._authority.issue_svid(evidence.csr_pem, before.id, digest, now)
        svid = parse_svid(svid_pem)
        host_cert = ""
        if evidence.ssh_host_pub:
            host_cert = self._ssh.issue_host(evidence.ssh_host_pub, [before.id], now, SSH_HOST_TTL)
        with self._s.store.write() as tx:
            row = get_row(tx.connection, before.id)
            offline = offline_granted(tx.connection, digest)
            # A kill, or a newer quote accepted meanwhile, wins over this one.
            _, image = expected_boot(tx.connection, row.image, row.image_sha256, now)
            if image:
                raise NotAttestedError([_of_image(image)])
            if State(row.state) not in MAY_ATTEST or row.ak_id != before.ak_id or row.attested_at != before.attested_at:
                raise NotAttestedError(
                    [_failure("superseded", "registry", f"{row.id} changed while its quote was checked")]
                )
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=digest)
            first = row.state != State.ACTIVE
            moved = {"state": State.ACTIVE, "state_reason": "attested", "state_since": iso(now)}
            tx.connection.execute(
                workspaces.update()
                .where(workspaces.c.id == row.id)
                .values(
                    policy_digest=digest,
                    lease_expires_at=iso(expires),
                    svid_sha256=svid.sha256,
                    attested_at=iso(now),
                    tpm_clock=clock.clock,
                    tpm_reset_count=clock.reset_count,
                    tpm_restart_count=clock.restart_count,
                    **({**moved, "version": workspaces.c.version + 1} if first else {}),
                )
            )
            note_svid(tx.connection, row.id, svid.sha256, now, svid.not_after)
            if first:
                self._registry.activate(tx, caller, row)
                tx.record(
                    self._s.events.entity_management(
                        now,
                        subject,
                        ("workspace", row.id),
                        activity="activate",
                        detail={"from": row.state, "to": "active"},
                    )
                )
            tx.record(
                self._s.events.authentication(
                    now,
                    subject,
                    activity="ticket",
                    protocol="tpm2-quote",
                    message="attested",
                    certificate={
                        "serial_number": f"{svid.serial:x}",
                        "subject": f"spiffe://{svid.trust_domain}/workspace/{row.id}",
                        "issuer": f"spiffe://{svid.trust_domain}",
                        "expiration_time": int(svid.not_after.timestamp() * 1000),
                        "fingerprints": [{"value": svid.sha256, "algorithm_id": 3}],
                    },
                    detail={
                        "lease_expires_at": iso(expires),
                        "tpm_reset_count": clock.reset_count,
                        "ssh_host": bool(host_cert),
                    },
                )
            )
            # Watchers learn of the state and the policy; a renewed lease concerns perimeters alone.
            tx.touch(*([row.id] if first or row.policy_digest != digest else []))
        return QuoteAnswer(
            svid_pem=svid_pem.decode(),
            ca_pem=self._authority.ca_pem.decode(),
            lease=Lease(ttl_s=ttl, expires_at=expires, offline_s=offline or None),
            policy_digest=digest,
            ssh_user_ca=self._ssh.user_ca,
            ssh_host_cert=host_cert,
            verdict="attested",
        )

    def _reject(self, caller: Caller, row: Row[Any], failures: list[dict[str, str]]) -> NoReturn:
        codes = ", ".join(failure["code"] for failure in failures)
        self._refuse(caller, row, "not_attested", codes, failures)
        raise NotAttestedError(failures)

    def _refuse(
        self, caller: Caller, row: Row[Any], code: str, text: str, failures: list[dict[str, str]] | None = None
    ) -> None:
        """Record a refusal: an authentication that failed."""
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.authentication(
                    self._s.clock(),
                    caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or ""),
                    activity="ticket",
                    outcome="failure",
                    protocol="tpm2",
                    message=text[:1024],
                    status_detail=code,
                    detail={"failures": failures} if failures else None,
                )
            )


def _verify(evidence: Evidence, row: Row[Any], pcrs: dict[int, str], released: frozenset[str], current: str) -> Verdict:
    expected = Expectation(
        ak_pub=row.ak_pub,
        nonce=evidence.nonce,
        pcrs=pcrs,
        released=released,
        current=current,
        last_clock=row.tpm_clock,
        last_reset_count=row.tpm_reset_count,
        last_restart_count=row.tpm_restart_count,
    )
    return verify_evidence(evidence, expected)


def _failure(code: str, component: str, detail: str) -> dict[str, str]:
    return {"code": code, "component": component, "detail": detail[:512]}


def _of_image(reason: str) -> dict[str, str]:
    """Return the failure for what :func:`saw.broker.images.refusal` says."""
    code, _, detail = reason.partition(": ")
    return _failure(code, "image", detail)


def _ak_id(ak_pub: bytes) -> str:
    return hashlib.sha256(ak_pub).hexdigest()


def _expire(connection: Connection, table: Any, workspace_id: str, now: datetime) -> None:
    """Drop what has expired, and the oldest entries of a workspace beyond the limit."""
    connection.execute(delete(table).where(table.c.expires_at <= iso(now)))
    key = next(iter(table.primary_key.columns))
    mine = select(key).where(table.c.workspace_id == workspace_id).order_by(table.c.expires_at.desc())
    stale = list(connection.execute(mine.offset(MAX_OUTSTANDING - 1)).scalars())
    if stale:
        connection.execute(delete(table).where(key.in_(stale)))
