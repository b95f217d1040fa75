"""The audit rows of a rollout: steps of its life, and findings that somebody must look at."""

from __future__ import annotations

from typing import Any, Literal

from sqlalchemy import Row

from saw.audit.events import Outcome, Severity
from saw.broker.context import BROKER, Caller, Services
from saw.broker.store import Transaction

Step = Literal["start", "stop", "enable", "update"]
_TEXT = 1024


class RolloutAudit:
    """Writes a rollout's events into the transaction of the change."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def record(
        self, tx: Transaction, rollout: Row[Any], caller: Caller, step: Step, text: str, *, outcome: Outcome = "success"
    ) -> None:
        """Record a step that ``caller`` took."""
        tx.record(
            self._s.events.application_lifecycle(
                self._s.clock(),
                caller.subject(policy_digest=rollout.policy_digest),
                (f"policy/{rollout.blueprint}", str(rollout.revision)),
                activity=step,
                outcome=outcome,
                message=text[:_TEXT],
                detail={"ring": rollout.ring, "revision": rollout.revision},
            )
        )

    def finding(
        self,
        tx: Transaction,
        rollout: Row[Any],
        kind: str,
        text: str,
        *,
        severity: Severity = "high",
        workspace: str = "",
        **detail: object,
    ) -> None:
        """Record a finding about ``rollout``, and about one ``workspace`` when it is named."""
        tx.record(
            self._s.events.detection_finding(
                self._s.clock(),
                BROKER.subject(workspace, policy_digest=rollout.policy_digest),
                kind=kind,
                title=text[:_TEXT],
                severity=severity,
                detail={"ring": rollout.ring, "blueprint": rollout.blueprint, "revision": rollout.revision, **detail},
            )
        )
