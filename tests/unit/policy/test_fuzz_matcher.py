"""The compiled matcher decides as a plain loop over the rules does, whatever the rules and the call."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.policy import globs
from saw.policy.address_rules import parse_query
from saw.policy.errors import PolicyError
from saw.policy.globset import GlobSet, path_segments, places_of
from saw.policy.governance import Action, ActionMatch, Blueprint, Credential, GitMatch, Governance, Inject
from saw.policy.loader import load_members, load_policy
from saw.policy.matcher import Matcher
from saw.policy.model import AllowRule, AnyOf, Binary, Endpoint, Match, NetworkRule, Policy, Request

pytestmark = [pytest.mark.control("RUN-01"), pytest.mark.control("NET-01")]

GOVERNANCE = Governance(schema=1, blueprint=Blueprint(name="x", version="1.0.0", owner="team"))
READS = {"GET", "HEAD", "OPTIONS"}
ACCESS = {"read-only": READS, "read-write": READS | {"POST", "PUT", "PATCH"}}


def means(glob: str, path: str) -> bool:
    """What a path glob means, said by recursion over whole segments."""

    @cache
    def rest(i: int, j: int) -> bool:
        if i == len(wanted):
            return j == len(given_)
        if wanted[i] == "**":
            if i + 1 == len(wanted):
                return j < len(given_)
            return any(rest(i + 1, k) for k in range(j, len(given_) + 1))
        return j < len(given_) and one(wanted[i], given_[j]) and rest(i + 1, j + 1)

    def one(segment: str, text: str) -> bool:
        if segment == "*":
            return text != ""
        return re.fullmatch(".*".join(map(re.escape, segment.split("*"))), text) is not None

    wanted, given_ = glob.split("/")[1:], path.split("/")[1:]
    return path.startswith("/") and rest(0, 0)


def host_means(glob: str, host: str) -> bool:
    """A host glob is a path glob over labels, but for ``**``, which is one or more labels."""
    labels = host.split(".")
    if "" in labels:
        return False
    if not glob.startswith("**."):
        return means("/" + glob.replace(".", "/"), "/" + "/".join(labels))
    tail = glob[3:].split(".")
    return len(labels) > len(tail) and means("/" + "/".join(tail), "/" + "/".join(labels[-len(tail) :]))


def naive(policy: Policy, request: Request) -> tuple[str, str, str]:
    """Verdict, reason and rule of a call whose path is canonical and whose query has no traps; a loop over everything."""
    path, _, text = request.path.partition("?")
    query = parse_query(text)
    named = [
        (key, index, rule, endpoint)
        for key, rule in policy.network_policies.items()
        for index, endpoint in enumerate(rule.endpoints)
        if request.port in endpoint.all_ports and host_means(endpoint.host, request.host)
    ]
    if not named:
        return "deny", "host_not_allowed", ""
    covering = [found for found in named if means(found[3].path or "/**", path)]
    if not covering:
        return "deny", "method_or_path_not_allowed", ""
    usable = [found for found in covering if any(means(b.path, request.binary or "") for b in found[2].binaries)]
    if not usable:
        return "deny", "binary_not_allowed", ""

    def rank(found: tuple[str, int, NetworkRule, Endpoint]) -> object:
        return globs.specificity(found[3].host), globs.specificity(found[3].path or "/**")

    best = max(map(rank, usable))
    usable = [found for found in usable if rank(found) == best]

    def fits(match: Match, *, every: bool) -> bool:
        method = match.method.upper()
        if method not in {"*", request.method} and not (method == "GET" and request.method == "HEAD"):
            return False
        if not means(match.path, path):
            return False
        if match.query and query is None:
            return not every
        for key, value in match.query.items():
            wanted = value.any if isinstance(value, AnyOf) else (value,)
            values = (query or {}).get(key, [])
            hits = [any(globs.flat_glob(glob).fullmatch(v) for glob in wanted) for v in values]
            if not hits or not (all(hits) if every else any(hits)):
                return False
        return True

    for key, index, _, endpoint in usable:
        for number, match in enumerate(endpoint.deny_rules or ()):
            if fits(match, every=False):
                return "deny", "deny_rule", f"{key}.endpoints[{index}].deny_rules[{number}]"
    for key, index, _, endpoint in usable:
        if endpoint.access and (endpoint.access == "full" or request.method in ACCESS[endpoint.access]):
            return "allow", "", f"{key}.endpoints[{index}].access: {endpoint.access}"
        for number, allowed in enumerate(endpoint.rules or ()):
            if fits(allowed.allow, every=True):
                return "allow", "", f"{key}.endpoints[{index}].rules[{number}]"
    return "deny", "method_or_path_not_allowed", ""


SEGMENT = st.sampled_from(["a", "b", "ab", "*", "a*", "*b", "*a*", "a*b*a"])
GLOB = st.builds(
    lambda front, end: "/" + "/".join([*front, end]),
    st.lists(st.one_of(SEGMENT, st.just("**")), max_size=3),
    st.one_of(SEGMENT, st.sampled_from(["**", ""])),
)
PATH = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aba", "c"]), max_size=4).flatmap(
    lambda parts: st.sampled_from(["/" + "/".join(parts), "/" + "/".join([*parts, ""]) if parts else "/"])
)
HOST_GLOB = st.just("x.y.z") | st.sampled_from(
    ["x.y.z", "a.y.z", "*.y.z", "**.y.z", "*a.y.z", "a*b.y.z", "a.*.y.z", "**.a.y.z", "*.other.z", "x.y.w"]
)
HOST = st.just("x.y.z") | st.sampled_from(
    ["x.y.z", "a.y.z", "ab.y.z", "a.a.y.z", "a.b.y.z", "y.z", "x.y.w", "q.other.z", "a..y.z", "ba.y.z"]
)
METHOD = st.sampled_from(["GET", "POST", "HEAD", "DELETE", "PUT"])
QUERY = st.dictionaries(
    st.sampled_from("kq"), st.one_of(st.sampled_from(["1", "*", "1*"]), st.just(AnyOf(any=("1", "2")))), max_size=2
)
MATCH = st.builds(Match, method=st.one_of(METHOD, st.just("*")), path=GLOB, query=QUERY)
ENDPOINT = st.one_of(
    st.builds(
        Endpoint,
        host=HOST_GLOB,
        port=st.just(443),
        path=st.one_of(st.just(""), GLOB),
        protocol=st.just("rest"),
        rules=st.lists(MATCH.map(lambda match: AllowRule(allow=match)), min_size=1, max_size=3).map(tuple),
        deny_rules=st.none() | st.lists(MATCH, min_size=1, max_size=2).map(tuple),
    ),
    st.builds(
        Endpoint,
        host=HOST_GLOB,
        ports=st.sampled_from([(443,), (443, 8443), (8443,)]),
        path=st.one_of(st.just(""), GLOB),
        protocol=st.just("rest"),
        access=st.sampled_from(["read-only", "read-write", "full"]),
        deny_rules=st.none() | st.lists(MATCH, min_size=1, max_size=2).map(tuple),
    ),
)
PROGRAM = st.sampled_from(["/bin/a", "/bin/b", "/bin/*", "/**", "/**", "/**", "/opt/**", "/**/a", "/b*/a"]).map(
    lambda p: Binary(path=p)
)
RULE = st.builds(
    NetworkRule,
    endpoints=st.lists(ENDPOINT, min_size=1, max_size=4).map(tuple),
    binaries=st.lists(PROGRAM, min_size=1, max_size=2).map(tuple),
)
POLICY = st.builds(
    Policy, version=st.just(1), network_policies=st.dictionaries(st.sampled_from("mnop"), RULE, min_size=1, max_size=4)
)
REQUEST = st.builds(
    lambda host, port, method, path, query, binary: Request("https", host, port, method, path + query, binary=binary),
    HOST,
    st.sampled_from([443, 443, 8443]),
    METHOD,
    PATH,
    st.sampled_from(["", "?k=1", "?k=2&q=1", "?k=1&k=3", "?q=x", "?k=1;q=2"]),
    st.sampled_from(["/bin/a", "/bin/b", "/opt/x/y", "/bin/c", "bin/a"]),
)


@given(POLICY, st.lists(REQUEST, min_size=1, max_size=8))
@settings(max_examples=examples(400), deadline=None)
def test_the_matcher_decides_as_a_loop_over_the_rules(policy: Policy, requests: list[Request]) -> None:
    matcher = Matcher(policy, GOVERNANCE)
    for request in [*requests, *requests]:  # the second time from what is remembered
        decision = matcher.decide(request)
        verdict, reason, rule = naive(policy, request)
        if decision.action_class == "review":
            assert verdict == "allow"
            continue
        if reason == "host_not_allowed" and ".." in request.host:
            assert decision.reason == "host_not_allowed"
            continue
        assert (decision.verdict, decision.reason) == (verdict, reason), request
        if rule:
            assert f"{decision.policy}.{decision.rule}" == rule


@given(st.lists(GLOB, max_size=12), st.lists(PATH, min_size=1, max_size=6))
@settings(max_examples=examples(300), deadline=None)
def test_a_set_of_globs_matches_what_each_of_them_does(patterns: list[str], paths: list[str]) -> None:
    compiled = GlobSet([path_segments(glob) for glob in patterns])
    for path in paths:
        state = compiled.walk(compiled.start, path_segments(path)) & compiled.accepting
        found = [compiled.accepts.index(place) for place in places_of(state)]
        assert found == [index for index, glob in enumerate(patterns) if means(glob, path)]


@given(HOST_GLOB, st.one_of(HOST, st.text(alphabet="axyz.", max_size=12)))
@settings(max_examples=examples(300), deadline=None)
def test_host_globs_mean_what_the_definition_says(glob: str, host: str) -> None:
    assert bool(globs.host_glob(glob).fullmatch(host)) == host_means(glob, host)


@given(st.text(alphabet="ab*", min_size=1, max_size=8), st.text(alphabet="ab/.\n", max_size=10))
@settings(max_examples=examples(400), deadline=None)
def test_flat_globs_mean_what_the_definition_says(glob: str, text: str) -> None:
    slow = re.fullmatch(".*".join(map(re.escape, glob.split("*"))), text, re.DOTALL) is not None
    assert bool(globs.flat_glob(glob).fullmatch(text)) == slow


@given(GLOB, st.lists(st.sampled_from(["a", "ab", "b"]), min_size=1, max_size=4))
@settings(max_examples=examples(200), deadline=None)
def test_ref_globs_are_path_globs_without_the_first_slash(glob: str, parts: list[str]) -> None:
    name = "/".join(parts)
    assert bool(globs.ref_glob(glob[1:]).fullmatch("/" + name)) == means(glob, "/" + name) if glob != "/" else True


ACTION_MATCH = st.builds(
    ActionMatch,
    host=HOST_GLOB,
    port=st.none() | st.sampled_from([443, 8443]),
    method=st.lists(METHOD, max_size=2, unique=True).map(tuple),
    path=GLOB,
)
GIT_MATCH = st.builds(
    ActionMatch,
    host=HOST_GLOB,
    path=GLOB,
    git=st.builds(GitMatch, service=st.sampled_from(["upload-pack", "receive-pack"])),
)
ACTIONS = st.lists(
    st.builds(
        lambda match, kind: Action(match=match, class_=kind),
        st.one_of(ACTION_MATCH, GIT_MATCH),
        st.sampled_from(["auto", "staged", "review", "deny"]),
    ),
    max_size=6,
)
ANY_HOST = Policy(
    version=1,
    network_policies={
        "all": NetworkRule(
            endpoints=tuple(
                Endpoint(host=host, ports=(443, 8443), protocol="rest", access="full")
                for host in ("**.y.z", "**.other.z", "x.y.w")
            ),
            binaries=(Binary(path="/**"),),
        )
    },
)


@given(ACTIONS, REQUEST)
@settings(max_examples=examples(300), deadline=None)
def test_the_first_action_rule_that_matches_decides(actions: list[Action], request: Request) -> None:
    governance = Governance(schema=1, blueprint=GOVERNANCE.blueprint, actions=tuple(actions))
    decision = Matcher(ANY_HOST, governance).decide(request)
    if decision.reason in {"host_not_allowed", "binary_not_allowed"}:
        return
    path = request.path.partition("?")[0]
    method = {request.method, "GET"} if request.method == "HEAD" else {request.method}
    wanted = "auto" if request.method in READS else "review"
    for action in actions:
        match = action.match
        if (
            match.git is None
            and match.port in {None, request.port}
            and (not match.method or method & set(match.method))
            and host_means(match.host, request.host)
            and means(match.path, path)
        ):
            wanted = action.class_
            break
    assert decision.action_class == wanted


def test_an_action_rule_with_a_port_counts_on_that_port() -> None:
    action = Action(match=ActionMatch(host="*.y.z", port=8443, method=("GET",)), class_="deny")
    matcher = Matcher(ANY_HOST, Governance(schema=1, blueprint=GOVERNANCE.blueprint, actions=(action,)))

    def answer(port: int, method: str = "GET") -> str:
        return matcher.decide(Request("https", "x.y.z", port, method, "/a", binary="/bin/a")).action_class

    assert (answer(8443), answer(8443, "HEAD"), answer(443), answer(8443, "OPTIONS")) == (
        "deny",
        "deny",
        "auto",
        "auto",
    )


@given(st.lists(GLOB, min_size=1, max_size=4), PATH)
@settings(max_examples=examples(200), deadline=None)
def test_a_credential_is_added_on_its_paths_and_nowhere_else(patterns: list[str], path: str) -> None:
    credentials = tuple(
        Credential(
            id=f"c{number}",
            ref="local:x",
            inject=Inject(header="Authorization", format="{secret}"),
            hosts=("x.y.w:443",),
            paths=(glob,),
        )
        for number, glob in enumerate(patterns)
    )
    governance = Governance(schema=1, blueprint=GOVERNANCE.blueprint, credentials=credentials)
    decision = Matcher(ANY_HOST, governance).decide(Request("https", "x.y.w", 443, "GET", path, binary="/bin/a"))
    expected = next((f"c{number}" for number, glob in enumerate(patterns) if means(glob, path)), None)
    assert decision.allowed and decision.credential == expected


METHODS = ("GET", "HEAD", "POST", "DELETE")
SCOPES = st.lists(st.tuples(GLOB, st.lists(st.sampled_from(METHODS), max_size=2)), min_size=1, max_size=4)


@given(SCOPES, PATH, st.sampled_from(METHODS))
@settings(max_examples=examples(200), deadline=None)
def test_a_credential_is_added_to_its_methods_and_no_other(
    scopes: list[tuple[str, list[str]]], path: str, method: str
) -> None:
    credentials = tuple(
        Credential(
            id=f"c{number}",
            ref="file:x",
            inject=Inject(header="Authorization", format="{secret}"),
            hosts=("x.y.w:443",),
            paths=(glob,),
            methods=tuple(methods),
        )
        for number, (glob, methods) in enumerate(scopes)
    )
    governance = Governance(schema=1, blueprint=GOVERNANCE.blueprint, credentials=credentials)
    decision = Matcher(ANY_HOST, governance).decide(Request("https", "x.y.w", 443, method, path, binary="/bin/a"))
    alike = {method, "GET"} if method == "HEAD" else {method}
    expected = next(
        (f"c{n}" for n, (glob, named) in enumerate(scopes) if means(glob, path) and (not named or alike & {*named})),
        None,
    )
    assert decision.verdict == "deny" or decision.credential == expected


@pytest.mark.parametrize(
    "host", ["evil.org/x.y.z", "evil.org#.y.z", "a b.y.z", "u@x.y.z", "x.//.y.z", "%78.y.z", "x\n.y.z"]
)
def test_a_host_glob_takes_host_names_only(host: str) -> None:
    matcher = Matcher(ANY_HOST, GOVERNANCE)
    assert matcher.decide(Request("https", "x.y.z", 443, "GET", "/", binary="/bin/a")).allowed
    decision = matcher.decide(Request("https", host, 443, "GET", "/", binary="/bin/a"))
    assert decision.reason in {"not_canonical", "destination_blocked"}


def endpoints(count: int, line: str) -> bytes:
    lines = "".join(f"      - {{host: x.y.z, port: 443, protocol: rest, {line % number}}}\n" for number in range(count))
    text = f"version: 1\nnetwork_policies:\n  a:\n    binaries: [{{path: /bin/a}}]\n    endpoints:\n{lines}"
    return text.encode()


@pytest.mark.parametrize(
    "line",
    ["rules: [{allow: {path: /a, query: {k: 'v%d'}}}]", "access: full, path: '/*ab*%d*/**'"],
    ids=["query", "wild"],
)
def test_more_rules_than_can_be_tried_one_by_one_are_refused(line: str) -> None:
    with pytest.raises(PolicyError, match="more than 32"):
        load_policy(endpoints(40, line))
    assert len(load_policy(endpoints(30, line)).network_policies["a"].endpoints) == 30


def test_overlaps_that_take_too_long_to_look_for_are_refused() -> None:
    line = "access: full, path: '/*a%04d*b/**', allow_encoded_slash: true"
    other = line.replace("true", "false")
    many = endpoints(1000, line) + endpoints(1000, other).partition(b"endpoints:\n")[2]
    with pytest.raises(PolicyError, match=r"too many endpoints of equal specificity|more than 32"):
        load_policy(many)
    apart = endpoints(300, "access: full, path: '/a%04d/**', allow_encoded_slash: true")
    apart += endpoints(300, "access: full, path: '/b%04d/**'").partition(b"endpoints:\n")[2]
    governance = b"schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"
    assert load_members({"policy.yaml": apart, "governance.yaml": governance}).policy.version == 1
