"""Has a call of a model service counted where its route says so: by whom, against which budget and which limits."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from saw.budget.errors import Exhausted, QuotaExhausted, RateLimited, Unmetered
from saw.budget.ledger import money
from saw.errors import SawError
from saw.gateway.held import DEFAULT_OPEN_S, Held
from saw.gateway.metering import Meter, Payer, Reserved, tellable
from saw.gateway.releases import Release
from saw.gateway.state import WorkspaceEntry
from saw.gateway.view import View, root_of
from saw.policy.governance import Budget, InferenceRoute
from saw.policy.inference import edit_of
from saw.policy.model import Decision, Request
from saw.review.messages import BEYOND_BUDGET


class Unpaid(Exception):
    """A call that does not fit. ``reason``, ``detail`` and ``cure`` are told; ``budget`` or ``limit`` says what is left.

    ``held``: a person may let it pass once all the same.
    """

    def __init__(self, error: SawError, held: Held | None) -> None:
        super().__init__(error.message)
        told = tellable(error.details) or None
        counted = isinstance(error, RateLimited | QuotaExhausted)
        self.reason, self.detail, self.cure = error.code, error.message, error.cure
        self.budget: Mapping[str, object] | None = None if counted else told
        self.limit: Mapping[str, object] | None = told if counted else None
        self.held = held


async def pay(
    meter: Meter | None,
    request: Request,
    decision: Decision,
    release: Release,
    entry: WorkspaceEntry,
    *,
    view: View,
    delegation: str,
    request_id: str,
    agreed: str = "",
) -> Reserved | None:
    """Count an allowed call and reserve what it may cost at most; return None where nothing has to be counted.

    ``delegation`` is the one that covers the call, empty where none is needed: the engagement is the one that its line began
    with. ``agreed`` is the rule of the review in which people agreed to the call, if they did. Raises :class:`Unpaid`.
    """
    if decision.inference is None or request.method.upper() != "POST":
        return None
    route = release.governance.way(decision.inference, request.port, decision.way)
    budget, limits = release.governance.paying(route), release.governance.counting(route)
    if budget is None and not limits:
        return None
    asks = budget is not None and budget.on_exhaust == "review"
    approved = budget is not None and asks and agreed.partition(":")[0] == BEYOND_BUDGET + budget.id
    try:
        if meter is None:
            what = f"the budget {budget.id}" if budget is not None else f"the limit {limits[0].id}"
            raise Unmetered(f"{what} cannot be enforced: this perimeter has no ledger")
        payer = Payer(
            workspace=entry.id,
            engagement=root_of(view, delegation),
            sponsor=entry.sponsor,
            agent=entry.agent or "",
            blueprint=release.blueprint,
            policy_digest=release.digest,
            request_id=request_id[:256],
        )
        return await meter.reserve(
            as_sent(request, route),
            decision.canonical_path,
            route,
            budget=budget,
            limits=limits,
            payer=payer,
            approved=approved,
        )
    except Exhausted as error:
        held = _held(release, budget, error) if budget is not None and asks and not agreed else None
        raise Unpaid(error, held) from error
    except SawError as error:
        raise Unpaid(error, None) from error


def as_sent(request: Request, route: InferenceRoute) -> Request:
    """Return the call with the model in it that the one it names stands for."""
    edit = edit_of(route, request.body)
    return (
        request
        if edit is None or request.body is None
        else msgspec.structs.replace(request, body=edit.apply(request.body))
    )


def _held(release: Release, budget: Budget, error: Exhausted) -> Held:
    """Return what a review of a call beyond its budget asks for: one of those who own the blueprint."""
    asked, left = (money(int(str(error.details[name])), budget.limit.currency) for name in ("asked", "left"))
    return Held(
        group=release.governance.blueprint.owner,
        quorum=1,
        expires_in_s=DEFAULT_OPEN_S,
        rule=f"{BEYOND_BUDGET}{budget.id}: the call may cost {asked}, and {left} is left",
    )
