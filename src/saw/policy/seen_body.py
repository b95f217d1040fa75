"""How much of a body is seen before a call is decided, and whether that was all of it.

Envoy's filter for external authorization collects ``max_request_bytes`` and says in a header whether it cut off what it had
collected. A body that comes in pieces, the first of which end at exactly that many bytes, is decided without the rest and *not*
marked, since nothing of what was there was cut. So Envoy is asked for one byte more than a whole body may have, and what fills
that is the beginning of a longer one, whatever the header says.
"""

from __future__ import annotations

from collections.abc import Mapping

from saw.policy.grpc_calls import is_grpc

LONGEST = 1024 * 1024
"""The longest body that is decided on as a whole (bytes). Longer ones are decided on their beginning, then streamed on."""

COLLECTED = {"with_request_body": {"max_request_bytes": LONGEST + 1, "allow_partial_message": True}}
"""What Envoy's filter is told of bodies."""

CUT_HEADER = "x-envoy-auth-partial-body"
"""In it Envoy says that it cut what it had collected."""


def is_whole(headers: Mapping[str, str], body: bytes) -> bool:
    """Return whether ``body`` is all of the call's body; ``headers`` are the check request's, with names in lower case."""
    return headers.get(CUT_HEADER, "false") == "false" and len(body) <= LONGEST and not is_grpc(headers)
