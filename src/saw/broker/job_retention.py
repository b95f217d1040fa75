"""Ended jobs go when their time is over, with what happened in their runs (control LIF-01); a live or held one never does."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select

from saw.broker.clock import iso
from saw.broker.context import BROKER, Services
from saw.broker.holds import holds_in_force
from saw.broker.retention_settings import MOST_DAYS, days_of
from saw.broker.schema import job_events, jobs
from saw.jobs.messages import LIVE

STEP = 100
"""Most jobs that one step removes, each with 2,000 events at most."""


def remove_old_jobs(services: Services) -> int:
    """Remove up to :data:`STEP` jobs that ended longer ago than ``jobs.retention``, and tell how many; return how many."""
    settings = services.config.jobs
    if settings is None:
        return 0
    days = days_of(settings.retention) or MOST_DAYS
    before = iso(services.clock() - timedelta(days=days))
    old = jobs.c.state.not_in(LIVE) & (jobs.c.ended_at <= before)
    query = (
        select(jobs.c.id, jobs.c.workspace_id, jobs.c.asked_at, jobs.c.ended_at).where(old).order_by(jobs.c.ended_at)
    )
    with services.store.read() as connection:
        if connection.execute(query.limit(1)).first() is None:
            return 0
    with services.store.write() as tx:
        held = holds_in_force(tx.connection)
        due = [
            row
            for row in tx.connection.execute(query).all()
            if not held.takes(row.workspace_id, row.asked_at, row.ended_at)
        ][:STEP]
        if not due:
            return 0
        for row in due:
            tx.connection.execute(job_events.delete().where(job_events.c.job_id == row.id))
            tx.connection.execute(jobs.delete().where(jobs.c.id == row.id))
        detail: dict[str, object] = {"jobs": len(due), "first": due[0].ended_at, "last": due[-1].ended_at, "days": days}
        tx.record(
            services.events.api_activity(
                services.clock(),
                BROKER.subject(),
                "jobs.retention.remove",
                activity="delete",
                message=f"{len(due)} jobs that ended from {due[0].ended_at} to {due[-1].ended_at} were removed",
                detail=detail,
            )
        )
    return len(due)
