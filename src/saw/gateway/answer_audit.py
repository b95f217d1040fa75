"""What of an MCP server's answer was not passed on as it came, for the audit trail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime

from saw.audit.events import EventFactory
from saw.gateway.events import answer_event
from saw.gateway.judge import Verdict
from saw.gateway.mcp_exchange import Finding
from saw.gateway.spool import Spool

MOST_TOLD = 8
"""How many things of one kind an exchange tells the audit trail one by one; the rest is counted at its end."""


class AnswerAudit:
    """Tells the audit trail what an exchange did not pass on as it came, in bounded number."""

    def __init__(self, verdict: Verdict, spool: Spool, factory: EventFactory, now: Callable[[], datetime]) -> None:
        self._verdict = verdict
        self._spool = spool
        self._factory = factory
        self._now = now
        self._waiting: list[Finding] = []
        self._seen: Counter[str] = Counter()
        self._rest: Counter[str] = Counter()

    def found(self, finding: Finding) -> None:
        """Take in one thing; :meth:`tell` writes it."""
        self._seen[finding.kind] += 1
        if self._seen[finding.kind] <= MOST_TOLD:
            self._waiting.append(finding)
        else:
            self._rest[finding.kind] += 1

    async def tell(self, *, end: bool = False) -> None:
        """Write what was found; at the ``end`` also what was only counted. Raises what the spool raises."""
        waiting, self._waiting = self._waiting, []
        for finding in waiting:
            await self._record(finding.kind, finding.detail, 1)
        if end:
            rest, self._rest = self._rest, Counter()
            for kind, times in sorted(rest.items()):
                await self._record(kind, "more of the same answer", times)

    async def _record(self, kind: str, detail: str, times: int) -> None:
        await self._spool.record(
            answer_event(self._verdict, self._factory, self._now(), kind, detail=detail, times=times)
        )
