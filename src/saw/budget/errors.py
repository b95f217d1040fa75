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


class RateLimited(SawError):
    """A call would pass a limit of requests or tokens in a window that slides.

    ``details``: ``id`` of the limit, ``unit``, ``per``, ``limit``, ``asked``, ``left``, and ``retry_after_s``, after which the
    call fits at the latest; without it, it never does.
    """

    code = "rate_limited"


class QuotaExhausted(SawError):
    """A call would pass a limit of requests or tokens in a calendar period.

    ``details`` are those of :class:`RateLimited` with ``resets_at`` (RFC 3339) in the place of ``retry_after_s``.
    """

    code = "quota_exhausted"


class Unbounded(SawError):
    """Nothing in a call says what it costs at most."""

    code = "budget_unbounded"


class Unmetered(SawError):
    """There is nobody to count what a call costs."""

    code = "budget_unenforced"
