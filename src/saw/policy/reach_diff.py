"""The diff of reach between two bundles: what the new one allows beyond the old one, and the other way round.

Exact over all calls (see :mod:`saw.policy.reach_space`); where that is out of bounds the diff says *possibly* and holds too
much rather than too little. The digest names exactly this diff, so that signers can sign what they have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import rfc8785

from saw import jsontext
from saw.policy.loader import Bundle
from saw.policy.model import Request
from saw.policy.reach_automata import Budget
from saw.policy.reach_budgets import compare_budgets
from saw.policy.reach_calls import CallComparison
from saw.policy.reach_data import compare_data_classes
from saw.policy.reach_inference import compare_inference
from saw.policy.reach_item import Item, Region, order
from saw.policy.reach_settings import compare_directories, compare_settings
from saw.policy.reach_side import Side
from saw.policy.reach_space import Key
from saw.policy.reach_tools import compare_tools

FORMAT = "saw-reach-diff/1"


@dataclass(frozen=True)
class ReachDiff:
    """What was gained and lost, most dangerous first.

    ``old`` and ``new`` name blueprint and version. ``widening`` is whether anything was gained, or possibly was. ``digest``
    is the hexadecimal SHA-256 of the canonical JSON (RFC 8785) of :meth:`content`.
    """

    old: str
    new: str
    gained: tuple[Item, ...]
    lost: tuple[Item, ...]
    digest: str
    _comparison: CallComparison = field(repr=False, compare=False)
    _cells: frozenset[Key] = field(repr=False, compare=False)

    @property
    def widening(self) -> bool:
        """Return whether the new bundle allows anything that the old one does not, as far as can be told."""
        return bool(self.gained)

    def covers(self, request: Request) -> bool:
        """Return whether ``request`` lies in the part of :attr:`gained` that is about calls."""
        return self._comparison.covers(request, self._cells)

    def to_builtins(self) -> dict[str, Any]:
        """Return the diff as plain values for JSON: its content, whether it widens, and its digest."""
        content = _content(self.old, self.new, self.gained, self.lost)
        return {**content, "widening": self.widening, "reach_digest": self.digest}


def _content(old: str, new: str, gained: tuple[Item, ...], lost: tuple[Item, ...]) -> dict[str, Any]:
    value = {"format": FORMAT, "old": old, "new": new, "gained": gained, "lost": lost}
    result: dict[str, Any] = jsontext.decode(msgspec.json.encode(value))
    return result


def _name(bundle: Bundle) -> str:
    return f"{bundle.governance.blueprint.name} {bundle.governance.blueprint.version}"


_LOST = {"disk": "is closed now", "tool": "is refused now", "budget": "is tighter now", "setting": "is tighter now"}


def _as_lost(items: Iterable[Item]) -> list[Item]:
    """Turn what the old bundle has beyond the new one into losses: examples the right way round, no risk."""
    result: list[Item] = []
    for item in items:
        witness = item.witness
        if witness is not None:
            witness = msgspec.structs.replace(witness, old=witness.new, new=witness.old)
        why = _LOST[item.subject]
        result.append(msgspec.structs.replace(item, risk=None, why=why, witness=witness))
    return result


def diff_bundles(old: Bundle, new: Bundle) -> ReachDiff:
    """Return the diff of reach from ``old`` to ``new``. The same two bundles give the same diff, wherever it is computed."""
    comparison = CallComparison(Side(old), Side(new), Budget())
    calls = comparison.run()
    before, after = (old.policy, old.governance), (new.policy, new.governance)
    gained = [
        *calls.gained,
        *compare_directories(old.policy, new.policy),
        *compare_settings(before, after),
        *compare_budgets(old.governance, new.governance),
        *compare_inference(old.governance, new.governance),
        *compare_data_classes(old.governance, new.governance),
        *compare_tools(old.governance, new.governance, Budget(1_000_000)),
    ]
    lost = [
        *calls.lost,
        *_as_lost(
            [
                *compare_directories(new.policy, old.policy),
                *(item for item in compare_settings(after, before) if item.exact),
                *(item for item in compare_budgets(new.governance, old.governance) if item.exact),
                *(item for item in compare_inference(new.governance, old.governance) if item.exact),
                *(item for item in compare_data_classes(new.governance, old.governance) if item.exact),
                *compare_tools(new.governance, old.governance, Budget(1_000_000)),
            ]
        ),
    ]
    names = (_name(old), _name(new))
    sorted_gained, sorted_lost = tuple(sorted(gained, key=order)), tuple(sorted(lost, key=order))
    content = _content(*names, sorted_gained, sorted_lost)
    digest = hashlib.sha256(rfc8785.dumps(content)).hexdigest()
    return ReachDiff(*names, sorted_gained, sorted_lost, digest, comparison, calls.cells)


__all__ = ["Item", "ReachDiff", "Region", "diff_bundles"]
