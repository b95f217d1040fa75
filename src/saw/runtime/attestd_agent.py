"""The attestation agent's logic: measure policy, enrol once per boot, quote, and hold the identity while it is fresh."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from saw.attest.messages import (
    AK_UNKNOWN,
    ActivateRequest,
    EnrolRequest,
    Evidence,
    NonceRequest,
    QuoteAnswer,
    RefusalFailure,
)
from saw.attest.tpm import Tpm, TpmError
from saw.attest.verifier import quote_binding
from saw.errors import SawError
from saw.files import write_private
from saw.identity.x509 import IdentityError, new_key_and_csr, parse_svid
from saw.runtime.attestd_broker import BrokerClient, BrokerUnreachableError, NotAttestedError
from saw.runtime.attestd_config import AttestdConfig, WorkspaceIdentity
from saw.runtime.attestd_measure import PolicyLog
from saw.runtime.attestd_svid import IdentityFiles, LeaseFile


class Clock(msgspec.Struct, frozen=True):
    """Wall time (zone-aware) and seconds of a clock that also runs while the machine is suspended."""

    now: Callable[[], datetime]
    boottime: Callable[[], float]


class Outcome(msgspec.Struct, frozen=True, omit_defaults=True):
    """The answer to ``measure`` and ``status``; ``lease`` and ``policy_digest`` when attested, ``failures`` when not."""

    ok: bool
    lease: LeaseFile | None = None
    policy_digest: str | None = None
    failures: tuple[RefusalFailure, ...] = ()


_RETRY_AWAY_S = 5.0
"""Longest pause between two attempts while the identity lives on time offline: it ends with the first answer (seconds)."""
_PENDING = RefusalFailure(
    "attestation_pending", "attestd", "not attested yet: waiting for a loaded policy, or under way"
)


class _Enrolment(msgspec.Struct, frozen=True):
    """Of which key the broker said that it is enrolled; lies beside the key's context and ends with it."""

    ak_id: str
    ak_sha256: str


class Agent:
    """One workspace's attestation. All operations are serialised; :meth:`status` never waits for one under way."""

    def __init__(
        self,
        config: AttestdConfig,
        workspace: WorkspaceIdentity,
        *,
        tpm: Tpm,
        broker: BrokerClient,
        clock: Clock,
    ) -> None:
        self._config = config
        self._workspace = workspace
        self._tpm = tpm
        self._broker = broker
        self._clock = clock
        self._lock = threading.Lock()
        self._log = PolicyLog(config.run / "attest" / "policy-log.json", tpm)
        self._files = IdentityFiles(config.run, config.svid_group)
        self._enrolment_file = tpm.directory / "enrolment.json"
        self._lease: LeaseFile | None = None
        self._lease_end = self._stated_end = 0.0
        self._due: float | None = None
        self._away = False
        self._failed = 0
        self._failures: tuple[RefusalFailure, ...] = ()

    def start(self) -> None:
        """Take up what an earlier run of this boot left behind, and plan an attestation when a policy was measured."""
        with self._lock:
            left = self._files.remaining(self._clock.now())
            if left is not None:
                self._lease, self._lease_end = left[0], self._clock.boottime() + left[1]
                self._stated_end = self._lease_end
            try:
                measured = bool(self._log.entries)
            except SawError as error:
                self._failures = (_failure(error),)
                measured = True  # not known yet: the attempt will tell
            self._due = self._clock.boottime() if measured else None

    def measure(self, policy_digest: str, revision: int) -> Outcome:
        """Record a loaded policy in PCR 14 and attest at once."""
        with self._lock:
            try:
                self._log.measure(policy_digest, revision)
            except (SawError, OSError) as error:
                self._failures = (_failure(error),)
                return Outcome(ok=False, failures=self._failures)
            return self._attest()

    def attest(self) -> Outcome:
        """Attest now."""
        with self._lock:
            return self._attest()

    def status(self) -> Outcome:
        """Return the present state: ``ok`` while an unexpired lease is held."""
        lease = self._lease if self._clock.boottime() < self._lease_end else None
        if lease is None:
            return Outcome(ok=False, failures=self._failures or (_PENDING,))
        return Outcome(ok=True, lease=lease, policy_digest=lease.policy_digest, failures=self._failures)

    def step(self) -> float | None:
        """Attest when due and drop an identity whose lease ended; return the seconds until the next step, if any."""
        with self._lock:
            if self._due is not None and self._clock.boottime() >= self._due:
                self._attest()
            now = self._clock.boottime()
            if self._lease is not None and now >= self._lease_end and not self._prolong(now):
                self._lease = None
                self._files.remove()
            times = [self._due, self._lease_end if self._lease is not None else None]
            waits = [max(0.0, at - now) for at in times if at is not None]
            return min(waits) if waits else None

    def _prolong(self, now: float) -> bool:
        """Use the time offline of a lease while the broker is away; tell whether it goes on. Refused is not away."""
        lease = self._lease
        if lease is None or not lease.offline_s or not self._away or now >= self._lease_end + lease.offline_s:
            return False
        self._lease_end += lease.offline_s
        self._lease = lease.prolonged()
        self._files.write_lease(self._lease)
        return True

    def _attest(self) -> Outcome:
        try:
            self._accept(*self._present())
        except NotAttestedError as error:
            return self._fail(error.failures)
        except BrokerUnreachableError as error:
            return self._fail((_failure(error),), away=True)
        except (SawError, OSError) as error:
            return self._fail((_failure(error),))
        return self.status()

    def _fail(self, failures: tuple[RefusalFailure, ...], *, away: bool = False) -> Outcome:
        self._failures, self._away = failures, away
        self._failed += 1
        pause = min(self._config.reattest_seconds, 2.0 ** min(self._failed - 1, 8))
        if self._lease is not None:
            pause = min(pause, self._lease.ttl_s / 4)
            if away and self._lease_end > self._stated_end:
                pause = min(pause, _RETRY_AWAY_S)
            now = self._clock.boottime()
            if not away:
                self._lease_end = min(self._lease_end, self._stated_end)
            elif now + pause + self._config.broker_timeout_seconds >= self._lease_end:
                self._prolong(now)  # the next attempt may not have ended when the lease does
        self._due = self._clock.boottime() + pause
        return Outcome(ok=False, failures=failures)

    def _accept(self, answer: QuoteAnswer, key_pem: bytes, asked: float) -> None:
        """Install the identity given. The lease counts from when it was asked for, so it never ends late here."""
        svid = parse_svid(answer.svid_pem)
        issued = x509.load_pem_x509_certificate(answer.svid_pem.encode()).public_key()
        own = serialization.load_pem_private_key(key_pem, None).public_key()
        loaded = self._log.entries[-1].policy_digest
        if (svid.workspace_id, svid.policy_digest, answer.policy_digest) != (
            self._workspace.workspace_id,
            loaded,
            loaded,
        ) or issued != own:
            raise IdentityError("the SVID given is not for this workspace, key and policy", cure="check the broker")
        self._lease = self._files.write(answer, key_pem)
        self._lease_end = self._stated_end = asked + answer.lease.ttl_s
        self._due = asked + min(self._config.reattest_seconds, answer.lease.ttl_s / 2)
        self._failed, self._failures, self._away = 0, (), False

    def _present(self) -> tuple[QuoteAnswer, bytes, float]:
        """Enrol when needed, then present fresh evidence; once more with a new key when the old one is not accepted."""
        if not self._log.entries:
            raise NotAttestedError((RefusalFailure("policy_missing", "attestd", "no policy was loaded since boot"),))
        enrolled_now = self._enrol_unless_done()
        try:
            return self._quote()
        except NotAttestedError as error:
            if enrolled_now or AK_UNKNOWN not in {failure.code for failure in error.failures}:
                raise
        except TpmError:
            # A key context from before a TPM reset cannot be loaded any more.
            if enrolled_now:
                raise
        self._enrolment_file.unlink(missing_ok=True)
        self._enrol_unless_done()
        return self._quote()

    def _enrol_unless_done(self) -> bool:
        """Enrol this boot's attestation key; tell whether that was done now."""
        if self._enrolment_file.exists() and self._tpm.has_attestation_key():
            return False
        self._tpm.forget_keys()
        ek_pem, ak_pub = self._tpm.create_keys()
        challenge = self._broker.enrol(EnrolRequest(self._workspace.workspace_id, ek_pem.decode(), ak_pub))
        secret = self._tpm.activate_credential(challenge.credential_blob, challenge.secret)
        answer = self._broker.activate(ActivateRequest(challenge.challenge_id, secret))
        enrolment = _Enrolment(answer.ak_id, hashlib.sha256(ak_pub).hexdigest())
        write_private(self._enrolment_file, msgspec.json.encode(enrolment))
        return True

    def _quote(self) -> tuple[QuoteAnswer, bytes, float]:
        entries = self._log.entries
        asked = self._clock.boottime()
        nonce = self._broker.nonce(NonceRequest(self._workspace.workspace_id)).nonce
        workspace = self._workspace
        key_pem, csr_pem = new_key_and_csr(
            workspace.workspace_id, uri=f"spiffe://{workspace.trust_domain}/workspace/{workspace.workspace_id}"
        )
        spki = x509.load_pem_x509_csr(csr_pem).public_key()
        quote = self._tpm.quote(
            quote_binding(
                nonce,
                spki.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo),
            )
        )
        evidence = Evidence(
            workspace_id=workspace.workspace_id,
            nonce=nonce,
            quote=quote.attest,
            signature=quote.signature,
            pcrs={str(pcr): value.hex() for pcr, value in quote.pcrs.items()},
            event_log=Path(self._config.event_log).read_bytes(),
            policy_log=entries,
            csr_pem=csr_pem.decode(),
            ssh_host_pub=_host_key(Path(self._config.ssh_host_key)),
        )
        return self._broker.quote(evidence), key_pem, asked


def _host_key(path: Path) -> str:
    """Return the SSH host key line without its comment; empty while the machine has none."""
    try:
        return " ".join(path.read_text().split()[:2])
    except FileNotFoundError:
        return ""


def _failure(error: SawError | OSError) -> RefusalFailure:
    if isinstance(error, SawError):
        return RefusalFailure(error.code, "attestd", error.message)
    return RefusalFailure("file_unavailable", "attestd", f"{error.filename}: {error.strerror}")
