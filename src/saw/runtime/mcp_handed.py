"""What a mediator holds calls to beside the policy: the tools that the agent was handed (:mod:`saw.runtime.policyd_tools`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from saw.policy.handed_tools import Handed, HandedInvalid, read_handed
from saw.policy.model import DENY, Decision

FILE = Path("/run/saw/policy/tools.json")


@dataclass
class HandedSource:
    """The file in which the policy agent lays down what was handed out, read again whenever it is another one."""

    path: Path = FILE
    now: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    _stamp: tuple[int, int, int] | None = None
    _handed: Handed | None = None

    def refusal(self, server: str, tool: str) -> str:
        """Return why the agent may not call ``tool`` now, whatever policy says; an empty text when it may.

        What is not known, or cannot be read, refuses.
        """
        try:
            status = self.path.stat()
            stamp = (status.st_dev, status.st_ino, status.st_mtime_ns)
            if self._handed is None or stamp != self._stamp:
                self._handed, self._stamp = Handed(read_handed(self.path.read_bytes())), stamp
        except (OSError, HandedInvalid) as error:
            self._handed = None
            return f"it is not known which tools the agent was handed: {error.__class__.__name__}"
        return self._handed.refusal(server, tool, self.now())


def outside(server: str, tool: str, why: str) -> Decision:
    """Return the refusal of a call that policy lets through and no delegation covers."""
    return Decision(
        verdict=DENY,
        reason="outside_delegation",
        detail=why,
        policy=server,
        rule=tool,
        rule_missing={"server": server, "tool": tool[:128]},
        next_steps=("go on without this tool, or ask the sponsor for a delegation that names it",),
    )
