"""What one policy decision and one policy load cost in the matcher of both rings.

Policies: the example blueprint (``policies/coding``), made ones of 100 and 1,000 endpoints, and rule sets that an adversary
would write. Compared in the same run with one endpoint, with a plain loop over the rules (what a first version would be), with
one regular expression of :mod:`re` that joins the rules of one host, and with the Cedar engine (``cedarpy``, everything parsed
beforehand) on equivalent rules. Cedar's ``like`` knows one wildcard that crosses slashes, and it neither makes a path
canonical nor says which rule would have allowed a refused call, so it does less than the matcher for each decision.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import msgspec

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent)]

import cedarpy  # noqa: E402 - after the path
from results import Goal, Result, fastest, quantile, result  # noqa: E402 - the module beside this one

from saw.policy import globs  # noqa: E402
from saw.policy.loader import (  # noqa: E402
    MAX_ALIKE,
    Bundle,
    load_bundle_folder,
    load_members,
)
from saw.policy.matcher import Matcher  # noqa: E402
from saw.policy.model import Policy, Request  # noqa: E402

GOVERNANCE = b"schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n"
LARGE = 100
HUGE = 1000
HUGE_RULES = 5
RULES = (("GET", "/v1/*/items/**"), ("GET", "/v2/**"), ("POST", "/v1/notes"))


def policy(endpoints: int, rules: int = len(RULES)) -> bytes:
    """Return a policy of so many endpoints, each with so many rules."""
    written = [*RULES, *(("GET", f"/v{n}/**") for n in range(len(RULES), rules))][:rules]
    lines = ["version: 1", "network_policies:"]
    for number in range(endpoints):
        lines += [
            f"  p{number}:",
            "    endpoints:",
            f"      - host: api{number}.example.com",
            "        port: 443",
            "        protocol: rest",
            "        rules:",
            *(f'          - allow: {{method: {m}, path: "{p}"}}' for m, p in written),
            "    binaries: [{path: /usr/bin/curl}]",
        ]
    return "\n".join(lines).encode()


def one_by_one(count: int, host: str, fields: str, binary: str = "/usr/bin/curl") -> str:
    """Return that many network rules with one endpoint each; ``@`` in the arguments is the number."""
    endpoint = f'{{host: "{host}", port: 443, protocol: rest, {fields}}}'
    line = f'  p@: {{endpoints: [{endpoint}], binaries: [{{path: "{binary}"}}]}}\n'
    return "".join(line.replace("@", f"{number:04}") for number in range(count))


API = "api.example.com"
LONG = "/v1/things/12345/items/abcdef/xyz?page=1&size=50"
FULL = "access: full"
GET = "rules: [{allow: {method: GET, "
ACTIONS = [f'{{match: {{host: "**.example.com", path: "/**/x{n}"}}, class: auto}}' for n in range(HUGE)]
OTHERS = one_by_one(HUGE - MAX_ALIKE, "h@.example.com", FULL).replace("  p", "  q")
ADVERSARIAL: dict[str, tuple[str, str, tuple[tuple[str, str, str], ...]]] = {
    # name: network rules, governance, calls (host, path, binary); of each the last endpoint and none would match
    "paths with one beginning": (
        one_by_one(HUGE, API, f"path: /v1/things/@/**, {FULL}"),
        "",
        ((API, "/v1/things/0999/a", ""), (API, LONG, "")),
    ),
    "paths that begin with **": (
        one_by_one(HUGE, API, f"path: /**/x@, {FULL}"),
        "",
        ((API, "/a/b/c/d/x0999", ""), (API, LONG, "")),
    ),
    "paths with * in a segment": (
        one_by_one(HUGE, API, f'path: "/v1/*t@s/**", {FULL}'),
        "",
        ((API, "/v1/zt0999s/a", ""), (API, LONG, "")),
    ),
    "hosts with * in a label": (
        one_by_one(HUGE, "*a@*.example.com", FULL),
        "",
        (("xa0999x.example.com", LONG, ""), ("xxxxxxx.example.com", LONG, "")),
    ),
    "one endpoint, other executables": (
        one_by_one(HUGE, API, FULL, "/usr/bin/b@"),
        "",
        ((API, LONG, "/usr/bin/b0999"), (API, LONG, "/usr/bin/x")),
    ),
    "one endpoint, globs of executables": (
        one_by_one(HUGE, API, FULL, "/**/b@"),
        "",
        ((API, LONG, "/usr/bin/b0999"), (API, LONG, "/usr/bin/x")),
    ),
    "one endpoint, one rule each": (
        one_by_one(HUGE, API, f"{GET}path: /v1/*/@/**}}}}]"),
        "",
        ((API, "/v1/a/0999/b", ""), (API, LONG, "")),
    ),
    "one endpoint, one deny rule each": (
        one_by_one(HUGE, API, f"{FULL}, deny_rules: [{{method: GET, path: /v1/*/@/**}}]"),
        "",
        ((API, "/v1/a/0999/b", ""), (API, LONG, "")),
    ),
    "as many queries as load": (
        one_by_one(MAX_ALIKE, API, f'{GET}query: {{page: "*@"}}}}}}]') + OTHERS,
        "",
        ((API, "/v1?page=0031", ""), (API, LONG, "")),
    ),
    "as many alike globs as load": (
        one_by_one(MAX_ALIKE, API, f'path: "/*abcdefgh*@*/**", {FULL}') + OTHERS,
        "",
        ((API, "/abcdefgh-0031-/a", ""), (API, "/abcdefghabcdefghabcdefgh/items/1", "")),
    ),
    "a thousand action rules": (
        one_by_one(HUGE, "api@.example.com", FULL),
        f"actions: [{', '.join(ACTIONS)}]\n",
        (("api0999.example.com", "/a/b/x999", ""), ("api0001.example.com", LONG, "")),
    ),
}


def made_of(rules: str, governance: str = "") -> Bundle:
    """Return a bundle of these network rules."""
    members = {
        "policy.yaml": f"version: 1\nnetwork_policies:\n{rules}".encode(),
        "governance.yaml": GOVERNANCE + governance.encode(),
    }
    return load_members(members)


def adversarial(rounds: int) -> tuple[float, str]:
    """Return the seconds of the slowest decision (median of ``rounds``) over the adversarial rule sets, and which it was."""
    worst, name = 0.0, ""
    for title, (rules, governance, calls) in ADVERSARIAL.items():
        loaded = made_of(rules, governance)
        made = Matcher.compile(loaded.policy, loaded.governance)
        for host, path, binary in calls:
            asked = Request(
                scheme="https", host=host, port=443, method="GET", path=path, binary=binary or "/usr/bin/curl"
            )
            times = []
            for _ in range(rounds):
                start = perf_counter()
                made.decide(asked)
                times.append(perf_counter() - start)
            if (middle := quantile(times, 0.5)) > worst:
                worst, name = middle, f"{title}, {path}"
    return worst, name


def cedar(policy_file: Policy) -> Callable[[Request], bool]:
    """Return a decision function of the Cedar engine with one ``permit`` for each rule and executable of ``policy_file``."""
    permits = []
    for rule in policy_file.network_policies.values():
        for endpoint in rule.endpoints:
            for binary in rule.binaries:
                for one in endpoint.rules or ():
                    path = re.sub(r"\*+", "*", one.allow.path)
                    permits.append(
                        f'permit(principal == Program::"{binary.path}", action == Action::"{one.allow.method}", '
                        f'resource == Address::"{endpoint.host}:{endpoint.port}") when {{ context.path like "{path}" }};'
                    )
    policies = cedarpy.PolicySet.from_str("\n".join(permits))
    entities = cedarpy.Entities.from_json_str("[]")

    def decide(asked: Request) -> bool:
        question = {
            "principal": {"type": "Program", "id": asked.binary},
            "action": {"type": "Action", "id": asked.method},
            "resource": {"type": "Address", "id": f"{asked.host}:{asked.port}"},
            "context": {"path": asked.path.partition("?")[0]},
        }
        return bool(cedarpy.is_authorized(question, policies, entities).allowed)

    return decide


def naive(policy_file: Policy, asked: Request) -> bool:
    """Decide by a loop over compiled rules: no index, no explanation, no canonical form."""
    path = asked.path.partition("?")[0]
    for rule in policy_file.network_policies.values():
        if asked.binary not in [binary.path for binary in rule.binaries]:
            continue
        for endpoint in rule.endpoints:
            if endpoint.port == asked.port and globs.host_glob(endpoint.host).fullmatch(asked.host):
                for allowed in endpoint.rules or ():
                    if allowed.allow.method == asked.method and globs.path_glob(allowed.allow.path).match(path):
                        return True
    return False


def measure(seconds: float) -> list[Result]:
    """Measure each figure for ``seconds``."""
    compiled = {}
    for count in (1, LARGE):
        large_bundle = bundle = load_members({"policy.yaml": policy(count), "governance.yaml": GOVERNANCE})
        compiled[count] = Matcher.compile(bundle.policy, bundle.governance)
    call = Request(
        scheme="https", host="api0.example.com", port=443, method="GET", path="/v2/a/b/c?d=e", binary="/usr/bin/curl"
    )
    stranger = Request(
        scheme="https", host="unlisted.example.com", port=443, method="GET", path="/v2/a", binary="/usr/bin/curl"
    )
    for made in compiled.values():
        assert made.decide(call).verdict == "allow"
        assert made.decide(stranger).reason == "host_not_allowed"
    folder = ROOT / "policies" / "coding"
    loads = []
    for _ in range(max(5, int(seconds * 10))):
        start = perf_counter()
        loaded = load_bundle_folder(folder)
        Matcher.compile(loaded.policy, loaded.governance)
        loads.append(perf_counter() - start)
    one, many = compiled[1], compiled[LARGE]
    huge_bundle = load_members({"policy.yaml": policy(HUGE, HUGE_RULES), "governance.yaml": GOVERNANCE})
    huge = Matcher.compile(huge_bundle.policy, huge_bundle.governance)
    last = Request(
        scheme="https",
        host=f"api{HUGE - 1}.example.com",
        port=443,
        method="GET",
        path="/v4/a/b/c?d=e",
        binary="/usr/bin/curl",
    )
    crowd = made_of(one_by_one(HUGE, API, f"{GET}path: /v1/*/@/**}}}}]"))
    crowded = Matcher.compile(crowd.policy, crowd.governance)
    at_last = Request(
        scheme="https", host=API, port=443, method="GET", path=f"/v1/a/{HUGE - 1:04}/b", binary="/usr/bin/curl"
    )
    joined = re.compile("|".join(globs.path_glob(f"/v1/*/{number:04}/**").pattern for number in range(HUGE)))
    cedar_large, cedar_huge = cedar(large_bundle.policy), cedar(huge_bundle.policy)
    cedar_crowd = cedar(crowd.policy)
    assert cedar_large(call) and not cedar_large(stranger) and cedar_huge(last) and cedar_crowd(at_last)
    assert not cedar_huge(msgspec.structs.replace(last, binary="/usr/bin/wget"))
    assert huge.decide(last).allowed and naive(huge_bundle.policy, last)
    assert crowded.decide(at_last).allowed and naive(crowd.policy, at_last) and joined.match(at_last.path)
    kinds: list[Callable[[], object]] = [
        lambda: one.decide(call),
        lambda: many.decide(call),
        lambda: many.decide(stranger),
        lambda: huge.decide(last),
        lambda: crowded.decide(at_last),
        lambda: joined.match(at_last.path),
    ]
    small, large, refused, in_huge, in_crowd, by_re = fastest(kinds, seconds)
    loop_huge, loop_crowd = fastest(
        [lambda: naive(huge_bundle.policy, last), lambda: naive(crowd.policy, at_last)], seconds / 2
    )
    by_cedar, by_cedar_huge, by_cedar_crowd = fastest(
        [lambda: cedar_large(call), lambda: cedar_huge(last), lambda: cedar_crowd(at_last)], seconds
    )
    typical = []
    for _ in range(max(2000, int(seconds * 10_000))):
        start = perf_counter()
        many.decide(call)
        typical.append(perf_counter() - start)
    big_loads = []
    for _ in range(max(5, int(seconds * 5))):
        start = perf_counter()
        big = load_members({"policy.yaml": policy(LARGE), "governance.yaml": GOVERNANCE})
        Matcher.compile(big.policy, big.governance)
        big_loads.append(perf_counter() - start)
    worst, worst_name = adversarial(max(50, int(seconds * 200)))
    size = f"{LARGE} endpoints, {LARGE * len(RULES)} rules"
    return [
        result(
            "decision_allowed", large * 1e6, "us", baseline=small * 1e6, note=f"{size}; baseline: 1 endpoint, 3 rules"
        ),
        result("decision_refused", refused * 1e6, "us", note=f"{size}; host not in the policy, with its explanation"),
        result("policy_load_coding", quantile(loads, 0.5) * 1e3, "ms", note="policies/coding: parse, check, compile"),
        result("policy_load_large", quantile(big_loads, 0.5) * 1e3, "ms", goal=Goal("value", "most", 50), note=size),
        result(
            "decision_p50",
            quantile(typical, 0.5) * 1e6,
            "us",
            goal=Goal("value", "most", 10),
            note=f"{size}; each one timed",
        ),
        result(
            "decision_5000_rules",
            in_huge * 1e6,
            "us",
            baseline=loop_huge * 1e6,
            goal=Goal("value", "most", 20),
            note=f"{HUGE} endpoints, {HUGE * HUGE_RULES} rules; baseline: a loop over the rules",
        ),
        *(
            result(
                f"decision_over_cedar_{name}",
                ours * 1e6,
                "us",
                baseline=theirs * 1e6,
                goal=Goal("ratio", "most", 1),
                note=f"{what}; baseline: the Cedar engine on equivalent rules, parsed beforehand",
            )
            for name, what, ours, theirs in (
                ("100", size, large, by_cedar),
                ("5000_rules", f"{HUGE} endpoints, {HUGE * HUGE_RULES} rules", in_huge, by_cedar_huge),
                ("one_address", f"{HUGE} rules at one host", in_crowd, by_cedar_crowd),
            )
        ),
        result(
            "decision_one_address",
            in_crowd * 1e6,
            "us",
            baseline=loop_crowd * 1e6,
            note=f"{HUGE} rules at one host; baseline: a loop over the rules",
        ),
        result(
            "decision_one_address_re",
            in_crowd * 1e6,
            "us",
            baseline=by_re * 1e6,
            note="the same; baseline: one expression of re for the paths alone, which cannot tell which rules match",
        ),
        result(
            "decision_worst",
            worst * 1e6,
            "us",
            goal=Goal("value", "most", 50),
            note=f"slowest of all sets: {worst_name}",
        ),
    ]
