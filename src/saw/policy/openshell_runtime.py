"""A bundle where OpenShell is the runtime of a workspace behind ring 2: what is carried, and who holds the rest.

Nothing of a bundle is dropped in silence. Each part that OpenShell cannot say has a holder; a part that nobody holds stops the
plan until a person accepts it by name. Source of the limits: ``docs/openshell.md``.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import msgspec

from saw.policy.errors import PolicyError, Problem
from saw.policy.globs import path_glob
from saw.policy.loader import GOVERNANCE_FILE, POLICY_FILE, Bundle
from saw.policy.openshell import export
from saw.policy.openshell_finding import Finding
from saw.policy.openshell_message import message

__all__ = ["SUPERVISOR", "Held", "Holder", "Plan", "plan"]

SUPERVISOR = "/opt/openshell/bin/openshell-sandbox"
"""OpenShell's own program that makes every call of a sandbox; ring 1 sees no other caller."""

Holder = Literal["openshell", "ring 2", "handover", "broker", "bundle", "denied", "nobody"]
"""Who holds a part. ``handover``: checked each time a policy is handed over. ``bundle``: checked when the bundle is loaded.
``denied``: what it grants is refused under OpenShell. ``nobody``: it is not held there."""

GOVERNANCE_HOLDERS: dict[str, Holder] = {
    "schema": "bundle",
    "blueprint": "broker",
    "lease": "ring 2",
    "landlock": "handover",
    "allow_audit": "ring 2",
    "plaintext": "denied",
    "credentials": "ring 2",
    "inference": "denied",
    "actions": "ring 2",
    "mcp": "ring 2",
    "budgets": "ring 2",
    "limits": "ring 2",
    "data_classes": "bundle",
    "persistence": "nobody",
    "sandbox": "nobody",
}
"""Holder of each field of ``governance.yaml``. ``mcp`` is that of servers over HTTP; over stdio nobody holds them."""

_REASONS: dict[Holder, str] = {
    "openshell": "held by OpenShell",
    "ring 2": "held by ring 2 alone",
    "handover": "checked at each handover",
    "broker": "kept by the broker",
    "bundle": "checked when the bundle is loaded",
    "denied": "denied under OpenShell",
    "nobody": "held by nobody; accepted by name",
}


class Held(msgspec.Struct, frozen=True):
    """One part that the OpenShell policy does not say as the bundle does: who holds it, what differs, what to do."""

    field: str
    by: Holder
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.by:<9} {self.field}: {self.reason}; {self.cure}"


class Plan(msgspec.Struct, frozen=True):
    """The policy file for OpenShell 0.1.x, the same as its gateway's message (JSON form), and who holds what is not in it."""

    text: str
    message: dict[str, Any]
    held: tuple[Held, ...]

    def counts(self) -> dict[Holder, int]:
        """Return how many parts each holder has."""
        return {holder: sum(one.by == holder for one in self.held) for holder in _REASONS}


def plan(bundle: Bundle, *, supervisor: str = SUPERVISOR, accept: Collection[str] = ()) -> Plan:
    """Return the plan of ``bundle``.

    ``supervisor`` is the path of OpenShell's own program, as the VM sees it; ``accept`` names the fields that nobody holds and
    that a person takes as they are (``governance.persistence``, ``governance.mcp.NAME``). Raises :class:`PolicyError` that names
    everything in the way: what OpenShell would not load, what nobody holds, rules that do not name the supervisor.
    """
    made = export(bundle, only_01=True)
    held = [_held(bundle, finding) for finding in made.findings]
    held += _more(bundle)
    problems = [_unheld(one) for one in held if one.by == "nobody" and one.field not in accept]
    problems += _without_supervisor(bundle, supervisor)
    if problems:
        raise PolicyError(problems)
    return Plan(made.text, message(made.value), tuple(held))


def _held(bundle: Bundle, finding: Finding) -> Held:
    if not finding.field.startswith("governance."):
        by: Holder = {"same": "openshell", "narrower": "openshell", "left_out": "denied"}.get(finding.effect, "ring 2")  # type: ignore[assignment]
        return Held(finding.field, by, finding.reason, finding.cure)
    name = finding.field.removeprefix("governance.")
    by = GOVERNANCE_HOLDERS[name.partition(".")[0].partition("[")[0]]
    server = bundle.governance.mcp.servers.get(name.removeprefix("mcp.")) if name.startswith("mcp.") else None
    if server is not None and server.transport == "stdio":
        by = "nobody"
    if by == "ring 2":
        return Held(finding.field, by, finding.reason, "nothing to do: ring 2 decides every call with the whole bundle")
    if name.startswith("plaintext"):
        reason = (
            "OpenShell dials HTTP without TLS directly, past its upstream proxy, and the VM's packet filter drops that"
        )
        return Held(finding.field, by, reason, "use TLS")
    return Held(finding.field, by, finding.reason, finding.cure)


def _more(bundle: Bundle) -> list[Held]:
    """Return what an exported file cannot report, because it is about where OpenShell stands."""
    found = [
        Held(f"governance.budgets.{budget.id}", "ring 2", "no field says what inference may cost", "nothing to do")
        for budget in bundle.governance.budgets
    ]
    if bundle.governance.allow_audit:
        found.append(Held("governance.allow_audit", "ring 2", "credentials are withheld outside", "nothing to do"))
    if bundle.policy.network_policies:
        reason = "which program calls is told apart by OpenShell alone; rings 1 and 2 see its supervisor"
        found.append(Held("network_policies.*.binaries", "openshell", reason, "nothing to do; no boundary rests on it"))
    return found


def _unheld(one: Held) -> Problem:
    reason = f"under OpenShell nobody holds this: {one.reason}"
    return Problem(GOVERNANCE_FILE, 1, 1, one.field, reason, f"stay with our sandbox, or accept {one.field} by name")


def _without_supervisor(bundle: Bundle, supervisor: str) -> list[Problem]:
    return [
        Problem(
            POLICY_FILE,
            1,
            1,
            f"network_policies.{key}.binaries",
            f"OpenShell makes every call by {supervisor}, which this rule does not name, so ring 1 would refuse its calls",
            f"add {{path: {supervisor}}}",
        )
        for key, rule in bundle.policy.network_policies.items()
        if not any(path_glob(binary.path).fullmatch(supervisor) for binary in rule.binaries)
    ]
