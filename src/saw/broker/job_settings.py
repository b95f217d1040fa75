"""The part ``jobs`` of the broker's configuration: whether lifecycle calls run playbooks, and who may work on them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from saw.broker.retention_settings import MOST_DAYS, days_of

ASK_SCOPE = "jobs:ask"
"""Lets a machine ask for jobs, and look at, cancel and resume its own."""
RUN_SCOPE = "jobs:run"
"""Lets a machine claim jobs and tell how they go: it is a worker."""
SCOPES = frozenset({ASK_SCOPE, RUN_SCOPE})


class JobSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``lease_s``: how long a worker may be silent before its job counts as interrupted, seconds. ``worker_socket``: a socket
    that serves workers on this host and nothing else, to root and members of ``worker_group``; absent means that workers come
    with a machine's certificate or token alone. ``retention``: ended jobs and what happened in them are removed that long after
    their end, as in ``90d``; a day at least."""

    lease_s: int = 30
    worker_socket: str | None = None
    worker_group: str | None = None
    retention: str = "90d"


def problems_of_jobs(settings: JobSettings) -> Iterator[str]:
    """Yield what is wrong, naming the field."""
    if not 10 <= settings.lease_s <= 600:
        yield "jobs.lease_s must be 10 to 600"
    if not 1 <= (days_of(settings.retention) or 0) <= MOST_DAYS:
        yield f"jobs.retention must be 1d to {MOST_DAYS}d"
    if settings.worker_socket is not None and not Path(settings.worker_socket).is_absolute():
        yield "jobs.worker_socket must be an absolute path"
