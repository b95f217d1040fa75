"""Step-up: what lets something through may want a stronger, or a newer, sign-in than what merely opens the pages.

How strong a sign-in was is the provider's word: ``acr`` and ``auth_time`` of the ID token (OpenID Connect Core, section 2), kept
with the session. What only stops something, a denial, never wants more.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

import msgspec

from saw.broker.errors import ForbiddenError

CODE = "step_up_needed"
LETS_THROUGH = frozenset({"approve", "uphold", "break_glass"})
"""Decisions after which something is done, or has been done rightly."""


class StepUp(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``acr``: one of these must have been reached at the sign-in, the first is liked best; empty: any. ``max_age_s``: the oldest
    sign-in at the provider that counts, seconds; None: as old as a session may be."""

    acr: tuple[str, ...] = ()
    max_age_s: int | None = None

    def missing(self, acr: str, auth_time: datetime, now: datetime) -> str:
        """Return what a sign-in lacks, in words; empty when it suffices."""
        if self.acr and acr not in self.acr:
            return "it was not as strong as this wants"
        if self.max_age_s is not None and not now - auth_time <= timedelta(seconds=self.max_age_s):
            return f"it was more than {self.max_age_s} seconds ago"
        return ""


class StepUpSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which sign-in a decision wants that lets something through (docs/sign-in.md).

    ``groups``: for reviews of these groups; ``break_glass``: for breaking the glass; ``reviews``: for all others. The part that
    is nearest counts alone. ``registered_keys``: decisions with a registered key, behind which there is no sign-in, are taken
    all the same.
    """

    reviews: StepUp | None = None
    groups: dict[str, StepUp] = {}
    break_glass: StepUp | None = None
    registered_keys: bool = False

    def wanted(self, decision: str, group: str) -> StepUp | None:
        """Return what ``decision`` about a review of ``group`` wants; None when any sign-in will do."""
        if decision not in LETS_THROUGH:
            return None
        if decision == "break_glass" and self.break_glass is not None:
            return self.break_glass
        return self.groups.get(group, self.reviews)

    def refusal(
        self, decision: str, group: str, signed_in: tuple[str, datetime] | None, now: datetime
    ) -> ForbiddenError | None:
        """Return why a decision is not taken with this sign-in (``acr`` and time), or without any; None when it is."""
        wanted = self.wanted(decision, group)
        if wanted is None:
            return None
        if signed_in is None:
            if self.registered_keys:
                return None
            return ForbiddenError(
                "this decision wants a sign-in, and a registered key has none",
                cure="decide on the pages, with a passkey; or set sso.step_up.registered_keys",
                code=CODE,
            )
        lacks = wanted.missing(*signed_in, now)
        if not lacks:
            return None
        return ForbiddenError(
            f"your sign-in does not do for this decision: {lacks}",
            cure="sign in again for it, then decide",
            code=CODE,
            details={"acr": list(wanted.acr), "max_age_s": wanted.max_age_s},
        )


def problems_of_step_up(settings: StepUpSettings) -> Iterator[str]:
    """Yield what is wrong with ``settings``, naming the field."""
    parts = {"reviews": settings.reviews, "break_glass": settings.break_glass}
    parts |= {f"groups.{name}": part for name, part in settings.groups.items()}
    for name, part in parts.items():
        if part is None:
            continue
        if not part.acr and part.max_age_s is None:
            yield f"sso.step_up.{name} must have acr or max_age_s"
        if any(not value or len(value) > 255 or not value.isprintable() or " " in value for value in part.acr):
            yield f"sso.step_up.{name}.acr must list words without spaces"
        # A person needs a moment at the provider and with the passkey.
        if part.max_age_s is not None and not 60 <= part.max_age_s <= 86_400:
            yield f"sso.step_up.{name}.max_age_s must be 60 to 86400"
