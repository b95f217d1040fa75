"""The control report of ``make workspace``: a table for people, ``build/report.json`` for programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from saw.files import write_atomic
from saw.lab.steps import Step


class Report(msgspec.Struct):
    """``{ok, problems, error, steps, calls, attestation, audit, workspace, image, accelerator}``, see the guide."""

    ok: bool
    steps: list[Step]
    calls: list[dict[str, Any]]
    attestation: dict[str, Any]
    audit: dict[str, Any]
    workspace: dict[str, Any] = {}
    image: dict[str, Any] = {}
    accelerator: dict[str, Any] = {}
    problems: list[str] = []
    error: dict[str, Any] | None = None

    def judge(self) -> bool:
        """Set ``problems`` and ``ok`` from what was recorded: ok only when every part is there and as it must be."""
        problems = [f"step {step.name!r} failed" for step in self.steps if not step.ok]
        if self.error:
            problems.append(str(self.error["message"]))
        if not self.calls:
            problems.append("no call was made")
        problems += [
            f"{call['name']}: {call['verdict']} ({call['reason'] or 'no reason'}) where {call['expected']} is expected"
            for call in self.calls
            if not call["ok"]
        ]
        attached = self.workspace.get("attach") or {}
        if not attached.get("ok"):
            problems.append("attaching to the persistent terminal did not work as it must")
        if self.attestation.get("verdict") != "attested":
            why = "; ".join(self.attestation.get("problems") or ["there is no verdict"])
            problems.append(f"not attested: {why}")
        digest = self.attestation.get("policy_digest")
        if not digest or digest != self.attestation.get("released_digest"):
            problems.append("the attested policy is not the released one")
        if self.audit.get("complete") is not True:
            problems.append(f"the audit trail is not complete: {len(self.audit.get('findings') or [])} findings")
        self.problems = problems
        self.ok = not problems
        return self.ok

    def write(self, path: Path) -> None:
        """Write the JSON form."""
        write_atomic(path, msgspec.json.format(msgspec.json.encode(self)))

    def table(self) -> str:
        """Return the terminal form."""
        lines = ["", f"{'call':<37} {'control':<8} {'expected':<9} {'verdict':<8} {'reason':<28} {'ms':>6}"]
        lines.append("-" * len(lines[-1]))
        for call in self.calls:
            mark = " " if call["ok"] else "!"
            lines.append(
                f"{mark}{call['name']:<36} {call['control']:<8} {call['expected']:<9} {call['verdict']:<8} "
                f"{call['reason'] or '-':<28} {call['ms']:>6}"
            )
        verdict = self.attestation.get("verdict", "none")
        audit = "complete" if self.audit.get("complete") else "NOT complete"
        lines += [
            "",
            f"attestation: {verdict} (policy {str(self.attestation.get('policy_digest', ''))[:16]}…)",
            f"audit trail: {audit}, {self.audit.get('events', 0)} events",
            f"accelerator: {self.accelerator.get('name', 'none')} ({self.accelerator.get('reason', 'no machine ran')})",
            f"steps: {sum(step.seconds for step in self.steps):.0f} s in all",
            "",
        ]
        lines += [f"! {problem}" for problem in self.problems]
        lines.append("RESULT: " + ("everything as expected" if self.ok else "NOT as expected - see the lines marked !"))
        return "\n".join(lines)
