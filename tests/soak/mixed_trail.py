"""What arrived at the far ends and what the trail has of it, taken in as it comes: an hour's rows need not be kept.

:meth:`Trail.compared` says what the calls that clients made should have left behind, and what did not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from saw.audit.chain import ChainedEvent, Head, verify_chain

Place = tuple[str, str]
"""Host and path of a call."""
GIT = "git.example.com"
DENIED = {
    "hidden": ("hidden.example.com", ""), "other-model": ("inference.local", "/v1/chat/completions"),
    "mutation": ("graph.example.com", "/graphql"), "other-tool": ("tools.example.com", "/mcp"),
}  # fmt: skip
"""Where calls that ring 1 refuses are counted; those of ``refused`` have a path of their own."""
COUNTED = {
    "write": [("api.example.com", "/v1/notes")],
    "model": [("inference.local", "/v1/chat/completions")],
    "greet": [("grpc.example.com", "/demo.Greeter/Hello"), ("grpc.example.com", "/demo.Greeter/Count")],
    "query": [("graph.example.com", "/graphql")],
    "tool": [("tools.example.com", "/mcp")],
    "database": [("db.example.com", "/")],
    "clone": [(GIT, "/team/demo.git/info/refs"), *[(GIT, "/team/demo.git/git-upload-pack")] * 2],
}
"""The rows of one allowed call of a kind whose path is the same for all. Git asks for the names (version 2 of its protocol) and
then for the pack."""
NAMED = {
    "read": ("api.example.com", "/v1/mixed/"), "talk": ("chat.example.com", "/rooms/"),
    "neighbour": ("api.example.com", "/v1/neighbour/"),
}  # fmt: skip
"""Where the calls are that have a path of their own: the start of it."""
UNSEEN = {"grpc.example.com", "chat.example.com", "db.example.com"}
"""Hosts whose far ends do not write down what arrives: their clients judge by the answers."""
BEFORE = {("api.example.com", "/v1/ready"), ("api.example.com", "/v1/things")}
"""What is called until both rings are ready."""
TOLD = 3


class Broker(Protocol):
    """Where the perimeter's events arrive."""

    events: list[ChainedEvent]


class FarEnd(Protocol):
    """Where calls arrive: method, host and path of each."""

    arrived: list[tuple[str, str, str]]


class Trail:
    """Rows and arrivals, counted; the newest row stays where it is, because the broker goes on from it."""

    def __init__(self, broker: Broker, far: FarEnd) -> None:
        self._broker, self._far = broker, far
        self._counted = 0
        self._head = Head()
        self.total = 0
        self.arrived: Counter[Place] = Counter()
        self.allowed: Counter[Place] = Counter()
        self.denied: Counter[Place] = Counter()
        self.sessions: Counter[str] = Counter()
        self.broken: list[str] = []

    def take(self) -> None:
        """Count what came since, and check that its rows go on with the chain."""
        events, arrived = self._broker.events, self._far.arrived
        until = len(events)
        fresh = events[self._counted : until]
        if fresh:
            report = verify_chain(fresh, start=self._head)
            self.broken += [f"the trail: {finding}" for finding in report.findings]
            self._head = report.head
            for one in fresh:
                self._row(one.event)
            self.total += len(fresh)
            del events[: until - 1]
            self._counted = 1
        came = arrived[:]
        del arrived[: len(came)]
        self.arrived.update((host, path) for _, host, path in came)

    def _row(self, event: Mapping[str, Any]) -> None:
        if "http_request" in event:
            url = event["http_request"]["url"]
            verdict = event["unmapped"]["saw"]["verdict"]
            (self.allowed if verdict == "allow" else self.denied)[url["hostname"], url["path"]] += 1
        elif (operation := event.get("api", {}).get("operation", "")).startswith("postgres."):
            self.sessions[f"{operation.removeprefix('postgres.')} {event['status'].lower()}"] += 1

    @property
    def seen(self) -> dict[str, object]:
        """Return the numbers so far, by host."""
        return {
            "rows": self.total, "arrived": dict(_by_host(self.arrived)), "allowed": dict(_by_host(self.allowed)),
            "denied": dict(_by_host(self.denied)), "sessions": dict(self.sessions), "broken": self.broken[:TOLD],
        }  # fmt: skip

    def expected(self, done: Mapping[str, int]) -> Counter[Place]:
        """Return the rows of the allowed calls: ``done`` has their number by kind and worker."""
        found: Counter[Place] = Counter()
        for worker, count in done.items():
            kind = worker.rpartition("-")[0]
            for place in COUNTED.get(kind, ()):
                found[place] += count
            if kind in NAMED:
                host, path = NAMED[kind]
                found.update((host, f"{path}{worker}-{number}") for number in range(count))
        return +found

    def complete(self, done: Mapping[str, int]) -> bool:
        """Return whether as many rows as are expected have come."""
        self.take()
        sessions = of_kind(done, "database")
        return (
            (self.allowed - Counter({place: self.allowed[place] for place in BEFORE})).total()
            >= self.expected(done).total()
        ) and self.sessions["end success"] >= sessions

    def compared(self, done: Mapping[str, int], log: Path) -> list[str]:
        """Return what is missing or too much: at the far ends, in the trail, and in ring 1's ``log`` of refusals."""
        expected = self.expected(done)
        arrived = Counter({place: count for place, count in expected.items() if place[0] not in UNSEEN})
        models = arrived.pop(("inference.local", "/v1/chat/completions"), 0)
        arrived["models.example.com", "/v1/chat/completions"] = models
        refused = Counter({place: count for kind, place in DENIED.items() if (count := of_kind(done, kind))})
        for worker, count in done.items():
            if worker.startswith("refused-"):
                refused.update(("api.example.com", f"/v2/mixed/{worker}-{number}") for number in range(count))
        sessions = of_kind(done, "database")
        return [
            *self.broken,
            *different("arrived", +arrived, self.arrived),
            *different("rows of what is allowed", expected, self.allowed),
            *different("rows of what is refused", Counter(), self.denied),
            *different("refusals in ring 1's log", refused, refusals(log)),
            *different(
                "steps of sessions", Counter({"connect success": sessions, "end success": sessions}), self.sessions
            ),
        ]


def of_kind(done: Mapping[str, int], kind: str) -> int:
    """Return how many calls of a kind all its workers made."""
    return sum(count for worker, count in done.items() if worker.rpartition("-")[0] == kind)


def different(what: str, expected: Counter[Any], found: Counter[Any]) -> list[str]:
    """Return in words what ``found`` has too little or too much of; what was called before the run counts for nothing."""
    wrong = [place for place in expected | found if expected[place] != found[place] and place not in BEFORE]
    some = "; ".join(f"{place}: {expected[place]} expected, {found[place]} found" for place in wrong[:TOLD])
    return [f"{what}: {len(wrong)} differ: {some}"] if wrong else []


def refusals(log: Path) -> Counter[Place]:
    """Return what ring 1 refused, as its log has it."""
    found: Counter[Place] = Counter()
    with log.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if '"verdict":"deny"' in line:
                told = json.loads(line[line.index("{") :])
                found[told["host"], told["path"]] += 1
    return found


def _by_host(places: Counter[Place]) -> Counter[str]:
    found: Counter[str] = Counter()
    for (host, _), count in places.items():
        found[host] += count
    return found
