"""Who decides on a tool over stdio: what policy may say of it, and that the diff of reach shows every change."""

from __future__ import annotations

import pytest

from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_governance, load_members
from saw.policy.mcp import ToolReview, tool_review
from saw.policy.reach_diff import diff_bundles

HEAD = "schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: OWNER}\nmcp:\n  servers:\n"
POLICY = b"""
version: 1
filesystem_policy: {read_only: [/usr]}
network_policies:
  tracker:
    binaries: [{path: /usr/bin/node}]
    endpoints:
      - host: tracker.example.com
        port: 443
        path: /mcp
        protocol: mcp
        mcp: {allow_all_known_mcp_methods: true, versions: ["2025-06-18"]}
"""
STDIO = "    files: {transport: stdio, command: [/usr/bin/files], tools: {move: TOOL}}\n"
HTTP = "    tracker: {transport: http, url: https://tracker.example.com/mcp, tools: {move: TOOL}}\n"


def governance(tool: str, server: str = STDIO, owner: str = "team") -> bytes:
    return (HEAD.replace("OWNER", owner) + server.replace("TOOL", tool)).encode()


def bundle(tool: str, server: str = STDIO, owner: str = "team") -> Bundle:
    return load_members({"policy.yaml": POLICY, "governance.yaml": governance(tool, server, owner)})


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        ("{class: review}", ToolReview("team", 1, 86400)),
        ("{class: review, expires: 2h}", ToolReview("team", 1, 7200)),
        ("{class: review, reviewers: {group: leads}}", ToolReview("leads", 1, 86400)),
        ("{class: review, reviewers: {group: leads, quorum: 3}, expires: 30m}", ToolReview("leads", 3, 1800)),
    ],
)
def test_who_decides_how_many_and_within_which_time(tool: str, expected: ToolReview) -> None:
    found = load_governance(governance(tool))
    assert tool_review(found, found.mcp.servers["files"].tools["move"]) == expected


@pytest.mark.parametrize(
    ("tool", "server", "said"),
    [
        ("{class: auto, reviewers: {group: leads}}", STDIO, "reviewers have no part in class auto"),
        ("{class: deny, expires: 2h}", STDIO, "expires have no part in class deny"),
        ("{class: review, expires: soon}", STDIO, "is not a duration"),
        ("{class: review, reviewers: {group: leads, quorum: 17}}", STDIO, "outside 1 to 16"),
        ("{class: review, reviewers: {group: leads}}", HTTP, "over HTTP an action rule names them"),
        ("{class: review, expires: 2h}", HTTP, "over HTTP an action rule names them"),
    ],
)
def test_words_that_nobody_would_read_are_refused(tool: str, server: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        bundle(tool, server)
    assert bundle("{class: review}", server)
    assert bundle("{class: review, reviewers: {group: leads, quorum: 16}, expires: 2h}")


@pytest.mark.control("POL-01")
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("{class: review}", "{class: review, reviewers: {group: leads}}"),
        ("{class: review, reviewers: {group: leads, quorum: 2}}", "{class: review, reviewers: {group: leads}}"),
        ("{class: review, expires: 2h}", "{class: review, expires: 3h}"),
    ],
)
def test_a_diff_shows_that_others_decide_fewer_or_within_another_time(old: str, new: str) -> None:
    for before, after in ((old, new), (new, old)):
        diff = diff_bundles(bundle(before), bundle(after))
        assert {(item.risk, item.kind, item.what) for item in diff.gained} == {
            ("medium", "reviewers", "tool files.move")
        }
        assert diff.widening
    assert not diff_bundles(bundle(old), bundle(old)).gained


def test_a_diff_shows_another_owner_where_the_owners_decide() -> None:
    own, named = "{class: review}", "{class: review, reviewers: {group: leads}}"
    assert "reviewers" in {item.kind for item in diff_bundles(bundle(own), bundle(own, owner="other")).gained}
    assert "reviewers" not in {item.kind for item in diff_bundles(bundle(named), bundle(named, owner="other")).gained}
