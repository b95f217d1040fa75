"""What somebody answers for until a day: the one rule of every file of waivers (floors, vulnerabilities, drift).

Each of those files has a waiver type of its own, which says what the waiver is about; owner, reason and end mean the same in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Protocol, TypeVar

from saw.errors import ConfigError


class Waiver(Protocol):
    """The part that all waivers have. ``expires`` is the last day on which it is good."""

    @property
    def owner(self) -> str:
        """Who answers for it."""
        ...

    @property
    def reason(self) -> str:
        """Why it may be so."""
        ...

    @property
    def expires(self) -> date:
        """The last day on which it is good."""
        ...

    @property
    def about(self) -> str:
        """What it is about, in words."""
        ...


W = TypeVar("W", bound=Waiver)


def good_on(waivers: Iterable[W], today: date) -> tuple[tuple[W, ...], tuple[str, ...]]:
    """Return the waivers that are good on ``today``, their own day included, and words for each that ran out.

    One that ran out is a problem whether or not anything needs it: somebody has to look again.
    """
    waivers = tuple(waivers)
    good = tuple(one for one in waivers if today <= one.expires)
    gone = tuple(
        f"the waiver of {one.about} ({one.owner}: {one.reason}) ran out on {one.expires}"
        for one in waivers
        if one not in good
    )
    return good, gone


def refuse_empty(path: Path | str, waivers: Iterable[Waiver], names: tuple[str, ...]) -> None:
    """Raise :class:`ConfigError` for a waiver in ``path`` one of whose fields ``names`` is blank."""
    for one in waivers:
        empty = [name for name in names if not getattr(one, name).strip()]
        if empty:
            raise ConfigError(
                f"{path}: a waiver of {one.about.strip() or 'nothing'} has no {empty[0]}", cure="fill it in"
            )


__all__ = ["Waiver", "good_on", "refuse_empty"]
