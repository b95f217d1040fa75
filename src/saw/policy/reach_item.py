"""What a comparison reports: items of reach with their risk, the rules behind them, and a call that proves each."""

from __future__ import annotations

from typing import Literal

import msgspec

from saw.policy.casefile import Call

Risk = Literal["critical", "high", "medium", "low"]
RISKS: tuple[Risk, ...] = ("critical", "high", "medium", "low")
"""From the most to the least dangerous; ``docs/reach.md`` says what falls where."""

Subject = Literal["call", "tool", "disk", "budget", "setting"]


class Region(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where an item lies, in the words of the rule that allows it; the item is what the other bundle refuses of it."""

    host: str = ""
    port: int = 0
    scheme: str = ""
    methods: tuple[str, ...] = ()
    path: str = ""
    query: tuple[str, ...] = ()
    binaries: tuple[str, ...] = ()
    refs: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    upstream: str = ""
    action_class: str = ""
    credential: str = ""
    ref: str = ""
    provider: str = ""
    server: str = ""
    tool: str = ""
    argument: str = ""
    directory: str = ""
    budget: str = ""
    setting: str = ""


class Witness(msgspec.Struct, frozen=True, omit_defaults=True):
    """An example: a call, a tool call (arguments as JSON text), or a file; and what each bundle says on it."""

    call: Call | None = None
    server: str = ""
    tool: str = ""
    arguments: str = ""
    file: str = ""
    old: str = ""
    new: str = ""

    def text(self) -> str:
        """Return the example in one line."""
        if self.call is not None:
            refs = "".join(f" {push.operation} {push.ref}" for push in self.call.push)
            model = f" {self.call.body.strip()}" if self.call.body and not self.call.push else ""
            parents = f" started by {', '.join(self.call.ancestors)}" if self.call.ancestors else ""
            message = f" and a {self.call.message} message there" if self.call.message else ""
            return f"{self.call.method} {self.call.url}{message}{refs}{model} by {self.call.binary}{parents}"
        if self.tool:
            return f"{self.server}.{self.tool} {self.arguments}"
        return self.file


class Item(msgspec.Struct, frozen=True, omit_defaults=True):
    """One piece of reach that was gained or lost.

    ``kind`` says in which way; ``exact`` is false where the item may hold more than what was really gained, because an exact
    answer was out of bounds. ``rules`` are the rules that allow it. Lost items have no risk.
    """

    subject: Subject
    kind: str
    what: str
    why: str
    region: Region
    risk: Risk | None = None
    rules: tuple[str, ...] = ()
    exact: bool = True
    witness: Witness | None = None


def order(item: Item) -> tuple[int, str, str, str, tuple[str, ...]]:
    """Return the key by which reports are sorted: risk first, then text."""
    risk = RISKS.index(item.risk) if item.risk else len(RISKS)
    return risk, item.subject, item.what, item.kind, item.rules
