"""How many examples a property draws: 50 in the ordinary run, as many as its test says in the thorough one.

Either way they are the same ones each time (profile ``ci`` and its child ``thorough``). ``make test-properties`` draws them all.
"""

from __future__ import annotations

from hypothesis import settings

ORDINARY = 50
THOROUGH = "thorough"


def examples(thorough: int) -> int:
    """Return how many to draw where the thorough run draws ``thorough``."""
    return min(thorough, ORDINARY) if settings.get_current_profile_name() == "ci" else thorough


def register() -> None:
    """Let ``--hypothesis-profile=thorough`` mean something."""
    settings.register_profile(THOROUGH, parent=settings.get_profile("ci"))
