"""What the reports on OpenShell policies say: one finding for each thing that is not carried over as it stands."""

from __future__ import annotations

from typing import Literal

import msgspec

Effect = Literal["same", "narrower", "wider", "left_out", "lost"]
"""``same``: another spelling; ``narrower``/``wider``: the result allows less/more; ``left_out``: the part is not carried,
so what it granted is denied; ``lost``: a restriction or duty is not carried."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that is not carried over as it stands: where, with what effect, why, and what to do about it."""

    field: str
    effect: Effect
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.effect:<9} {self.field}: {self.reason}; {self.cure}"
