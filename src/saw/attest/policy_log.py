"""The policy PCR: a chain of every policy digest activated since boot, with its own log.

PCR 14 starts at zeros and is extended with SHA-256 of each digest's 64 ASCII hex digits. Software in the workspace can
extend the PCR further but never take a value back, so a digest that was ever active stays visible until the next boot.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from saw.attest.messages import PolicyLogEntry

POLICY_PCR = 14


def measurement(policy_digest: str) -> bytes:
    """Return the 32 bytes by which PCR 14 is extended for ``policy_digest`` (64 hex digits)."""
    return hashlib.sha256(policy_digest.encode("ascii")).digest()


def extend(value: bytes, digest: bytes) -> bytes:
    """Return the PCR value after extending ``value`` with ``digest`` in the SHA-256 bank."""
    return hashlib.sha256(value + digest).digest()


def fold(entries: Iterable[PolicyLogEntry]) -> bytes:
    """Return the value that PCR 14 has after ``entries``."""
    value = bytes(32)
    for entry in entries:
        value = extend(value, measurement(entry.policy_digest))
    return value
