"""Findings of drift, reported by whoever looked: each becomes a Compliance Finding of the trail under the caller's name."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from saw.audit.drift import RULES, STANDARD, Kind
from saw.broker.context import Caller, Services

Short = Annotated[str, msgspec.Meta(max_length=256)]
Words = Annotated[str, msgspec.Meta(max_length=1024)]


class DriftFinding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One finding. ``finding`` is its id, the same when it is reported as ``resolved``."""

    kind: Kind
    finding: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
    resolved: bool
    playbook: Short = ""
    host: Short = ""
    role: Short = ""
    task: Short = ""
    module: Short = ""
    place: Short = ""
    words: Words = ""


def record_drift(services: Services, caller: Caller, found: DriftFinding) -> dict[str, Any]:
    """Write the finding into the broker's chain. It arrives at least once; ``finding`` tells two sights of one apart."""
    control, severity = RULES[found.kind]
    detail = {name: value for name, value in msgspec.structs.asdict(found).items() if value != ""}
    parts = (found.host, found.role, found.task, found.place or found.words)
    with services.store.write() as tx:
        tx.record(
            services.events.compliance_finding(
                services.clock(),
                caller.subject(),
                kind=found.kind,
                title=": ".join(filter(None, (found.kind, *parts))),
                control=control,
                standards=[STANDARD],
                severity="informational" if found.resolved else severity,
                uid=found.finding,
                resolved=found.resolved,
                detail=detail,
            )
        )
    return {"recorded": True}
