"""The states of a workspace and which step leads where.

``requested → provisioning → attesting → active → stopped → quarantined → decommissioned``. Only a good quote leads to
``active``; nobody can ask for that state. ``quarantined`` (the kill switch) is left only by an explicit release to
``stopped`` or by decommissioning, and ``decommissioned`` is final.
"""

from __future__ import annotations

import enum

from saw.broker.errors import ConflictError, MalformedError


class State(enum.StrEnum):
    """Where a workspace is in its life."""

    REQUESTED = "requested"
    PROVISIONING = "provisioning"
    ATTESTING = "attesting"
    ACTIVE = "active"
    STOPPED = "stopped"
    QUARANTINED = "quarantined"
    DECOMMISSIONED = "decommissioned"


#: Steps that an operator or a driver may ask for.
STEPS: dict[State, frozenset[State]] = {
    State.REQUESTED: frozenset({State.PROVISIONING, State.QUARANTINED, State.DECOMMISSIONED}),
    State.PROVISIONING: frozenset({State.ATTESTING, State.STOPPED, State.QUARANTINED, State.DECOMMISSIONED}),
    State.ATTESTING: frozenset({State.PROVISIONING, State.STOPPED, State.QUARANTINED, State.DECOMMISSIONED}),
    State.ACTIVE: frozenset({State.ATTESTING, State.STOPPED, State.QUARANTINED, State.DECOMMISSIONED}),
    State.STOPPED: frozenset({State.PROVISIONING, State.ATTESTING, State.QUARANTINED, State.DECOMMISSIONED}),
    State.QUARANTINED: frozenset({State.STOPPED, State.DECOMMISSIONED}),
    State.DECOMMISSIONED: frozenset(),
}

#: States in which a workspace may attest. A stopped one must be started first, so that a machine that lingers after
#: ``stop`` cannot make itself active again.
MAY_ATTEST = frozenset({State.ATTESTING, State.ACTIVE})

#: States in which an attestation key may be enrolled.
MAY_ENROL = MAY_ATTEST | {State.PROVISIONING}

#: States in which the broker hears what a workspace reports. A killed or retired one has no say in rollouts any more.
MAY_REPORT = frozenset(State) - {State.QUARANTINED, State.DECOMMISSIONED}


def parse_state(name: str) -> State:
    """Return the state called ``name``; raise :class:`MalformedError` with the list of states."""
    try:
        return State(name)
    except ValueError as error:
        raise MalformedError(
            f"there is no state {name!r}", cure="use one of " + ", ".join(State), code="unknown_state"
        ) from error


def check_step(workspace_id: str, current: State, to: State) -> None:
    """Raise :class:`ConflictError` when an operator may not take ``workspace_id`` from ``current`` to ``to``."""
    if to not in STEPS[current]:
        allowed = ", ".join(sorted(STEPS[current])) or "none, this state is final"
        cure = "a good quote alone leads to active" if to is State.ACTIVE else f"allowed from here: {allowed}"
        raise ConflictError(
            f"{workspace_id} is {current} and cannot become {to}",
            cure=cure,
            code="transition_refused",
            details={"state": str(current), "to": str(to)},
        )
