"""Which sponsors have changed since a number of the register: by a decision about them, a workspace or an agent of theirs."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, select

from saw.broker.feeds import CHANGES, require_reached
from saw.broker.schema import agents, sponsors, workspaces
from saw.broker.sponsor_states import sponsor_key
from saw.broker.sponsors import views_of


def changes(connection: Connection, after: int, behind: str) -> dict[str, Any]:
    """Return ``{sponsors, next, behind}``: those that changed behind number ``after``, as they are now, the oldest change first.

    Whatever changes a workspace (:func:`saw.broker.workspace_list.changes`) or an agent is a change of its sponsor. Many may have
    one number: ``behind`` is the name up to which those of number ``after`` were told, empty for all of them. The answer has
    both for the next question. Raises ``feed_restarted`` for a number that this register has not reached.
    """
    require_reached(connection, after, "sponsors")
    numbers: dict[str, int] = {}
    for name, number in (
        (sponsors.c.name, sponsors.c.seq),
        (workspaces.c.sponsor, workspaces.c.watch_seq),
        (agents.c.sponsor, agents.c.seq),
    ):
        later = number >= after if behind else number > after
        for sponsor, seq in connection.execute(select(name, number).where(later)).all():
            key = sponsor_key(sponsor)
            numbers[key] = max(seq, numbers.get(key, 0))
    found = sorted(
        (seq, key) for key, seq in numbers.items() if (seq, key) > (after, behind) and (behind or seq > after)
    )
    if not found:
        return {"sponsors": [], "next": after, "behind": behind}
    found = found[:CHANGES]
    known = views_of(connection)
    told = [{**known[key], "seq": seq} for seq, key in found]
    return {"sponsors": told, "next": found[-1][0], "behind": found[-1][1]}
