"""The diff of reach: nothing newly allowed is missed, nothing is reported that was not gained."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from saw.policy.casefile import Push, as_request, push_body
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_members
from saw.policy.model import Request
from saw.policy.reach_calls import gains
from saw.policy.reach_diff import ReachDiff, diff_bundles
from saw.policy.reach_item import Item, Region
from saw.policy.reach_side import Side
from saw.policy.reach_space import STANDARD

pytestmark = pytest.mark.control("POL-01")

HOSTS = ["a.x.org", "b.x.org", "*.x.org", "a*.x.org", "**.x.org", "*b.x.org"]
NAMES = ["a.x.org", "b.x.org", "ab.x.org", "c.x.org", "a.b.x.org", "x.org"]
PATHS = ["/**", "/a/**", "/a/*", "/a", "/a*/b", "/**/b", "/*/b/**", "/a/git-receive-pack", "/**/git-upload-pack"]
TARGETS = [
    "/", "/a", "/a/", "/a/b", "/ab/b", "/a/x/b", "/x/b/y", "/b", "/a/git-receive-pack", "/a/git-upload-pack", "/a%2Fb/b",
    "/a?q=1", "/a/b?q=1&q=2", "/a/b?q=2", "/a/b?q=1;r=2", "/a/b?r=1&q=12",
]  # fmt: skip
METHODS = ["GET", "HEAD", "POST", "DELETE", "*", "OPTIONS", "PURGE"]
PROGRAMS = ["/bin/a", "/bin/b", "/bin/ab", "/c/d"]
BINARIES = ["/bin/a", "/bin/*", "/bin/a*", "/c/**"]
REFS = ["refs/heads/a", "refs/heads/b", "refs/tags/a"]
REF_GLOBS = ["**", "refs/heads/**", "refs/heads/a", "refs/*/a"]
MODELS = ["m-1", "m-2", "n"]

QUERY = st.one_of(
    st.just({}),
    st.dictionaries(
        st.sampled_from(["q", "r"]),
        st.one_of(st.sampled_from(["1", "2", "1*", "*"]), st.just({"any": ["1", "2"]})),
        max_size=2,
    ),
)
MATCH = st.fixed_dictionaries(
    {"method": st.sampled_from(METHODS), "path": st.sampled_from(PATHS)}, optional={"query": QUERY}
)


STREAM_MATCH = st.fixed_dictionaries(
    {"method": st.sampled_from(["GET", "WEBSOCKET_TEXT", "*"]), "path": st.sampled_from(PATHS)},
    optional={"query": QUERY},
)


def matches(endpoint: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """The shapes of calls that an endpoint's rules may name."""
    return STREAM_MATCH if endpoint.get("protocol") == "websocket" else MATCH


@st.composite
def endpoints(draw: st.DrawFn) -> dict[str, Any]:
    endpoint: dict[str, Any] = {"host": draw(st.sampled_from(HOSTS)), "port": draw(st.sampled_from([443, 443, 8443]))}
    if draw(st.booleans()):
        endpoint["path"] = draw(st.sampled_from(PATHS))
    kind = draw(st.sampled_from(["rules", "rules", "access", "raw"]))
    if kind != "raw":
        endpoint["protocol"] = draw(st.sampled_from(["rest", "rest", "websocket"]))
        if kind == "rules":
            allowed = draw(st.lists(matches(endpoint), min_size=1, max_size=3))
            endpoint["rules"] = [{"allow": match} for match in allowed]
        else:
            endpoint["access"] = draw(st.sampled_from(["read-only", "read-write", "full"]))
        denied = draw(st.lists(matches(endpoint), max_size=2))
        if denied:
            endpoint["deny_rules"] = denied
        if draw(st.integers(0, 5)) == 0:
            endpoint["allow_encoded_slash"] = True
        if draw(st.integers(0, 5)) == 0:
            endpoint["enforcement"] = "audit"
    return endpoint


POLICY = st.fixed_dictionaries(
    {
        "version": st.just(1),
        "network_policies": st.dictionaries(
            st.sampled_from(["one", "two", "three"]),
            st.fixed_dictionaries(
                {
                    "endpoints": st.lists(endpoints(), min_size=1, max_size=2),
                    "binaries": st.lists(st.sampled_from(BINARIES), min_size=1, max_size=2, unique=True).map(
                        lambda paths: [{"path": path} for path in paths]
                    ),
                }
            ),
            max_size=3,
        ),
    }
)
CLASS = st.sampled_from(["auto", "staged", "review", "deny"])
ACTION = st.fixed_dictionaries(
    {
        "match": st.one_of(
            st.fixed_dictionaries(
                {"host": st.sampled_from(HOSTS)},
                optional={
                    "method": st.lists(
                        st.sampled_from(["GET", "POST", "DELETE", "WEBSOCKET_TEXT"]), min_size=1, max_size=2
                    ),
                    "path": st.sampled_from(PATHS),
                    "port": st.just(443),
                },
            ),
            st.fixed_dictionaries(
                {
                    "host": st.sampled_from(HOSTS),
                    "git": st.one_of(
                        st.just({"service": "upload-pack"}),
                        st.fixed_dictionaries(
                            {"service": st.just("receive-pack"), "ref": st.sampled_from(REF_GLOBS)},
                            optional={
                                "operation": st.lists(st.sampled_from(["create", "delete"]), min_size=1, max_size=2)
                            },
                        ),
                    ),
                }
            ),
        ),
        "class": CLASS,
    }
)
INJECT = {"header": "Authorization", "format": "{secret}"}
CREDENTIAL = st.fixed_dictionaries(
    {
        "id": st.just("c"),
        "ref": st.sampled_from(["local:1", "local:2"]),
        "inject": st.just(INJECT),
        "hosts": st.lists(st.sampled_from(["a.x.org:443", "b.x.org:443"]), min_size=1, max_size=2, unique=True),
        "paths": st.lists(st.sampled_from(PATHS), min_size=1, max_size=2, unique=True),
    },
    optional={
        "methods": st.lists(st.sampled_from(["GET", "HEAD", "POST", "PURGE"]), max_size=2, unique=True),
        "oauth2": st.fixed_dictionaries(
            {"token_url": st.sampled_from(["https://id.y.org/1", "https://id.y.org/2"]), "client_id": st.just("c")}
        ),
    },
)
ROUTE = st.fixed_dictionaries(
    {
        "alias": st.just("model.local"),
        "models": st.lists(st.sampled_from(["m-*", "m-1", "*"]), min_size=1, max_size=2),
        "upstream": st.sampled_from(["https://one.y.org/v1", "https://two.y.org/v1"]),
    }
)
GOVERNANCE = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "blueprint": st.just({"name": "x", "version": "1.0.0", "owner": "team"}),
        "allow_audit": st.just(True),
        "actions": st.lists(ACTION, max_size=3),
        "credentials": st.lists(CREDENTIAL, max_size=1),
        "inference": st.fixed_dictionaries({"routes": st.lists(ROUTE, max_size=1)}),
    },
    optional={"plaintext": st.just(["a.x.org:443"])},
)


TOKEN = "oauth2: {token_url: https://id.example.com/token, client_id: agents}"


def load(policy: dict[str, Any], governance: dict[str, Any]) -> Bundle:
    return load_members(
        {"policy.yaml": json.dumps(policy).encode(), "governance.yaml": json.dumps(governance).encode()}
    )


def usable(policy: dict[str, Any], governance: dict[str, Any]) -> Bundle:
    """Load what was drawn; what names an address that no endpoint has is left out first."""
    declared = {
        f"{name}:{endpoint['port']}"
        for rule in policy["network_policies"].values()
        for endpoint in rule["endpoints"]
        for name in (["a.x.org", "b.x.org"] if "*" in endpoint["host"] else [endpoint["host"]])
    }
    governance = dict(governance)
    governance["credentials"] = [c for c in governance["credentials"] if set(c["hosts"]) <= declared]
    if set(governance.get("plaintext", [])) - declared or governance["credentials"]:
        governance.pop("plaintext", None)
    try:
        return load(policy, governance)
    except PolicyError:
        assume(False)
        raise


BUNDLE = st.tuples(POLICY, GOVERNANCE)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Bundle, Bundle]:
    """Two bundles that have nothing to do with each other, or one and a small edit of it."""
    policy, governance = draw(BUNDLE)
    before = usable(policy, governance)
    if draw(st.integers(0, 2)) == 0:
        return before, usable(*draw(BUNDLE))
    edited, rules = copy.deepcopy(policy), copy.deepcopy(governance)
    endpoints_ = [endpoint for rule in edited["network_policies"].values() for endpoint in rule["endpoints"]]
    endpoint = draw(st.sampled_from(endpoints_)) if endpoints_ else {}
    what = draw(st.sampled_from(["deny", "rule", "host", "path", "binary", "governance", "drop"]))
    if what == "deny" and endpoint.get("protocol"):
        denied = draw(st.lists(matches(endpoint), max_size=2))
        endpoint.pop("deny_rules", None)
        if denied:
            endpoint["deny_rules"] = denied
    elif what == "rule" and "rules" in endpoint:
        endpoint["rules"][0] = {"allow": draw(matches(endpoint))}
    elif what == "host" and endpoint:
        endpoint["host"] = draw(st.sampled_from(HOSTS))
    elif what == "path" and endpoint:
        endpoint["path"] = draw(st.sampled_from(PATHS))
    elif what == "binary" and endpoints_:
        rule = next(iter(edited["network_policies"].values()))
        rule["binaries"] = [{"path": draw(st.sampled_from(BINARIES))}]
    elif what == "drop" and endpoints_:
        edited["network_policies"].pop(draw(st.sampled_from(sorted(edited["network_policies"]))))
    else:
        _, rules = draw(BUNDLE)
    return before, usable(edited, rules)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    if draw(st.integers(0, 5)) == 0:
        body = json.dumps({"model": draw(st.sampled_from(MODELS))}).encode()
        path = draw(st.sampled_from(["/v1/messages", "/v1/models", "/v1/x"]))
        method = draw(st.sampled_from(["POST", "GET"]))
        return Request("https", "model.local", 443, method, path, draw(st.sampled_from(PROGRAMS)), body=body)
    path = draw(st.sampled_from(TARGETS))
    method = draw(st.sampled_from(["GET", "HEAD", "POST", "DELETE", "PURGE", "REPORT", "OPTIONS"]))
    body = None
    if path.endswith("-pack"):
        method = "POST"
        refs = draw(st.lists(st.sampled_from(REFS), unique=True, max_size=2))
        operation = st.sampled_from(["create", "update", "delete"])
        body = push_body(tuple(Push(ref, draw(operation)) for ref in refs)) if refs else b"0000"
    programs = draw(st.lists(st.sampled_from(PROGRAMS), max_size=3))
    stream = body is None and method == "GET" and draw(st.booleans())
    return Request(
        scheme=draw(st.sampled_from(["https", "https", "https", "http"])),
        host=draw(st.sampled_from(NAMES)),
        port=draw(st.sampled_from([443, 443, 8443])),
        method=method,
        path=path,
        binary=programs[0] if programs else None,
        ancestors=tuple(programs[1:]),
        body=body,
        body_complete=body == b"0000",
        upgrade="websocket" if stream else "",
        message=draw(st.sampled_from(["", "text", "binary"])) if stream else "",
    )


def every_request() -> list[Request]:
    """A fixed grid of calls, so that each pair of bundles is asked about all that its small words can tell apart."""
    grid = product(NAMES[:5], TARGETS, ["GET", "POST", "PURGE"], [("/bin/a",), ("/bin/ab",), ("/c/d", "/bin/b")])
    calls = [
        Request("https", host, 443, method, path, programs[0], programs[1:])
        for host, path, method, programs in grid
        if not path.endswith("receive-pack")
    ]
    streams = [
        msgspec.structs.replace(call, upgrade="websocket", message=message)
        for call, message in product(calls, ["", "text", "binary"])
        if call.method == "GET"
    ]
    return [*calls, *streams]


GRID = every_request()


def check_exact(diff: ReachDiff, old: Side, new: Side, request: Request) -> None:
    """A request is covered when, and (but for other kinds of gain) only when, the new bundle gives it more."""
    gained = gains(old.decide(request)[1], new.decide(request)[1])
    covered = diff.covers(request)
    if gained:
        assert covered, (request, gained)
    elif covered and all(item.exact for item in diff.gained):
        wider = any(item.kind == "addresses" for item in diff.gained)
        several = request.body is not None and request.body.count(b"refs/") > 1
        assert wider or several, request


@pytest.mark.thorough
@given(pairs(), st.lists(requests(), min_size=20, max_size=20))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_everything_newly_allowed_is_reported_and_nothing_else(
    pair: tuple[Bundle, Bundle], sampled: list[Request]
) -> None:
    before, after = pair
    diff = diff_bundles(before, after)
    old, new = Side(before), Side(after)
    for request in (*sampled, *GRID):
        check_exact(diff, old, new, request)
    for item in diff.gained:
        if item.subject == "call" and item.exact:
            assert item.witness is not None and item.witness.call is not None
            example = as_request(item.witness.call)
            if item.kind != "addresses":
                assert gains(old.decide(example)[1], new.decide(example)[1]) == item.kind
            if item.kind == "call":
                assert new.matcher.decide(example).allowed and not old.matcher.decide(example).allowed
            assert diff.covers(example)


def pieces(items: Iterable[Item]) -> set[tuple[str, str, Region]]:
    """The reach of ``items``, method by method: gains are split by risk, losses have none."""
    found = set()
    for item in items:
        named = [(*STANDARD, "any other method") if name == "any method" else (name,) for name in item.region.methods]
        for method in [method for names in named for method in names] or [""]:
            found.add((item.subject, method, msgspec.structs.replace(item.region, methods=())))
    return found


@pytest.mark.thorough
@given(pairs())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_what_one_direction_gains_the_other_loses(pair: tuple[Bundle, Bundle]) -> None:
    before, after = pair
    there, back = diff_bundles(before, after), diff_bundles(after, before)
    assert pieces(there.lost) == pieces(item for item in back.gained if item.exact)
    assert there.digest == diff_bundles(before, after).digest


def shuffled(draw: st.DrawFn, policy: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(policy)
    names = draw(st.permutations(sorted(result["network_policies"])))
    result["network_policies"] = {name: result["network_policies"][name] for name in names}
    for rule in result["network_policies"].values():
        rule["binaries"] = draw(st.permutations(rule["binaries"]))
        for endpoint in rule["endpoints"]:
            if "deny_rules" in endpoint:
                endpoint["deny_rules"] = draw(st.permutations(endpoint["deny_rules"]))
    return result


@given(BUNDLE, st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_reordering_and_narrowing_widen_nothing(drawn: tuple[dict, dict], data: st.DataObject) -> None:
    policy, governance = drawn
    governance = {**governance, "actions": []}
    before = usable(policy, governance)
    other = data.draw(st.composite(lambda draw: shuffled(draw, policy))())
    assert not diff_bundles(before, usable(other, governance)).widening
    narrower = copy.deepcopy(other)
    for rule in narrower["network_policies"].values():
        for endpoint in rule["endpoints"]:
            if endpoint.get("protocol") and endpoint.get("enforcement") != "audit":
                endpoint.setdefault("deny_rules", []).append(data.draw(MATCH))
    assert not diff_bundles(before, usable(narrower, governance)).widening


# ---------------------------------------------------------------- single cases


def edited(coding: Bundle, file: str, old: str, new: str) -> Bundle:
    assert old.encode() in coding.members[file]
    return load_members({**coding.members, file: coding.members[file].replace(old.encode(), new.encode(), 1)})


POLICY_FILE, GOVERNANCE_FILE = "policy.yaml", "governance.yaml"


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        (POLICY_FILE, '{method: GET, path: "/v1/**"}', '{method: GET, path: "/**"}', ("medium", "call")),
        (POLICY_FILE, "path: /v1/notes", 'path: "/v1/*"', ("medium", "review")),
        (POLICY_FILE, '        deny_rules:\n          - {method: GET, path: "/v1/admin/**"}\n', "", ("medium", "call")),
        (POLICY_FILE, "host: api.example.com", 'host: "*.example.com"', ("high", "call")),
        (POLICY_FILE, "- path: /usr/bin/curl", '- path: "/usr/bin/c*"', ("medium", "call")),
        (POLICY_FILE, "/home/agent, /tmp", "/home, /tmp", ("critical", "write")),
        (POLICY_FILE, "landlock:", "process: {run_as_user: other}\nlandlock:", ("high", "setting")),
        (GOVERNANCE_FILE, "refs/heads/agent/**", "refs/heads/**", ("critical", "review-lifted")),
        (GOVERNANCE_FILE, "class: staged", "class: auto", ("high", "class")),
        (GOVERNANCE_FILE, "quorum: 1", "quorum: 2", ("medium", "reviewers")),
        (GOVERNANCE_FILE, '"local:api-token"', '"local:root-token"', ("critical", "credential")),
        (GOVERNANCE_FILE, '"local:api-token"', '"vault:kv/api/{sponsor}"', ("critical", "credential")),
        (GOVERNANCE_FILE, '    paths: ["/v1/**"]', f'    paths: ["/v1/**"]\n    {TOKEN}', ("critical", "credential")),
        (GOVERNANCE_FILE, '["demo-*"]', '["demo*"]', ("medium", "call")),
        (GOVERNANCE_FILE, "https://models.example.com", "https://models.example.org", ("critical", "upstream")),
        (GOVERNANCE_FILE, "min: 1, max: 100000", "min: 1, max: 100001", ("high", "argument")),
        (GOVERNANCE_FILE, "project/src, required: true", "project, required: true", ("high", "argument")),
        (GOVERNANCE_FILE, "content: {max_length: 1048576, required: true}", "content: {}", ("high", "argument")),
        (GOVERNANCE_FILE, "lease: {ttl: 120s", "lease: {ttl: 10m", ("medium", "setting")),
        (GOVERNANCE_FILE, "offline_ttl: 0s", "offline_ttl: 5m", ("high", "setting")),
        (GOVERNANCE_FILE, "minimum_abi: 4", "minimum_abi: 3", ("high", "setting")),
    ],
)
def test_each_way_to_widen_has_its_kind_and_risk(
    coding: Bundle, file: str, old: str, new: str, expected: tuple[str, str]
) -> None:
    wider = edited(coding, file, old, new)
    diff = diff_bundles(coding, wider)
    assert expected in {(item.risk, item.kind) for item in diff.gained}
    assert diff.widening and all(item.exact for item in diff.gained)
    back = diff_bundles(wider, coding)
    # A name that is declared exactly may also be dialled at private addresses, which a pattern may not.
    changed_both_ways = expected[1] in {"credential", "upstream", "reviewers"} or "run_as" in new or "host:" in old
    assert back.widening is changed_both_ways and back.lost


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (POLICY_FILE, '{method: GET, path: "/v1/**"}', '{method: GET, path: "/v1/*/x/**"}'),
        (POLICY_FILE, "/usr/bin/python3*", "/usr/bin/python3.1*"),
        (POLICY_FILE, "/home/agent, /tmp", "/home/agent/project, /home/agent/.cache, /tmp"),
        (GOVERNANCE_FILE, '["demo-*"]', '["demo-*-small", "demo-1"]'),
        (GOVERNANCE_FILE, "refs/heads/agent/**", "refs/heads/agent/*"),
        (GOVERNANCE_FILE, "path: {under: /home/agent/project, required", 'path: {regex: "/home/agent/project/[a-z]+", required'),
        (GOVERNANCE_FILE, "content: {max_length", 'content: {regex: "[ -~]*", max_length'),
    ],
)  # fmt: skip
def test_narrowing_inside_a_wildcard_is_no_widening(coding: Bundle, file: str, old: str, new: str) -> None:
    narrower = edited(coding, file, old, new)
    diff = diff_bundles(coding, narrower)
    assert not diff.widening and diff.lost
    assert diff_bundles(narrower, coding).widening


def test_a_more_specific_endpoint_that_goes_away_is_a_widening() -> None:
    """The broad endpoint decides again where the narrow one did."""
    governance = {"schema": 1, "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"}}
    broad = {"host": "a.x.org", "port": 443, "protocol": "rest", "access": "read-only"}
    narrow = {
        **broad,
        "path": "/secret/**",
        "access": "",
        "rules": [{"allow": {"method": "GET", "path": "/secret/index"}}],
    }
    narrow.pop("access")

    def bundle(endpoints_: list[dict[str, Any]]) -> Bundle:
        rule = {"endpoints": endpoints_, "binaries": [{"path": "/bin/a"}]}
        return load({"version": 1, "network_policies": {"one": rule}}, governance)

    diff = diff_bundles(bundle([broad, narrow]), bundle([broad]))
    assert diff.widening
    assert diff.covers(Request("https", "a.x.org", 443, "GET", "/secret/key", "/bin/a"))
    assert not diff.covers(Request("https", "a.x.org", 443, "GET", "/secret/index", "/bin/a"))
    assert not diff_bundles(bundle([broad]), bundle([broad, narrow])).widening


def single(endpoint: dict[str, Any], **governance: Any) -> Bundle:
    rule = {"endpoints": [endpoint], "binaries": [{"path": "/bin/a"}]}
    blueprint = {"name": "x", "version": "1.0.0", "owner": "team"}
    return load({"version": 1, "network_policies": {"one": rule}}, {"schema": 1, "blueprint": blueprint, **governance})


READS = {"host": "a.x.org", "port": 443, "protocol": "rest", "access": "read-only"}


def test_calls_in_plain_text_are_new_calls() -> None:
    diff = diff_bundles(single(READS), single(READS, plaintext=["a.x.org:443"]))
    assert [(item.risk, item.region.scheme) for item in diff.gained] == [("high", "http")]
    assert diff.covers(Request("http", "a.x.org", 443, "GET", "/", "/bin/a"))
    assert not diff.covers(Request("https", "a.x.org", 443, "GET", "/", "/bin/a"))


def test_an_encoded_slash_is_a_new_path() -> None:
    diff = diff_bundles(single(READS), single({**READS, "allow_encoded_slash": True}))
    assert diff.gained[0].witness is not None and diff.gained[0].witness.call is not None
    assert "%2F" in diff.gained[0].witness.call.url
    assert diff.covers(Request("https", "a.x.org", 443, "GET", "/a%2Fb", "/bin/a"))
    assert not diff.covers(Request("https", "a.x.org", 443, "GET", "/a/b", "/bin/a"))


def test_several_values_of_one_key_are_told_apart() -> None:
    """Two rules for one value each refuse a mix of both; one rule for either value allows it."""

    def allow(value: object) -> dict[str, Any]:
        return {"allow": {"method": "GET", "path": "/**", "query": {"q": value}}}

    rest = {"host": "a.x.org", "port": 443, "protocol": "rest"}
    apart = single({**rest, "rules": [allow("1"), allow("2")]})
    together = single({**rest, "rules": [allow({"any": ["1", "2"]})]})
    diff = diff_bundles(apart, together)
    assert diff.covers(Request("https", "a.x.org", 443, "GET", "/?q=1&q=2", "/bin/a"))
    assert not diff.covers(Request("https", "a.x.org", 443, "GET", "/?q=1&q=1", "/bin/a"))
    assert not diff_bundles(together, apart).widening


def test_private_addresses_are_reach() -> None:
    glob = {**READS, "host": "*.x.org"}
    opened = {**glob, "allowed_ips": ["10.0.0.0/8"]}
    assert {item.kind for item in diff_bundles(single(glob), single(opened)).gained} == {"addresses"}
    narrower = {**glob, "allowed_ips": ["10.1.0.0/16", "10.2.0.0/16"]}
    assert not diff_bundles(single(opened), single(narrower)).widening


def many(count: int, path: str) -> dict[str, Any]:
    return {
        "version": 1,
        "network_policies": {
            f"rule-{i}": {
                "endpoints": [
                    {
                        "host": f"h{i}.x.org",
                        "port": 443,
                        "protocol": "rest",
                        "rules": [{"allow": {"method": "GET", "path": path}}],
                    }
                ],
                "binaries": [{"path": "/bin/a"}],
            }
            for i in range(count)
        },
    }


def test_large_bundles_are_compared_in_bounded_time() -> None:
    governance = {"schema": 1, "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"}}
    started = time.process_time()
    before, after = load(many(500, "/a/**"), governance), load(many(500, "/a/*"), governance)
    assert not diff_bundles(before, after).widening
    assert len(diff_bundles(after, before).gained) == 500
    assert time.process_time() - started < 30


def test_hostile_rules_are_over_reported_in_bounded_time() -> None:
    governance = {"schema": 1, "blueprint": {"name": "x", "version": "1.0.0", "owner": "team"}}

    def bundle(letters: str) -> Bundle:
        rules = [{"allow": {"method": "GET", "path": f"/**/{c}*{c}*x/**/*{c}/y*"}} for c in letters]
        endpoint = {"host": "**.x.org", "port": 443, "protocol": "rest", "rules": rules}
        return load(
            {"version": 1, "network_policies": {"one": {"endpoints": [endpoint], "binaries": [{"path": "/**"}]}}},
            governance,
        )

    started = time.process_time()
    diff = diff_bundles(bundle("abcdefghijklmnopqr"), bundle("abcdefghijklmnopqrs"))
    assert time.process_time() - started < 60
    assert diff.widening and not all(item.exact for item in diff.gained)
    assert diff.covers(Request("https", "a.x.org", 443, "GET", "/ssx/s/y", "/bin/a"))
    assert diff.digest == diff_bundles(bundle("abcdefghijklmnopqr"), bundle("abcdefghijklmnopqrs")).digest


def test_an_item_says_where_a_secret_lies_what_becomes_of_it_and_with_which_methods(coding: Bundle) -> None:
    narrow = edited(coding, GOVERNANCE_FILE, '    paths: ["/v1/**"]', '    paths: ["/v1/**"]\n    methods: [GET]')
    wide = edited(coding, GOVERNANCE_FILE, '    paths: ["/v1/**"]', f'    paths: ["/v1/**"]\n    {TOKEN}')
    (item,) = (item for item in diff_bundles(narrow, coding).gained if item.kind == "credential")
    assert item.region.methods == ("POST",), "GET and HEAD had it before"
    assert (item.region.ref, item.region.provider) == ("file:api-token", "")
    assert item.what.endswith("with credential api-token (file:api-token)")
    assert not [item for item in diff_bundles(coding, narrow).gained if item.kind == "credential"]
    found = [item for item in diff_bundles(coding, wide).gained if item.kind == "credential"]
    assert {item.region.provider for item in found} == {"token of https://id.example.com/token"}
    assert all("(file:api-token, token of https://id.example.com/token)" in item.what for item in found)


def test_a_signature_in_place_of_a_header_is_another_secret(coding: Bundle) -> None:
    inject = '    inject: {header: Authorization, format: "Bearer {secret}"}\n  - id: model-key'
    signed = edited(
        coding, GOVERNANCE_FILE, inject, "    sigv4: {service: s3, region: eu-central-1}\n  - id: model-key"
    )
    other = edited(signed, GOVERNANCE_FILE, "region: eu-central-1", "region: us-east-1")
    for old, new, region in ((coding, signed, "eu-central-1"), (signed, other, "us-east-1")):
        found = [item for item in diff_bundles(old, new).gained if item.kind == "credential"]
        assert {(item.risk, item.region.provider) for item in found} == {("critical", f"signature for s3 in {region}")}


def test_the_older_name_of_a_store_is_no_other_store(coding: Bundle) -> None:
    same = edited(coding, GOVERNANCE_FILE, '"local:api-token"', '"file:api-token"')
    assert diff_bundles(coding, same).gained == diff_bundles(same, coding).gained == ()
