"""Errors of budgets that a person may see."""

from __future__ import annotations

from saw.errors import SawError


class LedgerError(SawError):
    """The ledger cannot be read or written, so no call may be charged to it."""

    code = "gatekeeper_unavailable"


class Exhausted(SawError):
    """A call would pass the limit.

    ``details``: ``id`` of the budget, ``currency``, ``limit``, ``asked``, ``left`` (millionths) and ``resets_at`` (RFC 3339).
    """

    code = "budget_exhausted"


class Unbounded(SawError):
    """Nothing in a call says what it costs at most."""

    code = "budget_unbounded"


class Unmetered(SawError):
    """There is nobody to count what a call costs."""

    code = "budget_unenforced"
