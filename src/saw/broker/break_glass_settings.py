"""The part ``break_glass`` of the broker's configuration: who may let a call through when nobody of its group can decide."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from saw.review.messages import SPONSORS


class BreakGlassSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``group`` holds the keys, ``keys`` different ones of it must sign.

    ``last_s``: how long their word counts, so that the call may be sent (60 to 900 s); ``review_within_s``: how long the group of
    the review has to look at it afterwards (an hour to seven days, in seconds).
    """

    group: str
    keys: int = 2
    last_s: int = 900
    review_within_s: int = 86_400


def problems_of_break_glass(settings: BreakGlassSettings) -> Iterator[str]:
    """Yield what is wrong, naming the field."""
    if not settings.group.strip() or settings.group == SPONSORS:
        yield f"break_glass.group must be a group other than {SPONSORS}"
    for field, value, low, high in (
        ("keys", settings.keys, 2, 8),
        ("last_s", settings.last_s, 60, 900),
        ("review_within_s", settings.review_within_s, 3600, 7 * 86_400),
    ):
        if not low <= value <= high:
            yield f"break_glass.{field} must be {low} to {high}"
