"""JSON that every parser reads alike: UTF-8, no duplicate keys, no ``NaN``, no infinite number, no half
characters, bounded size.
"""

from __future__ import annotations

import json
import re

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class NotStrict(ValueError):
    """The bytes are not JSON, or not unambiguous JSON; the text says why."""


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise NotStrict("a key appears twice")
    return result


def _constant(name: str) -> object:
    raise NotStrict(f"{name} is not a JSON number")


def _number(text: str) -> float:
    value = float(text)
    if value in {float("inf"), float("-inf")}:
        raise NotStrict("a number is larger than parsers can hold")
    return value


def loads(raw: bytes, *, limit: int) -> object:
    """Return the value of ``raw``; raise :class:`NotStrict` for more than ``limit`` bytes or ambiguous JSON (RFC 8259)."""
    if len(raw) > limit:
        raise NotStrict(f"{len(raw)} bytes are more than the {limit} that are read")
    try:
        value: object = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_pairs, parse_constant=_constant, parse_float=_number
        )
        if _SURROGATE.search(raw):
            # Half of a pair is no character: some parsers refuse it, some replace it, and it cannot be written as UTF-8.
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except NotStrict:
        raise
    except (ValueError, RecursionError) as error:
        raise NotStrict("this is not JSON in UTF-8") from error
    return value
