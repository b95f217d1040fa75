"""What is a finding of drift, for whoever looks and for the broker that keeps it: OCSF 1.8 Compliance Findings (class 2003)."""

from __future__ import annotations

from typing import Literal

from saw.audit.events import Severity

Kind = Literal["drift", "host_unchecked", "waiver_expired", "check_incomplete"]
#: Kind → the rule that is broken, and how bad that is.
RULES: dict[Kind, tuple[str, Severity]] = {
    "drift": ("a host is as the plays want it", "medium"),
    "host_unchecked": ("every host of the plays is checked", "medium"),
    "waiver_expired": ("drift is waived until a day that has not passed", "medium"),
    "check_incomplete": ("every play of the check runs", "medium"),
}
STANDARD = "Secure Agent Workspace P0-01"

__all__ = ["RULES", "STANDARD", "Kind"]
