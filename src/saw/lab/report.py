"""The control report of ``make workspace``: a table for people, ``build/report.json`` for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from saw.files import write_atomic
from saw.lab.steps import Step


class Report(msgspec.Struct):
    """``{ok, steps, calls, attestation, audit}`` as documented in the README."""

    ok: bool
    steps: list[Step]
    calls: list[dict[str, Any]]
    attestation: dict[str, Any]
    audit: dict[str, Any]
    workspace: dict[str, Any] = {}
    image: dict[str, Any] = {}

    def write(self, path: Path) -> None:
        """Write the JSON form."""
        write_atomic(path, msgspec.json.format(msgspec.json.encode(self)))

    def table(self) -> str:
        """Return the terminal form."""
        lines = ["", f"{'call':<34} {'control':<8} {'expected':<9} {'verdict':<8} {'reason':<28} {'ms':>6}"]
        lines.append("-" * len(lines[-1]))
        for call in self.calls:
            mark = " " if call["ok"] else "!"
            lines.append(
                f"{mark}{call['name']:<33} {call['control']:<8} {call['expected']:<9} {call['verdict']:<8} "
                f"{call['reason'] or '-':<28} {call['ms']:>6}"
            )
        verdict = self.attestation.get("verdict", "none")
        audit = "complete" if self.audit.get("complete") else "NOT complete"
        lines += [
            "",
            f"attestation: {verdict} (policy {str(self.attestation.get('policy_digest', ''))[:16]}…)",
            f"audit trail: {audit}, {self.audit.get('events', 0)} events",
            f"steps: {sum(step.seconds for step in self.steps):.0f} s in all",
            "",
            "RESULT: " + ("everything as expected" if self.ok else "NOT as expected - see the lines marked !"),
        ]
        return "\n".join(lines)
