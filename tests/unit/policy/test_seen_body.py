"""When what was seen of a body counts as all of it."""

from __future__ import annotations

import pytest

from saw.gateway.envoy_parts import CONNECTION_BUFFER
from saw.policy.seen_body import COLLECTED, CUT_HEADER, LONGEST, is_whole


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("headers", "size", "whole"),
    [
        ({}, LONGEST, True),
        ({}, LONGEST + 1, False),
        ({CUT_HEADER: "false"}, 10, True),
        ({CUT_HEADER: "false"}, LONGEST + 1, False),
        ({CUT_HEADER: "true"}, 10, False),
        ({CUT_HEADER: "false,false"}, 10, False),
        ({"content-type": "application/grpc"}, 10, False),
    ],
)
def test_a_body_is_whole_when_it_is_within_the_bound_and_nothing_says_otherwise(
    headers: dict[str, str], size: int, whole: bool
) -> None:
    assert is_whole(headers, b"x" * size) is whole


def test_envoy_collects_one_byte_more_than_a_whole_body_has_and_may() -> None:
    assert LONGEST < COLLECTED["with_request_body"]["max_request_bytes"] <= CONNECTION_BUFFER
