"""Audit: OCSF 1.8 events, their hash chain, and the proof that a copy of a chain is complete."""

from saw.audit.chain import (
    ZERO,
    Chain,
    ChainedEvent,
    ChainError,
    ChainFinding,
    ChainReport,
    Head,
    event_hash,
    link,
    verify_chain,
)
from saw.audit.events import EventFactory, Subject
from saw.audit.ocsf import EventInvalid, validate

__all__ = [
    "ZERO",
    "Chain",
    "ChainError",
    "ChainFinding",
    "ChainReport",
    "ChainedEvent",
    "EventFactory",
    "EventInvalid",
    "Head",
    "Subject",
    "event_hash",
    "link",
    "validate",
    "verify_chain",
]
