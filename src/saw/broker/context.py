"""What every part of the broker works with: database, clock, randomness, events; and who calls."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from saw.audit import EventFactory, Subject
from saw.broker.clock import Clock
from saw.broker.config import BrokerConfig
from saw.broker.secret_place import Signer
from saw.broker.store import Store
from saw.secrets.store import SecretStore


@dataclass(frozen=True)
class Services:
    """Shared by all parts. ``random(n)`` gives n unpredictable bytes; ``secrets`` is where the broker's own keys are."""

    config: BrokerConfig
    store: Store
    clock: Clock
    random: Callable[[int], bytes]
    events: EventFactory
    secrets: SecretStore
    signer: Signer

    def new_id(self, prefix: str) -> str:
        """Return an unpredictable id such as ``ses-1f…`` (128 bits)."""
        return f"{prefix}-{self.random(16).hex()}"


class Caller(msgspec.Struct, frozen=True):
    """Who made a call: a principal (``operator:root``, ``workspace:ws-demo``, ``perimeter:edge``) and from where."""

    principal: str
    address: str
    request_id: str

    def subject(self, workspace: str = "", *, agent: str = "", policy_digest: str = "") -> Subject:
        """Return the subject of an audit event about ``workspace`` caused by this caller."""
        return Subject(
            principal=self.principal,
            agent=agent,
            workspace=workspace,
            policy_digest=policy_digest,
            request_id=self.request_id,
            address=self.address,
        )


#: The broker itself, when it acts on its own (at start, on a timer).
BROKER = Caller("service:saw-broker", "local", "")


def new_request_id() -> str:
    """Return a fresh request id."""
    return str(uuid.uuid4())
