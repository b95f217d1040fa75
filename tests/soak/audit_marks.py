"""Reads what is new in a broker's trail: a whole chain, and nothing in it that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from ledger import Ledger, Mark

from saw.audit.chain import ChainedEvent, Head, verify_chain
from saw.broker.client import OperatorClient

PAGE = 1000


class Forged(AssertionError):
    """The trail, the register or the far end has something that nobody asked for."""


class Lost(AssertionError):
    """Something that was acknowledged is not there."""


def marks(event: dict[str, Any]) -> Iterator[Mark]:
    """Yield what an event says in the words of the ledger."""
    entity, said = event.get("entity", {}), event["unmapped"]["saw"]
    kind, uid, act = entity.get("type"), str(entity.get("uid")), event["activity_name"]
    if event.get("status") != "Success":
        return
    if kind == "workspace" and act == "Create":
        yield ("workspace", uid)
    if kind == "workspace" and said.get("to") == "decommissioned":
        yield ("gone", uid)
    if kind == "review" and act == "Create":
        yield ("opened", uid, said["request_digest"])
    if kind == "review" and said.get("decision"):
        yield (said["decision"], uid, said["reviewer"])
    if kind == "review" and said.get("to") == "cancelled":
        yield ("cancel", uid)


class Reader:
    """Follows the broker's own chain from ``head`` on."""

    def __init__(self, ledger: Ledger, head: Head, workspaces: int) -> None:
        self.head = head
        self._ledger = ledger
        self._setup = {("workspace", f"ws-{number}") for number in range(workspaces)}

    def follow(self, client: OperatorClient) -> set[Mark]:
        """Return the marks of all new events; raise what is wrong with them."""
        found: set[Mark] = set()
        while True:
            page = client.request("GET", f"/v1/audit/events?source=broker&after={self.head.seq}&limit={PAGE}")["events"]
            events = [msgspec.convert(item, ChainedEvent) for item in page]
            report = verify_chain(events, start=self.head)
            if not report.complete:
                raise Forged(f"the chain does not hold after {self.head.seq}: {report.findings}")
            for item in events:
                for mark in marks(item.event):
                    self._asked_for(mark)
                    found.add(mark)
            if events:
                self.head = Head(events[-1].seq, events[-1].hash)
            if len(page) < PAGE:
                return found

    def _asked_for(self, mark: Mark) -> None:
        asked = mark[2] in self._ledger.calls if mark[0] == "opened" else mark in self._ledger.tried
        if not asked and mark not in self._setup:
            raise Forged(f"nobody asked for {mark}")
