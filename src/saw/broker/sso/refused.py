"""An attempt of somebody whose roles do not allow it: the event that says so."""

from __future__ import annotations

from saw.broker.context import Caller, Services


def record_refused(services: Services, caller: Caller, operation: str, workspace: str = "") -> None:
    """Audit that ``operation`` was refused to ``caller``; ``workspace`` is the one that it was about, when that is known."""
    with services.store.write() as tx:
        tx.record(
            services.events.api_activity(
                services.clock(),
                caller.subject(workspace),
                operation,
                outcome="failure",
                message="a role does not allow it",
                status_detail="not_allowed",
                resource=("workspace", workspace) if workspace else None,
            )
        )
