"""What an agent is told of its policy, and how the policy stands to what it asks for."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from saw.policy import policy_view
from saw.policy.loader import Bundle, load_bundle_folder, load_governance, load_members, load_policy
from saw.policy.model import Request
from saw.policy.policy_request import Wish, canonical, judge
from saw.policy.policy_view import MAX_VIEW, as_text, view_policy

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[3] / "policies").glob("*/governance.yaml"))
GOVERNANCE = b"schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n"


def asked(
    host: str = "api.example.com", path: str = "/v2/x", method: str = "GET", binary: str = "/usr/bin/curl"
) -> Request:
    return Request("https", host, 443, method, path, binary=binary)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_blueprint_is_told_with_its_hosts_and_without_its_secrets(folder: Path) -> None:
    bundle = load_bundle_folder(str(folder))
    view = view_policy("d" * 64, 7, bundle.policy, bundle.governance)
    raw = msgspec.json.encode(view).decode()
    hosts = {e.host for rule in bundle.policy.network_policies.values() for e in rule.endpoints}
    assert {one.host for one in view.hosts} == hosts
    assert (view.blueprint, view.revision, view.truncated) == (bundle.governance.blueprint.name, 7, False)
    for credential in bundle.governance.credentials:
        assert credential.ref not in raw
    for route in bundle.governance.inference.routes:
        assert route.upstream not in raw
    assert all(host in as_text(view) for host in hosts)


def test_a_deny_rule_is_counted_and_not_told(coding: Bundle) -> None:
    denied = [
        match.path
        for rule in coding.policy.network_policies.values()
        for endpoint in rule.endpoints
        for match in endpoint.deny_rules or ()
    ]
    view = view_policy("d" * 64, 1, coding.policy, coding.governance)
    assert sum(one.exceptions for one in view.hosts) == len(denied) > 0
    assert not [path for path in denied if path in msgspec.json.encode(view).decode()]


def test_a_view_of_a_huge_policy_keeps_to_its_bound_and_says_so() -> None:
    rules = ", ".join(f'{{allow: {{method: GET, path: "/{"a" * 200}/{number}"}}}}' for number in range(50))
    endpoints = "".join(
        f"      - {{host: h{number}.example.com, port: 443, protocol: rest, rules: [{rules}]}}\n"
        for number in range(80)
    )
    text = f"version: 1\nnetwork_policies:\n  a:\n    binaries: [{{path: /usr/bin/curl}}]\n    endpoints:\n{endpoints}"
    bundle = load_members({"policy.yaml": text.encode(), "governance.yaml": GOVERNANCE})
    view = view_policy("d" * 64, 1, bundle.policy, bundle.governance)
    assert len(msgspec.json.encode(view)) <= MAX_VIEW
    assert view.truncated
    assert 0 < len(view.hosts) < 80
    assert "the policy is longer than this" in as_text(view)


@pytest.mark.parametrize(
    ("what", "most"),
    [
        ("rules", 4), ("programs", 4), ("tools", 4), ("arguments", 4), ("models", 4), ("aliases", 3),
        ("read_only", 6), ("read_write", 6), ("actions", 6), ("routes", 6), ("servers", 6), ("endpoints", 6),
    ],
)  # fmt: skip
def test_whatever_is_left_out_of_a_list_makes_the_view_say_so(
    monkeypatch: pytest.MonkeyPatch, what: str, most: int
) -> None:
    monkeypatch.setattr(policy_view, "MOST", 6)
    monkeypatch.setattr(policy_view, "MOST_INSIDE", 4)

    def told(count: int) -> bool:
        def many(name: str) -> range:
            return range(count if name == what else 1)

        rules = [{"allow": {"method": "GET", "path": f"/{n}"}} for n in many("rules")]
        programs = [{"path": f"/usr/bin/a{n}"} for n in many("programs")]
        endpoint = {"port": 443, "protocol": "rest", "rules": rules}
        endpoints = [{"host": f"a{n}.example.com", **endpoint} for n in many("endpoints")]
        policy = {
            "version": 1,
            "network_policies": {"a": {"endpoints": endpoints, "binaries": programs}},
            "filesystem_policy": {
                kind: [f"/srv/{kind}{n}" for n in many(kind)] for kind in ("read_only", "read_write")
            },
        }
        tool = {"class": "auto", "args": {f"a{n}": {} for n in many("arguments")}}
        tools = {f"t{n}": tool for n in many("tools")}
        route = {
            "upstream": "https://models.example.com/v1", "models": [f"m{n}" for n in many("models")],
            "aliases": {f"a{n}": "m0" for n in many("aliases")} if what == "aliases" else {},
        }  # fmt: skip
        governance = {
            "schema": 1,
            "blueprint": {"name": "coding", "version": "1.0.0", "owner": "team"},
            "actions": [
                {"match": {"host": "a0.example.com", "path": f"/{n}"}, "class": "auto"} for n in many("actions")
            ],
            "mcp": {
                "servers": {
                    f"s{n}": {"transport": "stdio", "command": ["/bin/mcp"], "tools": tools} for n in many("servers")
                }
            },
            "inference": {"routes": [{"alias": f"m{n}.example.com", **route} for n in many("routes")]},
        }
        read = load_policy(json.dumps(policy).encode()), load_governance(json.dumps(governance).encode())
        return view_policy("d" * 64, 1, *read).truncated

    assert (told(most), told(most + 1)) == (False, True)


def test_an_agent_learns_the_names_for_models_and_which_budgets_and_limits_count() -> None:
    inference = b"""
inference:
  routes:
    - {alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/v1", aliases: {fast: demo-big},
       limits: [burst]}
limits:
  - {id: burst, scope: workspace, per: 1m, requests: 60}
"""
    bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": GOVERNANCE + inference})
    view = view_policy("d" * 64, 1, bundle.policy, bundle.governance)
    assert view.models[0].models == ("fast", "demo-*")
    assert (view.budgets, view.limits) == ((), ("burst",))
    text = as_text(view)
    assert "models fast demo-*\n" in text
    assert "\nlimits: burst\n" in text
    assert "\nbudgets:" not in text
    assert "demo-big" not in text


def test_a_policy_that_allows_nothing_says_so() -> None:
    bundle = load_members({"policy.yaml": b"version: 1\n", "governance.yaml": GOVERNANCE})
    assert "you may call nothing" in as_text(view_policy("d" * 64, 1, bundle.policy, bundle.governance))


@pytest.mark.parametrize(
    ("call", "standing"),
    [
        (asked(path="/v1/x"), "allowed"),
        (asked(), "refused"),
        (asked(host="new.example.com"), "refused"),
        (asked(host="169.254.169.254"), "never"),
    ],
)
def test_policy_stands_to_a_call_as_its_matcher_decides(coding: Bundle, call: Request, standing: str) -> None:
    found = judge(coding, call)
    assert found.standing == standing
    assert bool(found.proposal) == (standing == "refused")


@pytest.mark.parametrize("path", ["/v1/%2e%2e/x%0a", "/../x", "/v1?a=1", "/v1#x", "/v1/\u00e4"])
def test_a_path_that_no_rule_can_name_is_no_path(path: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        canonical(path)
    assert canonical("/v1//a/./b") == "/v1/a/b"


@pytest.mark.parametrize(
    "body",
    [
        b"{}", b"[]", b'{"host": "a.example.com"}', b'{"host": 1, "reason": "r"}',
        b'{"host": "a.example.com", "reason": "r", "grant": true}',
    ],
)  # fmt: skip
def test_a_wish_names_host_and_reason_and_nothing_unknown(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=Wish)
    wish = msgspec.json.decode(b'{"host": "a.example.com", "reason": "r"}', type=Wish)
    assert (wish.method, wish.path, wish.scheme, wish.port) == ("GET", "/", "https", None)
