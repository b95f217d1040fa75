"""Has a call of a model service reserved where its route draws on a budget: by whom, of which budget."""

from __future__ import annotations

from saw.budget.errors import Unmetered
from saw.gateway.metering import Meter, Payer, Reserved
from saw.gateway.releases import Release
from saw.gateway.state import WorkspaceEntry
from saw.gateway.view import View, root_of
from saw.policy.model import Decision, Request


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
) -> Reserved | None:
    """Reserve what an allowed call may cost at most; return None where nothing has to be paid.

    ``delegation`` is the one that covers the call, empty where none is needed: the engagement is the one that its line began
    with. Raises the errors of :mod:`saw.budget.errors`, whose codes are the reasons of the refusal.
    """
    if decision.inference is None or request.method.upper() != "POST":
        return None
    route = release.governance.route(decision.inference, request.port)
    budget = release.governance.paying(route)
    if budget is None:
        return None
    if meter is None:
        raise Unmetered(f"the budget {budget.id} cannot be enforced: this perimeter has no ledger")
    payer = Payer(
        workspace=entry.id,
        engagement=root_of(view, delegation),
        sponsor=entry.sponsor,
        agent=entry.agent or "",
        blueprint=release.blueprint,
        policy_digest=release.digest,
        request_id=request_id[:256],
    )
    return await meter.reserve(request, decision.canonical_path, route, budget, payer)
