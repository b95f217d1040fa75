"""Delegation records: what they cover, and that a part of one never goes beyond it, whatever globs are used."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy.delegation import (
    Delegation,
    DelegationInvalid,
    Resource,
    Scope,
    Tools,
    ToolScope,
    parse_delegation,
    wider,
)

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def record(identifier: str = "dlg-1", parent: str = "", **fields: Any) -> Delegation:
    base = Delegation(
        format="saw-delegation/1", id=identifier, parent=parent, sponsor="mia@example.com", workspace="ws-1",
        agent="agent-1", task="tidy the notes", not_before=NOW, expires=NOW + timedelta(hours=8),
        resources=(Resource(host="api.example.com", paths=("/v1/**",)),),
    )  # fmt: skip
    return msgspec.structs.replace(base, **fields)


def part(**fields: Any) -> Delegation:
    return record("dlg-2", "dlg-1", **fields)


@pytest.mark.control("DEL-01")
def test_a_scope_covers_its_hosts_ports_methods_and_paths_and_nothing_else() -> None:
    scope = Scope([Resource(host="*.example.com", ports=(443, 8443), methods=("GET", "POST"), paths=("/v1/**",))])
    assert scope.covers("api.example.com", 8443, "HEAD", "/v1/x")
    assert scope.covers("api.example.com", 443, "POST", "/v1/")
    for call in (
        ("a.b.example.com", 443, "GET", "/v1/x"),
        ("api.example.com", 80, "GET", "/v1/x"),
        ("api.example.com", 443, "PUT", "/v1/x"),
        ("api.example.com", 443, "GET", "/v2/x"),
        ("api.example.com", 443, "GET", "/v1"),
    ):
        assert not scope.covers(*call), call


@pytest.mark.control("DEL-02")
def test_a_part_of_a_delegation_may_be_equal_or_narrower() -> None:
    parent = record(resources=(Resource(host="**.example.com", paths=("/v1/**", "/v2/*")), Resource(host="git.test")))
    for child in (
        part(resources=parent.resources),
        part(resources=(Resource(host="api.example.com", methods=("GET",), paths=("/v1/a/*", "/v2/b")),)),
        part(resources=(Resource(host="*.example.com", paths=("/v1/**",)),), expires=NOW + timedelta(minutes=5)),
        part(resources=(Resource(host="git.test", paths=("/team/**",)),), approval="read-only", agent="agent-9"),
    ):
        assert wider(child, parent) == ()


@pytest.mark.control("DEL-02")
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resources": (Resource(host="api.example.com", paths=("/**",)),)}, "resources[0]"),
        ({"resources": (Resource(host="*.example.com", paths=("/v1/**",)),)}, "resources[0]"),
        ({"resources": (Resource(host="api.example.com", ports=(80,), paths=("/v1/x",)),)}, "resources[0]"),
        ({"expires": NOW + timedelta(hours=9)}, "ends later"),
        ({"not_before": NOW - timedelta(seconds=1)}, "begins earlier"),
        ({"sponsor": "ben@example.com"}, "another sponsor"),
        ({"parent": "dlg-7"}, "not made from dlg-1"),
    ],
)
def test_a_wider_part_is_named(fields: dict[str, Any], said: str) -> None:
    assert any(said in text for text in wider(msgspec.structs.replace(part(), **fields), record()))
    assert wider(part(), record()) == ()


@pytest.mark.control("DEL-02")
def test_methods_and_approval_only_narrow() -> None:
    reads = record(resources=(Resource(host="api.example.com", methods=("GET",)),), approval="read-only")
    assert wider(msgspec.structs.replace(reads, id="dlg-2", parent="dlg-1"), reads) == ()
    more = part(resources=(Resource(host="api.example.com", methods=("GET", "DELETE")),), approval="read-only")
    assert wider(more, reads)
    assert wider(part(resources=(Resource(host="api.example.com"),), approval="read-only"), reads)
    assert "approval is review" in wider(part(resources=reads.resources, approval="review"), reads)[0]
    both = part(resources=(Resource(host="api.example.com", methods=("GET", "HEAD")),), approval="read-only")
    assert wider(both, reads) == ()


@pytest.mark.control("DEL-02")
def test_the_agent_with_a_and_b_cannot_delegate_a_and_c() -> None:
    a, b, c = (Resource(host=f"{name}.example.com") for name in "abc")
    assert wider(part(resources=(a, b)), record(resources=(a, b))) == ()
    problems = wider(part(resources=(a, c)), record(resources=(a, b)))
    assert problems == ("resources[1] (c.example.com) lies within no resource of dlg-1",)


HOSTS = st.sampled_from(["a.example.com", "b.example.com", "*.example.com", "**.example.com", "x-*.example.com"])
PATHS = st.sampled_from(["/**", "/v1/**", "/v1/*", "/v1/a", "/v1/a*", "/*/a", "/**/a", "/v1/**/a", "/v1/*/b"])
METHODS = st.sampled_from([(), ("GET",), ("HEAD",), ("GET", "POST"), ("POST",)])
RESOURCES = st.lists(
    st.builds(
        Resource,
        host=HOSTS,
        ports=st.sampled_from([(443,), (80,), (80, 443)]),
        methods=METHODS,
        paths=st.lists(PATHS, min_size=1, max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=2,
).map(tuple)
CALLS = st.tuples(
    st.sampled_from(["a.example.com", "b.example.com", "x-1.example.com", "p.q.example.com"]),
    st.sampled_from([80, 443]),
    st.sampled_from(["GET", "HEAD", "POST"]),
    st.sampled_from(["/", "/v1/", "/v1/a", "/v1/ab", "/v1/a/b", "/v2/a", "/v1/x/y/a", "/v1/a%2Fb", "/a"]),
)


@pytest.mark.control("DEL-02")
@settings(max_examples=examples(400), deadline=None)
@given(RESOURCES, RESOURCES, st.lists(CALLS, min_size=10, max_size=10))
def test_whatever_a_part_covers_the_whole_covers(
    child: tuple[Resource, ...], parent: tuple[Resource, ...], calls: list[tuple[str, int, str, str]]
) -> None:
    narrow, wide = part(resources=child), record(resources=parent)
    if not wider(narrow, wide):
        for call in calls:
            assert Scope(parent).covers(*call) or not Scope(child).covers(*call), call
    assert wider(part(resources=parent), wide) == ()


@pytest.mark.control("DEL-01")
@pytest.mark.parametrize(
    "change",
    [
        {"format": "saw-delegation/2"},
        {"unheard": 1},
        {"task": "two\nlines"},
        {"task": ""},
        {"resources": []},
        {"resources": [{"host": "*.com"}]},
        {"resources": [{"host": "a.example.com", "paths": ["v1"]}]},
        {"resources": [{"host": "a.example.com", "methods": ["get"]}]},
        {"resources": [{"host": "a.example.com", "ports": [0]}]},
        {"expires": "2026-01-02T03:04:05Z"},
        {"expires": "2026-01-03T03:04:05"},
        {"approval": "none"},
        {"workspace": "../x"},
        {"tools": None},
        {"tools": ["files"]},
        {"tools": [{"server": "files", "tools": []}]},
        {"tools": [{"server": "", "tools": ["read"]}]},
        {"tools": [{"server": "files", "tools": ["a[b]"]}]},
        {"tools": [{"server": "files", "tools": ["read"], "args": {}}]},
        {"tools": [{"server": f"s{number}"} for number in range(65)]},
    ],
)
def test_a_record_that_could_be_misread_is_refused(change: dict[str, Any]) -> None:
    good = msgspec.to_builtins(record())
    assert parse_delegation(msgspec.json.encode(good)) == record()
    with pytest.raises(DelegationInvalid):
        parse_delegation(msgspec.json.encode({**good, **change}))


# --- Tools ------------------------------------------------------------------------------------------------------------


@pytest.mark.control("DEL-01")
def test_a_record_without_tools_has_the_bytes_it_always_had_and_leaves_tools_to_policy() -> None:
    raw = msgspec.json.encode(record())
    assert b"tools" not in raw
    assert msgspec.json.encode(parse_delegation(raw)) == raw
    assert ToolScope(parse_delegation(raw).tools).covers("files", "read")
    assert ToolScope(parse_delegation(raw).tools).covers("", "read")


@pytest.mark.control("DEL-01")
def test_tools_cover_their_servers_and_names_and_nothing_else() -> None:
    named = (Tools(server="files", tools=("read_*", "list")), Tools(server="tracker-*"))
    scope = ToolScope(parse_delegation(msgspec.json.encode(record(tools=named))).tools)
    for server, tool in (("files", "read_text"), ("files", "list"), ("tracker-a", "close")):
        assert scope.covers(server, tool)
    for server, tool in (("files", "write"), ("files", "lists"), ("tracker", "close"), ("Files", "list"), ("", "list")):
        assert not scope.covers(server, tool), (server, tool)
    assert not ToolScope(()).covers("files", "list")
    assert not ToolScope((Tools(server="*"),)).covers("", "list")


@pytest.mark.control("DEL-02")
def test_the_tools_of_a_part_lie_within_those_of_the_whole() -> None:
    whole = record(tools=(Tools(server="files", tools=("read_*", "list")), Tools(server="tracker")))
    for good in (
        (),
        whole.tools,
        (Tools(server="files", tools=("read_text", "read_a*")),),
        (Tools(server="tracker", tools=("close",)), Tools(server="files", tools=("list",))),
    ):
        assert wider(part(tools=good), whole) == ()
    for bad, said in (
        ((Tools(server="files"),), "tools[0] (files) lies within no entry of dlg-1"),
        ((Tools(server="tracker"), Tools(server="files", tools=("read*",))), "tools[1] (files)"),
        ((Tools(server="tracker*", tools=("close",)),), "tools[0] (tracker*)"),
        (msgspec.UNSET, "it says nothing of tools, and dlg-1 names some"),
    ):
        (problem,) = wider(part(tools=bad), whole)
        assert said in problem
    for anything in (msgspec.UNSET, (), (Tools(server="*"),)):
        assert wider(part(tools=anything), record()) == ()


NAMES = st.sampled_from(["*", "a", "b", "a*", "*a", "a*b", "ab", "**", "a*a*"])
TOOLS = st.one_of(
    st.just(msgspec.UNSET),
    st.lists(st.builds(Tools, server=NAMES, tools=st.lists(NAMES, min_size=1, max_size=3).map(tuple)), max_size=3).map(
        tuple
    ),
)
CALLED = st.text(alphabet="ab", max_size=4)


@pytest.mark.control("DEL-02")
@settings(max_examples=examples(400), deadline=None)
@given(TOOLS, TOOLS, st.lists(st.tuples(CALLED, CALLED), min_size=12, max_size=12))
def test_whatever_tool_a_part_covers_the_whole_covers(child: Any, parent: Any, calls: list[tuple[str, str]]) -> None:
    if not wider(part(tools=child), record(tools=parent)):
        for call in calls:
            assert ToolScope(parent).covers(*call) or not ToolScope(child).covers(*call), call
    assert wider(part(tools=parent), record(tools=parent)) == ()


def test_every_problem_of_a_record_is_named_at_once() -> None:
    bad = {**msgspec.to_builtins(record()), "task": "", "resources": [{"host": "*.com", "ports": []}]}
    with pytest.raises(DelegationInvalid) as caught:
        parse_delegation(msgspec.json.encode(bad))
    assert len(caught.value.details["problems"]) == 3  # type: ignore[arg-type]
