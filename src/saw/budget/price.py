"""What tokens cost, in whole numbers: rates in millionths of a currency for a million tokens, costs in millionths."""

from __future__ import annotations

from decimal import Decimal

import msgspec

MILLION = 1_000_000


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one call. ``input`` is what was neither read from the service's cache nor written to it."""

    input: int = 0
    output: int = 0
    cache_read: int = 0
    cache_write: int = 0


class Rates(msgspec.Struct, frozen=True):
    """Millionths of a currency for a million tokens of each kind."""

    input: int
    output: int
    cache_read: int
    cache_write: int

    def cost(self, usage: Usage) -> int:
        """Return the cost of ``usage`` in millionths of the currency, rounded up."""
        total = (
            usage.input * self.input
            + usage.output * self.output
            + usage.cache_read * self.cache_read
            + usage.cache_write * self.cache_write
        )
        return -(-total // MILLION)

    def most(self, tokens: int, output: int, *, caches: bool) -> int:
        """Return what ``tokens`` of input and ``output`` cost at most; ``caches``: input may be written to the cache."""
        dearest = max(self.input, self.cache_read, self.cache_write if caches else 0)
        return -(-(tokens * dearest + output * self.output) // MILLION)


def micros(text: str) -> int:
    """Return the decimal number ``text``, of six decimals at most, in millionths; raise ``ValueError`` for another one."""
    value = Decimal(text).scaleb(6)
    if value != int(value) or value < 0:
        raise ValueError(f"{text!r} is not a number of six decimals at most")
    return int(value)
