"""What is wrong with a GPU as OCSF 1.8 Detection Findings (class 2004) in a spool of their own; told once while it lasts."""

from __future__ import annotations

from datetime import datetime
from functools import partial

from saw.audit.events import EventFactory
from saw.edr.detection import Detection, event_of
from saw.edr.place import ways_of, workspace_id
from saw.edr.store import Store
from saw.gpu.check import State
from saw.gpu.config import GpuConfig

KIND = "gpu_unhealthy"
_AREA = "gpu"


def open_store(config: GpuConfig) -> Store:
    """Open the spool of this host."""
    return Store(
        config.state,
        config.spool_limit,
        ways=ways_of(config),
        render=partial(event_of, principal="saw-gpu"),
        tells_gaps=False,
    )


def record(state: State, config: GpuConfig, store: Store, factory: EventFactory, now: datetime) -> list[int]:
    """Write a finding for each way in which a GPU is newly ill; return their numbers."""
    known = store.known(_AREA)
    found = [
        Detection(
            KIND,
            problem,
            "A GPU is not well",
            f"{KIND}|{problem}|{now.isoformat()}",
            "medium",
            {"devices": list(state.present), "module_version": state.module_version},
        )
        for problem in state.problems
        if problem not in known
    ]
    marks: dict[str, str | None] = {name: None for name in known if name not in state.problems}
    marks |= dict.fromkeys(state.problems, "ill")
    if known.keys() == set(state.problems):
        return []
    return store.record(found, factory, now, workspace=workspace_id(config), known={_AREA: marks})
