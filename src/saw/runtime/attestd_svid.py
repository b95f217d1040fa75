"""The identity files of the workspace, all on the runtime file system and gone after a reboot.

``svid/sds.json`` holds key and certificate together and is replaced by one rename, so that Envoy never sees a pair that
does not match. It is there from the start, without a secret, because Envoy watches only files that exist. The lease is
written last: who sees it finds the identity it belongs to.
"""

from __future__ import annotations

import grp
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from saw.attest.messages import QuoteAnswer
from saw.errors import ConfigError
from saw.files import load_json, write_atomic

_REMOVED = ("lease.json", "key.pem", "svid.pem")
_NO_SECRET = b'{"resources":[]}'


class LeaseFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``svid/lease.json``: the end by the broker's clock, the seconds from issue, and the attested policy digest.

    ``offline_s``: by how many seconds it may be prolonged, once, when it ends while the broker is away.
    """

    expires_at: datetime
    ttl_s: float
    policy_digest: str
    offline_s: float | None = None

    def prolonged(self) -> LeaseFile:
        """Return the lease with its time offline used up; perimeters count the same time by their own clock."""
        more = self.offline_s or 0.0
        return LeaseFile(self.expires_at + timedelta(seconds=more), self.ttl_s + more, self.policy_digest)


class IdentityFiles:
    """``<run>/svid`` and ``<run>/ssh``. The group, when it exists, may read the SVID's key."""

    def __init__(self, run: Path, group: str) -> None:
        self.svid = run / "svid"
        self.ssh = run / "ssh"
        self.svid.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.ssh.mkdir(mode=0o755, parents=True, exist_ok=True)
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            self.svid.chmod(0o700)
        else:
            # Set-group-id: every file made here belongs to the group from its first moment.
            os.chown(self.svid, -1, gid)
            self.svid.chmod(0o2750)
        if not (self.svid / "sds.json").exists():
            write_atomic(self.svid / "sds.json", _NO_SECRET, mode=0o640)

    def write(self, answer: QuoteAnswer, key_pem: bytes) -> LeaseFile:
        """Install a new identity; return its lease."""
        lease = LeaseFile(answer.lease.expires_at, answer.lease.ttl_s, answer.policy_digest, answer.lease.offline_s)
        write_atomic(self.svid / "key.pem", key_pem, mode=0o640)
        write_atomic(self.svid / "svid.pem", answer.svid_pem, mode=0o644)
        write_atomic(self.svid / "ca.pem", answer.ca_pem, mode=0o644)
        write_atomic(self.svid / "sds.json", secret_discovery(answer.svid_pem, key_pem.decode()), mode=0o640)
        if answer.ssh_host_cert:
            write_atomic(self.ssh / "host-cert.pub", answer.ssh_host_cert.strip() + "\n")
        if answer.ssh_user_ca:
            write_atomic(self.ssh / "user-ca.pub", answer.ssh_user_ca.strip() + "\n")
        self.write_lease(lease)
        return lease

    def write_lease(self, lease: LeaseFile) -> None:
        """Replace the lease of the identity that is installed."""
        write_atomic(self.svid / "lease.json", msgspec.json.encode(lease), mode=0o644)

    def remaining(self, now: datetime) -> tuple[LeaseFile, float] | None:
        """Return a lease left by an earlier run of the agent and its seconds left, or remove what is not usable."""
        try:
            lease = load_json(self.svid / "lease.json", LeaseFile)
        except ConfigError:
            self.remove()
            return None
        left = min(lease.ttl_s, (lease.expires_at - now.astimezone(UTC)).total_seconds())
        if left <= 0:
            self.remove()
            return None
        return lease, left

    def remove(self) -> None:
        """Remove key, SVID and lease; ``sds.json`` stays without a secret, for Envoy must find it.

        SSH host certificate and user CA stay: they grant the workspace nothing.
        """
        for name in _REMOVED:
            (self.svid / name).unlink(missing_ok=True)
        write_atomic(self.svid / "sds.json", _NO_SECRET, mode=0o640)


def secret_discovery(certificate_pem: str, key_pem: str) -> bytes:
    """Return Envoy's DiscoveryResponse (JSON) with the TLS certificate secret ``svid``."""
    secret = {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        "name": "svid",
        "tls_certificate": {
            "certificate_chain": {"inline_string": certificate_pem},
            "private_key": {"inline_string": key_pem},
        },
    }
    return msgspec.json.encode({"resources": [secret]})
