"""Invariants: each kind is broken with a counter-example that the matcher confirms, or holds over all calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from saw.policy import globs
from saw.policy.casefile import as_request
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.mcp import decide_tool
from saw.policy.reach_invariants import load_invariants
from saw.policy.reach_prove import Finding, prove

pytestmark = pytest.mark.control("POL-01")

POLICIES = Path(__file__).parents[3] / "policies"
DEFAULTS = POLICIES / "invariants.yaml"
CEILING = "ceiling/organisation"


def edited(bundle: Bundle, file: str, old: str, new: str) -> Bundle:
    assert old.encode() in bundle.members[file]
    return load_members({**bundle.members, file: bundle.members[file].replace(old.encode(), new.encode(), 1)})


def finding(bundle: Bundle, kind: str, parents: dict[str, Bundle] | None = None, **fields: Any) -> Finding:
    raw = json.dumps({"schema": 1, "invariants": [{"id": "one", "kind": kind, **fields}]})
    (result,) = prove(bundle, load_invariants(raw.encode()), parents)
    return result


@pytest.mark.parametrize(
    ("kind", "broken", "kept"),
    [
        ("never_reach", {"hosts": ["*.example.com"]}, {"hosts": ["*.example.org"]}),
        ("never_reach", {"ports": [443]}, {"ports": [22, 80]}),
        ("never_reach", {"networks": ["10.0.0.0/8"]}, {"networks": ["169.254.0.0/16", "fe80::/10"]}),
        ("never_reach", {"networks": ["2000::/3"]}, {"networks": ["64:ff9b:1::/48"]}),
        ("no_write_without_review", {"hosts": ["api.example.com"]}, {"hosts": ["api.example.com"], "paths": ["/v2/**"]}),
        (
            "no_write_without_review",
            {"hosts": ["git.example.com"]},
            {"hosts": ["git.example.com"], "allow_staged": True},
        ),
        (
            "credential_only_to",
            {"credential": "api-token", "hosts": ["api.example.com:443"], "paths": ["/v1/notes"]},
            {"credential": "api-token", "hosts": ["api.example.com:443"], "paths": ["/v1/**"]},
        ),
        (
            "credential_only_to",
            {"credential": "*", "hosts": ["git.example.com", "api.example.com"]},
            {"credential": "*", "hosts": ["*.example.com:443"]},
        ),
        (
            "push_needs_review",
            {"refs": ["refs/heads/*/x"]},
            {"refs": ["refs/heads/main", "refs/heads/agent"], "hosts": ["git.example.com"]},
        ),
        ("push_never", {"refs": ["refs/heads/main"]}, {"refs": ["refs/heads/main"], "hosts": ["api.example.com"]}),
        ("push_never", {"refs": ["**"], "operations": ["delete"]}, {"refs": ["notes/**"]}),
    ],
)  # fmt: skip
def test_invariants_about_calls(coding: Bundle, kind: str, broken: dict[str, Any], kept: dict[str, Any]) -> None:
    bad = finding(coding, kind, **broken)
    assert bad.verdict == "broken" and bad.rules
    assert bad.counter_example is not None and bad.counter_example.call is not None
    decision = Matcher.compile(coding.policy, coding.governance).decide(as_request(bad.counter_example.call))
    assert decision.allowed or (kind == "push_never" and decision.reason == "review_required")
    assert finding(coding, kind, **kept).ok


def test_a_secret_that_is_handed_in_for_a_token_goes_to_the_token_endpoint_too(coding: Bundle) -> None:
    token = "oauth2: {token_url: https://id.example.com/oauth2/token, client_id: agents}"
    wider = edited(coding, "governance.yaml", '    paths: ["/v1/**"]', f'    paths: ["/v1/**"]\n    {token}')
    only = {"credential": "api-token", "hosts": ["api.example.com:443"]}
    assert finding(coding, "credential_only_to", **only).ok
    bad = finding(wider, "credential_only_to", **only)
    assert (bad.verdict, bad.detail) == ("broken", "api-token goes to id.example.com:443 for a token")
    assert bad.rules == ("credentials[1].oauth2.token_url",)
    both = {"credential": "api-token", "hosts": ["api.example.com:443", "id.example.com:443"]}
    assert finding(wider, "credential_only_to", **both).ok
    assert not finding(wider, "credential_only_to", **both, paths=["/v1/**"]).ok
    assert finding(wider, "credential_only_to", **both, paths=["/v1/**", "/oauth2/token"]).ok


def test_a_credential_is_proven_by_method(coding: Bundle) -> None:
    rule = '  - match: {host: git.example.com, git: {service: receive-pack, ref: "refs/heads/agent/**"}}'
    asked = f"  - match: {{host: api.example.com, method: [POST]}}\n    class: review\n    reviewers: {{group: writers}}\n{rule}"
    reviewed = edited(coding, "governance.yaml", rule, asked)
    reading = edited(reviewed, "governance.yaml", '    paths: ["/v1/**"]', '    paths: ["/v1/**"]\n    methods: [GET]')
    for bundle, verdict in ((reviewed, "broken"), (reading, "broken")):
        assert finding(bundle, "credential_only_to", credential="api-token", hosts=["x.example.com"]).verdict == verdict
    none = edited(reviewed, "governance.yaml", '    paths: ["/v1/**"]', '    paths: ["/v1/**"]\n    methods: [PURGE]')
    assert finding(none, "credential_only_to", credential="api-token", hosts=["x.example.com"]).ok


@pytest.mark.parametrize(
    ("kind", "broken", "kept"),
    [
        ("never_read", "/etc/ssl/private", "/var/lib/saw"),
        ("never_read", "/home", "/home/other"),
        ("never_write", "/home/agent/.ssh", "/etc"),
    ],
)
def test_invariants_about_files(coding: Bundle, kind: str, broken: str, kept: str) -> None:
    bad = finding(coding, kind, directories=[broken])
    assert bad.verdict == "broken" and bad.counter_example is not None
    assert bad.counter_example.file.startswith(broken)
    assert finding(coding, kind, directories=[kept]).ok


@pytest.mark.parametrize(
    ("broken", "kept"),
    [
        ({"tool": "write_*"}, {"tool": "delete_*"}),
        ({"tool": "*", "server": "files"}, {"tool": "*", "server": "shell"}),
        (
            {"tool": "write_file", "args": {"path": {"under": "/home/agent/project/src/deep"}}},
            {"tool": "write_file", "args": {"path": {"under": "/home/agent/project/tests"}}},
        ),
        (
            {"tool": "read_text_file", "args": {"head": {"type": "integer", "min": 100000}}},
            {"tool": "read_text_file", "args": {"head": {"type": "integer", "min": 100001}}},
        ),
    ],
)
def test_invariants_about_tools(coding: Bundle, broken: dict[str, Any], kept: dict[str, Any]) -> None:
    bad = finding(coding, "tool_never", **broken)
    example = bad.counter_example
    assert bad.verdict == "broken" and example is not None
    assert decide_tool(coding.governance, example.server, example.tool, json.loads(example.arguments)).allowed
    assert finding(coding, "tool_never", **kept).ok


def test_a_child_is_a_subset_of_its_parent_or_shows_what_is_beyond(coding: Bundle) -> None:
    wider = edited(coding, "policy.yaml", '{method: GET, path: "/v1/**"}', '{method: GET, path: "/**"}')
    assert finding(coding, "subset_of", {"": wider}).ok
    bad = finding(wider, "subset_of", {"": coding})
    assert bad.verdict == "broken" and bad.counter_example is not None and bad.counter_example.call is not None
    request = as_request(bad.counter_example.call)
    assert Matcher.compile(wider.policy, wider.governance).decide(request).allowed
    assert not Matcher.compile(coding.policy, coding.governance).decide(request).allowed
    missing = finding(coding, "subset_of")
    assert missing.verdict == "unproven" and not missing.ok


def test_what_is_too_large_is_not_called_proven() -> None:
    rules = [{"allow": {"method": "GET", "path": f"/**/{c}*{c}*x/**/*{c}/y*"}} for c in "abcdefghijklmnopqr"]
    endpoint = {"host": "a.x.org", "port": 443, "protocol": "rest", "rules": rules}
    policy = {"version": 1, "network_policies": {"one": {"endpoints": [endpoint], "binaries": [{"path": "/**"}]}}}
    governance = {"schema": 1, "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"}}
    members = {"policy.yaml": json.dumps(policy).encode(), "governance.yaml": json.dumps(governance).encode()}
    bundle = load_members(members)
    assert finding(bundle, "never_reach", hosts=["a.x.org"]).verdict == "unproven"
    assert finding(bundle, "never_reach", hosts=["b.x.org"]).ok


@pytest.mark.parametrize("folder", sorted(path.parent for path in POLICIES.glob("*/policy.yaml")), ids=lambda p: p.name)
def test_every_blueprint_keeps_the_default_invariants(folder: Path) -> None:
    bundle = load_members({name: (folder / name).read_bytes() for name in ("policy.yaml", "governance.yaml")})
    findings = prove(bundle, load_invariants(DEFAULTS.read_bytes()), {CEILING: load_bundle_folder(POLICIES / CEILING)})
    assert len(findings) >= 8
    assert [found for found in findings if not found.ok] == []


@pytest.mark.parametrize(
    ("invariant", "field"),
    [
        ({"id": "x", "kind": "never_reach"}, "invariants[0]"),
        ({"id": "x", "kind": "never_read", "hosts": ["a.x.org"]}, "invariants[0].directories"),
        ({"id": "x", "kind": "never_read", "directories": ["/a"], "refs": ["**"]}, "invariants[0].refs"),
        ({"id": "x", "kind": "never_reach", "networks": ["10.0.0.1/8"]}, "invariants[0].networks[0]"),
        ({"id": "x", "kind": "never_reach", "hosts": ["*"]}, "invariants[0].hosts[0]"),
        ({"id": "x", "kind": "sometimes"}, "invariants[0].kind"),
    ],
)
def test_a_broken_file_of_invariants_is_refused(invariant: dict[str, Any], field: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_invariants(json.dumps({"schema": 1, "invariants": [invariant]}).encode())
    assert field in {problem.field for problem in caught.value.problems}


def broken_defaults(bundle: Bundle) -> set[str]:
    ceiling = {CEILING: load_bundle_folder(POLICIES / CEILING)}
    return {found.id for found in prove(bundle, load_invariants(DEFAULTS.read_bytes()), ceiling) if not found.ok}


def test_the_shipped_invariants_notice_a_credential_that_strays_and_a_bundle_that_outgrows_the_ceiling() -> None:
    coding = load_bundle_folder(POLICIES / "coding")
    strayed = edited(coding, "governance.yaml", 'hosts: ["git.example.com:443"]', 'hosts: ["api.example.com:443"]')
    strayed = edited(strayed, "governance.yaml", 'paths: ["/v1/**"]', 'paths: ["/v2/**"]')
    strayed = edited(strayed, "governance.yaml", 'paths: ["/team/**"]', 'paths: ["/v1/**"]')
    assert broken_defaults(strayed) == {"git-credentials-stay-home", "within-the-organisation"}
    grown = load_members(
        {name: raw.replace(b"api.example.com", b"api.example.org") for name, raw in coding.members.items()}
    )
    assert broken_defaults(grown) == {"api-token-stays-home", "within-the-organisation"}


def test_every_credential_of_a_blueprint_is_bound_to_its_hosts() -> None:
    bound = [i.credential for i in load_invariants(DEFAULTS.read_bytes()).invariants if i.kind == "credential_only_to"]
    for path in POLICIES.glob("*/governance.yaml"):
        for credential in load_bundle_folder(path.parent).governance.credentials:
            assert any(globs.flat_glob(glob).fullmatch(credential.id) for glob in bound), credential.id
