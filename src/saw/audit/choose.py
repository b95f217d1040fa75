"""Which events somebody asks for: the filters of ``saw audit search`` and ``tail``, decided on one event at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

_Text = Annotated[str, msgspec.Meta(max_length=256)]
_Time = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]

#: OCSF: status 1 is success, disposition 1 is allowed; 2 is failure and blocked.
_ALLOWED, _REFUSED = 1, 2
#: Classes whose status is how far somebody is with a finding, and no verdict.
_FINDINGS = frozenset({2002, 2003, 2004})


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"kind": "class"}):
    """Filters; an empty one lets everything through, several must all hold.

    ``since`` and ``until`` (not included) are times of the event, milliseconds since 1970 UTC. ``source`` is the chain.
    ``workspace``, ``agent`` and ``principal`` are compared whole. ``kind`` is the number or the name of an OCSF class,
    ``activity`` the name of an activity; case does not matter. ``verdict`` is what became of it. ``text`` occurs anywhere
    in the event, as JSON; case does not matter.
    """

    since: _Time | None = None
    until: _Time | None = None
    source: _Text = ""
    workspace: _Text = ""
    agent: _Text = ""
    principal: _Text = ""
    kind: _Text = ""
    activity: _Text = ""
    verdict: Literal["", "allowed", "refused"] = ""
    text: _Text = ""

    def takes(self, source: str, event: Mapping[str, Any], raw: str) -> bool:
        """Tell whether ``event`` of the chain ``source`` is asked for; ``raw`` is its JSON text."""
        if self.source and source != self.source:
            return False
        if self.text and self.text.casefold() not in raw.casefold():
            return False
        time = event.get("time", 0)
        if (self.since is not None and time < self.since) or (self.until is not None and time >= self.until):
            return False
        ours = event.get("unmapped", {}).get("saw", {})
        if any(
            wanted and ours.get(name) != wanted
            for name, wanted in (("workspace", self.workspace), ("agent", self.agent), ("principal", self.principal))
        ):
            return False
        if self.kind and self.kind.casefold() not in {
            str(event.get("class_uid")),
            str(event.get("class_name")).casefold(),
        }:
            return False
        if self.activity and self.activity.casefold() != str(event.get("activity_name")).casefold():
            return False
        return not self.verdict or verdict_of(event) == self.verdict


def verdict_of(event: Mapping[str, Any]) -> str:
    """Return ``allowed`` or ``refused``, by disposition and else by status; empty when the event is about neither."""
    found = event.get("disposition_id", event.get("status_id") if event.get("class_uid") not in _FINDINGS else None)
    return {_ALLOWED: "allowed", _REFUSED: "refused"}.get(found or 0, "")
