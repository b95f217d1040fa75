"""What a workspace is told of the tools that its agent was handed: which calls it lets through, and that nothing is misread."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest

from saw.policy.delegation import Tools
from saw.policy.handed_tools import Grant, Handed, HandedInvalid, HandedTools, read_handed

pytestmark = pytest.mark.control("DEL-01")
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR = timedelta(hours=1)


def grant(*servers: str, tools: tuple[str, ...] = ("read",), **times: Any) -> Grant:
    named = tuple(Tools(server=server, tools=tools) for server in servers) if servers else msgspec.UNSET
    return Grant(**{"delegation": "dlg-1", "not_before": NOW - HOUR, "expires": NOW + HOUR, "tools": named, **times})


def refused(*grants: Grant, bound: bool = True, tool: str = "read", at: datetime = NOW) -> str:
    said = read_handed(msgspec.json.encode(HandedTools(bound=bound, grants=grants)))
    return Handed(said).refusal("files", tool, at)


def test_without_a_delegation_that_ever_named_tools_the_policy_alone_counts() -> None:
    assert refused(bound=False) == ""
    assert refused() == "no delegation of this agent counts now"


def test_one_delegation_that_counts_must_cover_the_tool() -> None:
    assert refused(grant("files")) == ""
    assert refused(grant("tracker"), grant("file*")) == ""
    assert refused(grant("files"), tool="write") == "no delegation of this agent covers the tool write of files"
    assert refused(grant("tracker")) != ""
    assert refused(grant()) == "", "one that says nothing of tools"
    assert refused(grant(tools=()), grant("files", tools=("x",)), tool="write") == ""


def test_a_grant_counts_between_its_beginning_and_its_end() -> None:
    for at, counts in ((NOW + HOUR, False), (NOW - HOUR, True), (NOW - 2 * HOUR, False), (NOW, True)):
        assert (refused(grant("files"), at=at) == "") == counts, at


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"{}", b'{"bound":1}', b'{"bound":false,"more":1}', b'{"bound":true,"grants":[{}]}',
        b'{"bound":true,"grants":[{"delegation":"d","not_before":"2026-01-01T00:00:00","expires":"2026-01-01T00:00:00"}]}',
        b'{"bound":true,"grants":[{"delegation":"d","not_before":"2026-01-01T00:00:00Z","expires":"2026-01-01T00:00:00Z","tools":1}]}',
        b'{"bound":true,"grants":[{"delegation":"d","not_before":"2026-01-01T00:00:00Z","expires":"2026-01-01T00:00:00Z","tools":[{"server":""}]}]}',
    ],
)  # fmt: skip
def test_what_could_be_misread_is_refused(raw: bytes) -> None:
    with pytest.raises(HandedInvalid):
        read_handed(raw)


def test_too_many_grants_are_refused() -> None:
    with pytest.raises(HandedInvalid):
        read_handed(msgspec.json.encode(HandedTools(bound=True, grants=(grant("files"),) * 257)))
    assert read_handed(msgspec.json.encode(HandedTools(bound=True, grants=(grant("files"),) * 256))).bound
