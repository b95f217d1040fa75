"""Certificates on request of an operator or a perimeter: SSH for one session, X.509 for perimeter services."""

from __future__ import annotations

import hashlib
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal, get_args

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from sqlalchemy import Connection, select

from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import ForbiddenError
from saw.broker.lifecycle import State
from saw.broker.registry import get_row, require_state
from saw.broker.schema import certificates, sessions
from saw.broker.session_source import bound_source, workspace_source
from saw.broker.store import Transaction
from saw.identity.ssh import SshAuthority
from saw.identity.x509 import Authority

PERIMETER_TTL = timedelta(days=30)
Kind = Literal["perimeter", "ring2", "bastion", "machine"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SVID = "svid"
"""The kind of a workspace's own certificate."""
FORGOTTEN = 20
"""Most certificates that ended and that one attestation forgets."""


class SshRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user certificate for one session with one workspace; ``ttl_s`` bounds the time to connect.

    It counts on the perimeter's side of the workspace's link, from where its SSH server sees everybody; ``source_address`` may
    narrow that.
    """

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)]
    public_key: Annotated[str, msgspec.Meta(max_length=4096)]
    ttl_s: Annotated[int, msgspec.Meta(ge=10, le=300)] = 120
    source_address: Annotated[str, msgspec.Meta(max_length=256)] | None = None


class X509Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A perimeter, bastion or machine (client) or ring 2 (server and client) certificate for the key of ``csr_pem``."""

    csr_pem: Annotated[str, msgspec.Meta(max_length=8192)]
    kind: Kind
    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]


class Renewal(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A successor of the caller's own perimeter certificate, or of the ring 2 certificate of the same name."""

    csr_pem: Annotated[str, msgspec.Meta(max_length=8192)]
    kind: Kind = "perimeter"


def note_svid(connection: Connection, workspace_id: str, sha256: str, now: datetime, expires: datetime) -> None:
    """Note a workspace's own certificate, and forget those of it that ended: there is a new one with each lease.

    The trail has told of each. Old ones go some at a time, so that no attestation waits for many.
    """
    connection.execute(
        certificates.insert().values(
            sha256=sha256, kind=SVID, name=workspace_id, issued_at=iso(now), expires_at=iso(expires)
        )
    )
    mine = (certificates.c.kind == SVID) & (certificates.c.name == workspace_id)
    ended = select(certificates.c.sha256).where(mine, certificates.c.expires_at < iso(now)).limit(FORGOTTEN)
    connection.execute(certificates.delete().where(certificates.c.sha256.in_(ended)))


class Certificates:
    """Issues and records certificates (control ID-02)."""

    def __init__(self, services: Services, authority: Authority, ssh: SshAuthority, ring2_name: str) -> None:
        self._s = services
        self._authority = authority
        self._ssh = ssh
        self._ring2_name = ring2_name

    def ssh(self, caller: Caller, body: SshRequest) -> dict[str, Any]:
        """Issue a user certificate whose only principal is the workspace and whose key id is the session id."""
        now = self._s.clock()
        session = self._s.new_id("ses")
        expires = now + timedelta(seconds=body.ttl_s)
        with self._s.store.write() as tx:
            row = get_row(tx.connection, body.workspace_id)
            direct = not self._s.config.sessions.recorded_only
            source = bound_source(workspace_source(self._s.config.sessions, row.number), body.source_address)
            admitted = direct and row.state == State.ACTIVE and not isinstance(source, ForbiddenError)
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or "")
            fingerprint = hashlib.sha256(" ".join(body.public_key.split()[:2]).encode()).hexdigest()
            certificate = ""
            if admitted and not isinstance(source, ForbiddenError):
                certificate = self._ssh.issue_user(
                    body.public_key, row.id, session, now, body.ttl_s, source_address=source
                )
                tx.connection.execute(
                    sessions.insert().values(
                        id=session,
                        workspace_id=row.id,
                        principal=caller.principal,
                        key_fingerprint=fingerprint,
                        source_address=source,
                        issued_at=iso(now),
                        expires_at=iso(expires),
                    )
                )
            tx.record(
                self._s.events.authentication(
                    now,
                    subject,
                    activity="ticket",
                    outcome="success" if admitted else "failure",
                    protocol="ssh-certificate",
                    session_uid=session,
                    expires=expires,
                    status_detail=_why(source, direct=direct, active=row.state == State.ACTIVE),
                    detail={
                        "key_sha256": fingerprint,
                        "source_address": (body.source_address if isinstance(source, ForbiddenError) else source) or "",
                    },
                )
            )
        if not direct:
            raise ForbiddenError(
                "workspaces are reached through the bastion alone",
                cure="name it in the context file (bastion)",
                code="bastion_required",
            )
        require_state(row, frozenset({State.ACTIVE}))
        if isinstance(source, ForbiddenError):
            raise source
        return {
            "certificate": certificate,
            "host_ca": self._ssh.host_ca,
            "session_id": session,
            "number": row.number,
            "expires_at": iso(expires),
        }

    def x509(self, caller: Caller, body: X509Request) -> dict[str, Any]:
        """Issue a certificate for a service of a perimeter, a bastion, or a machine that the configuration names."""
        now = self._s.clock()
        if body.kind == "machine" and body.name not in self._s.config.machines:
            raise ForbiddenError(
                f"the machine {body.name} is not configured",
                cure="name it and its scopes first (role variable broker_machines)",
                code="unknown_machine",
            )
        if body.kind != "ring2":
            pem = self._authority.issue_perimeter(body.csr_pem, body.name, now, PERIMETER_TTL, kind=body.kind)
        else:
            pem = self._authority.issue_server(
                body.csr_pem, [self._ring2_name], now, PERIMETER_TTL, spiffe_path=f"ring2/{body.name}"
            )
        with self._s.store.write() as tx:
            self._record(tx, caller, body, pem)
        return {
            "certificate": pem.decode(),
            "ca_pem": self._authority.ca_pem.decode(),
            "expires_at": iso(now + PERIMETER_TTL),
        }

    def renew(self, caller: Caller, body: Renewal) -> dict[str, Any]:
        """Issue a successor to a perimeter that still holds a valid certificate; the name stays its own."""
        kind, _, name = caller.principal.partition(":")
        if kind != "perimeter":
            raise ForbiddenError(
                "only a perimeter renews its certificate", cure="ask the operator", code="not_a_perimeter"
            )
        return self.x509(caller, X509Request(csr_pem=body.csr_pem, kind=body.kind, name=name))

    def _record(self, tx: Transaction, caller: Caller, body: X509Request, pem: bytes) -> None:
        now = self._s.clock()
        certificate = x509.load_pem_x509_certificate(pem)
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        expires = certificate.not_valid_after_utc
        tx.connection.execute(
            certificates.insert().values(
                sha256=fingerprint, kind=body.kind, name=body.name, issued_at=iso(now), expires_at=iso(expires)
            )
        )
        tx.record(
            self._s.events.authentication(
                now,
                caller.subject(),
                activity="ticket",
                protocol="x509",
                message=f"certificate of {body.kind} {body.name} issued",
                certificate={
                    "serial_number": f"{certificate.serial_number:x}",
                    "subject": f"{body.kind}/{body.name}",
                    "expiration_time": int(expires.timestamp() * 1000),
                    "fingerprints": [{"value": fingerprint, "algorithm_id": 3}],
                },
            )
        )


def _why(source: str | ForbiddenError | None, *, direct: bool, active: bool) -> str:
    """Return why no certificate was issued; an empty text when one was."""
    if not direct:
        return "bastion_required"
    if not active:
        return "workspace_not_admitted"
    return source.code if isinstance(source, ForbiddenError) else ""
