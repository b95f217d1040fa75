"""Counts the calls that were allowed and denied under each policy.

Those of ring 2 come from the gatekeepers' events as they are stored. Calls that ring 1 denied never reach ring 2: of those each
workspace tells, and is believed up to a bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, func, select

from saw.audit import ChainedEvent
from saw.broker.rollout_limits import Calls
from saw.broker.schema import policy_calls, workspaces
from saw.broker.store import Transaction

_HTTP_ACTIVITY = 4002
_ALLOWED, _DENIED = 1, 2
#: Refusals that speak about the policy; others (a lapsed lease, a resolver that fails) would be there with any policy.
_OF_THE_POLICY = frozenset(
    {
        "host_not_allowed",
        "method_or_path_not_allowed",
        "deny_rule",
        "binary_not_allowed",
        "destination_blocked",
        "review_required",
        "action_denied",
        "model_not_allowed",
        "data_class_not_allowed",
        "operation_not_allowed",
        "body_unreadable",
        "body_too_large",
        "budget_unenforced",
        "price_unknown",
        "tool_not_allowed",
        "argument_not_allowed",
        "credential_unavailable",
        "placeholder_unbound",
    }
)


MAX_INSIDE = 1000
"""Denied calls of one workspace under one policy above which its own word adds nothing."""


class Tally:
    """The calls of one shipment, each counted once: give it only events that were stored just now."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[int]] = {}

    def add(self, item: ChainedEvent) -> None:
        """Count ``item`` when it is a call that was decided under a policy."""
        event = item.event
        digest, workspace = _text(event.get("policy"), "uid"), _text(event.get("device"), "uid")
        action = event.get("action_id")
        if event.get("class_uid") != _HTTP_ACTIVITY or not digest or not workspace:
            return
        if action == _ALLOWED:
            self._found.setdefault((workspace, digest), [0, 0])[0] += 1
        elif action == _DENIED and event.get("status_detail") in _OF_THE_POLICY:
            self._found.setdefault((workspace, digest), [0, 0])[1] += 1

    def write(self, tx: Transaction) -> frozenset[str]:
        """Add what was counted to the stored counts; return the digests concerned."""
        for (workspace, digest), (allowed, denied) in self._found.items():
            _add(tx, workspace, digest, allowed, denied)
        return frozenset(digest for _, digest in self._found)


def count_inside(tx: Transaction, workspace: str, digest: str, denied: Mapping[str, int]) -> int:
    """Add calls that ring 1 of ``workspace`` says it denied, by reason; return how many were counted.

    What ring 1 allowed is not counted: ring 2 decides it again and counts it.
    """
    where = (policy_calls.c.workspace_id == workspace) & (policy_calls.c.policy_digest == digest)
    known = tx.connection.execute(select(policy_calls.c.denied).where(where)).scalar_one_or_none() or 0
    told = sum(number for reason, number in denied.items() if reason in _OF_THE_POLICY)
    counted = max(0, min(told, MAX_INSIDE - known))
    if counted:
        _add(tx, workspace, digest, 0, counted)
    return counted


def _add(tx: Transaction, workspace: str, digest: str, allowed: int, denied: int) -> None:
    where = (policy_calls.c.workspace_id == workspace) & (policy_calls.c.policy_digest == digest)
    more = {"allowed": policy_calls.c.allowed + allowed, "denied": policy_calls.c.denied + denied}
    if tx.connection.execute(policy_calls.update().where(where).values(**more)).rowcount == 0:
        tx.connection.execute(
            policy_calls.insert().values(workspace_id=workspace, policy_digest=digest, allowed=allowed, denied=denied)
        )


def calls_under(connection: Connection, ring: str, digest: str | None) -> Calls:
    """Return the calls of a ring's workspaces under the policy ``digest``."""
    if digest is None:
        return Calls()
    query = (
        select(func.coalesce(func.sum(policy_calls.c.allowed), 0), func.coalesce(func.sum(policy_calls.c.denied), 0))
        .select_from(policy_calls.join(workspaces, workspaces.c.id == policy_calls.c.workspace_id))
        .where(policy_calls.c.policy_digest == digest, workspaces.c.ring == ring)
    )
    allowed, denied = connection.execute(query).one()
    return Calls(int(allowed), int(denied))


def forget_calls(tx: Transaction, ring: str, digest: str) -> None:
    """Begin the count of a policy anew in a ring; the events themselves stay."""
    mine = select(workspaces.c.id).where(workspaces.c.ring == ring)
    where = (policy_calls.c.policy_digest == digest) & policy_calls.c.workspace_id.in_(mine)
    tx.connection.execute(policy_calls.delete().where(where))


def _text(value: Any, name: str) -> str:
    found = value.get(name) if isinstance(value, Mapping) else None
    return found if isinstance(found, str) and len(found) <= 64 else ""
