"""What an answer says that the call used, in the words of OpenAI and of Anthropic.

Counts in a stream are cumulative, so of several the largest holds. What cannot be read counts as nothing said: then the whole
reservation is spent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from saw import jsontext
from saw.budget.price import Usage

MOST = 10**12
"""A count above this is no count."""
_COUNTS = (
    "prompt_tokens",
    "completion_tokens",
    "total_tokens",
    "input_tokens",
    "output_tokens",
    "cache_creation_input_tokens",
    "cache_read_input_tokens",
)
_CACHED = {"prompt_tokens_details": "prompt_cached", "input_tokens_details": "input_cached"}


def read_usage(texts: Iterable[bytes]) -> Usage | None:
    """Return the usage out of the JSON texts of the ``usage`` objects of one answer, or None where they say nothing clear."""
    counts: dict[str, int] = {}
    for text in texts:
        try:
            value = jsontext.decode(text)
        except msgspec.DecodeError:
            return None
        if value is None:
            continue
        if not isinstance(value, dict) or not _add(counts, value):
            return None
    if "prompt_tokens" in counts:
        return _inclusive(counts, "prompt_tokens", "completion_tokens", "prompt_cached")
    if "input_tokens" not in counts or "output_tokens" not in counts:
        return None
    if "total_tokens" in counts or "input_cached" in counts:
        return _inclusive(counts, "input_tokens", "output_tokens", "input_cached")
    return Usage(
        counts["input_tokens"],
        counts["output_tokens"],
        counts.get("cache_read_input_tokens", 0),
        counts.get("cache_creation_input_tokens", 0),
    )


def _inclusive(counts: Mapping[str, int], entry: str, output: str, cached: str) -> Usage:
    """Return the usage where input includes what came from the cache; the total may hold output that is told nowhere else."""
    read = min(counts.get(cached, 0), counts[entry])
    beyond = counts.get("total_tokens", 0) - counts[entry]
    return Usage(counts[entry] - read, max(counts.get(output, 0), beyond), read, 0)


def _add(counts: dict[str, int], value: Mapping[str, object]) -> bool:
    found = {name: value[name] for name in _COUNTS if value.get(name) is not None}
    for name, known in _CACHED.items():
        details = value.get(name)
        if isinstance(details, Mapping) and details.get("cached_tokens") is not None:
            found[known] = details["cached_tokens"]
    for name, count in found.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= MOST:
            return False
        counts[name] = max(counts.get(name, 0), count)
    return True
