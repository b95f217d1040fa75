"""Every problem points at the place that is wrong, and all that can be known is told in one go."""

from __future__ import annotations

import pytest

from saw.policy.casefile import load_cases
from saw.policy.errors import PolicyError
from saw.policy.loader import MAX_PROBLEMS, load_governance, load_members, load_policy
from saw.policy.reach_invariants import load_invariants

pytestmark = pytest.mark.control("POL-01")

API = """\
version: 1
network_policies:
  api:
    endpoints:
      - host: api.example.com
        port: 443
        protocol: rest
        access: read-only
    binaries: [{path: /usr/bin/curl}]
"""
OWNER = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team}\n"


def told(policy: str, governance: str = OWNER) -> list[tuple[str, int, int, str]]:
    """File, line, column and field of every problem of a bundle."""
    try:
        load_members({"policy.yaml": policy.encode(), "governance.yaml": governance.encode()})
    except PolicyError as error:
        return [(problem.file, problem.line, problem.column, problem.field) for problem in error.problems]
    return []


def reasons(policy: str, governance: str = OWNER) -> str:
    with pytest.raises(PolicyError) as caught:
        load_members({"policy.yaml": policy.encode(), "governance.yaml": governance.encode()})
    return "\n".join(str(problem) for problem in caught.value.problems)


def rule(name: str, endpoint: str, binaries: str = "[{path: /usr/bin/curl}]") -> str:
    return f"  {name}:\n    endpoints:\n      - {{{endpoint}}}\n    binaries: {binaries}\n"


def test_a_good_bundle_has_no_problems() -> None:
    assert told(API) == []


def test_an_overlap_is_told_at_the_field_that_differs() -> None:
    second = rule("b", "host: api.example.com, port: 443, protocol: rest, access: full, enforcement: audit")
    found = told(API + second, OWNER + "allow_audit: true\n")
    assert found == [("policy.yaml", 12, 87, "network_policies.b.endpoints[0].enforcement")]
    # Where the field is not written, the endpoint itself is the place.
    first = rule("a", "host: api.example.com, port: 443, protocol: rest, access: full, enforcement: audit")
    found = told(
        "version: 1\nnetwork_policies:\n" + first + API.partition("network_policies:\n")[2],
        OWNER + "allow_audit: true\n",
    )
    assert found == [("policy.yaml", 9, 9, "network_policies.api.endpoints[0].enforcement")]


def test_a_rule_too_many_is_told_at_its_endpoint() -> None:
    queries = ", ".join(f'{{allow: {{method: GET, path: /v1/{n}, query: {{q: "{n}"}}}}}}' for n in range(33))
    policy = API + rule("many", f"host: q.example.com, port: 443, protocol: rest, rules: [{queries}]")
    assert told(policy) == [("policy.yaml", 12, 9, "network_policies.many.endpoints[0]")]


def test_overlap_and_alike_and_field_errors_are_told_together() -> None:
    queries = ", ".join(f'{{allow: {{method: GET, path: /v1/{n}, query: {{q: "{n}"}}}}}}' for n in range(33))
    policy = (
        API
        + rule("b", "host: api.example.com, port: 443, protocol: rest, access: full, allow_encoded_slash: true")
        + rule("many", f"host: q.example.com, port: 443, protocol: rest, rules: [{queries}]")
        + rule("bad", "host: c.example.com, port: 70000, protocol: rest, access: full, rules: []")
    )
    assert told(policy) == [
        ("policy.yaml", 12, 95, "network_policies.b.endpoints[0].allow_encoded_slash"),
        ("policy.yaml", 16, 9, "network_policies.many.endpoints[0]"),
        ("policy.yaml", 20, 37, "network_policies.bad.endpoints[0].port"),
        ("policy.yaml", 20, 68, "network_policies.bad.endpoints[0].access"),
        ("policy.yaml", 20, 81, "network_policies.bad.endpoints[0].rules"),
    ]


def test_problems_between_the_files_point_into_the_file_that_is_wrong() -> None:
    governance = OWNER + (
        "plaintext: ['old.example.com:80']\n"
        "credentials:\n"
        "  - id: token\n"
        "    ref: 'local:t'\n"
        "    inject: {header: X-Key, format: '{secret}'}\n"
        "    hosts: ['api.example.com:443', 'gone.example.com:443']\n"
    )
    policy = API.replace("access: read-only", "access: read-only\n        enforcement: audit").replace(
        "version: 1\n", "version: 1\nlandlock: {compatibility: best_effort}\n"
    )
    assert told(policy, governance) == [
        ("policy.yaml", 2, 27, "landlock.compatibility"),
        ("policy.yaml", 10, 22, "network_policies.api.endpoints[0].enforcement"),
        ("governance.yaml", 3, 13, "plaintext[0]"),
        ("governance.yaml", 8, 36, "credentials[0].hosts[1]"),
    ]
    allowed = governance.replace(", 'gone.example.com:443'", "").replace("plaintext: ['old.example.com:80']\n", "")
    allowed += "allow_audit: true\nlandlock: {allow_best_effort: true}\n"
    assert told(policy, allowed) == []


def test_an_inference_alias_under_an_endpoint_is_told_at_the_host() -> None:
    route = "inference: {routes: [{alias: m.models.local, models: ['*'], upstream: 'https://m.example.com/v1'}]}\n"
    policy = API + rule("wide", "host: '*.models.local', port: 443, protocol: rest, access: read-only")
    assert told(policy, OWNER + route) == [("policy.yaml", 12, 16, "network_policies.wide.endpoints[0].host")]
    assert told(API, OWNER + route) == []


def test_faults_in_both_files_do_not_hide_what_is_between_them() -> None:
    policy = API.replace("/usr/bin/curl", "curl").replace(
        "access: read-only", "access: read-only\n        enforcement: audit"
    )
    governance = OWNER.replace("1.0.0", "one") + (
        "credentials:\n"
        "  - {id: T, ref: 'local:t', inject: {header: X-Key, format: '{secret}'}, hosts: ['gone.example.com:443']}\n"
    )
    assert told(policy, governance) == [
        ("policy.yaml", 9, 22, "network_policies.api.endpoints[0].enforcement"),
        ("policy.yaml", 10, 23, "network_policies.api.binaries[0].path"),
        ("governance.yaml", 2, 31, "blueprint.version"),
        ("governance.yaml", 4, 10, "credentials[0].id"),
        ("governance.yaml", 4, 82, "credentials[0].hosts[0]"),
    ]


def test_what_cannot_be_known_is_not_told() -> None:
    credential = (
        "credentials:\n"
        "  - {id: t, ref: 'local:t', inject: {header: X-Key, format: '{secret}'}, hosts: ['b.example.com:443']}\n"
    )
    # The host of the second endpoint cannot be read, so it may be the one that the credential names.
    unread = API + rule("b", "host: 'b .example.com', port: 443, protocol: rest, access: read-only")
    assert told(unread, OWNER + credential) == [("policy.yaml", 12, 16, "network_policies.b.endpoints[0].host")]
    # A misspelled field is one mistake, not two.
    assert [field for *_, field in told(API.replace("protocol:", "protocl:"))] == [
        "network_policies.api.endpoints[0].protocl"
    ]
    # An unreadable switch of the other file may well be on.
    audited = API.replace("access: read-only", "access: read-only\n        enforcement: audit")
    assert [field for *_, field in told(audited, OWNER + "allow_audit: maybe\n")] == ["allow_audit"]


def test_checks_of_a_structure_go_on_after_a_bad_field() -> None:
    credentials = (
        "credentials:\n"
        "  - {id: a, ref: nowhere, inject: {header: Host, format: '{secret}'}, hosts: ['api.example.com:443']}\n"
        "  - {id: a, ref: 'local:b', inject: {header: X-Key, format: none}, hosts: ['api.example.com:443']}\n"
        "inference:\n"
        "  routes:\n"
        "    - {alias: i.local, models: [], upstream: 'https://m.example.com', credential: c}\n"
        "    - {alias: I.local, models: ['*'], upstream: 'http://m.example.com', budget: b}\n"
    )
    assert told(API, OWNER + credentials) == [
        ("governance.yaml", 4, 18, "credentials[0].ref"),
        ("governance.yaml", 4, 44, "credentials[0].inject.header"),
        ("governance.yaml", 5, 5, "credentials[1]"),
        ("governance.yaml", 5, 10, "credentials[1].id"),
        ("governance.yaml", 5, 61, "credentials[1].inject.format"),
        ("governance.yaml", 8, 32, "inference.routes[0].models"),
        ("governance.yaml", 8, 83, "inference.routes[0].credential"),
        ("governance.yaml", 9, 15, "inference.routes[1].alias"),
        ("governance.yaml", 9, 49, "inference.routes[1].upstream"),
        ("governance.yaml", 9, 81, "inference.routes[1].budget"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "column", "field"),
    [
        ("port: 443", "ports: [443, 0, 8443]", 6, 22, "ports[1]"),
        ("port: 443", "port: 443\n        allowed_ips: [10.0.0.0/8, 127.0.0.1/32]", 7, 35, "allowed_ips[1]"),
        (
            "access: read-only",
            "rules:\n          - allow:\n              query: {a: '1', b: {any: ['x', '[']}}",
            10,
            46,
            "rules[0].allow.query.b.any[1]",
        ),
    ],
)
def test_an_element_of_a_list_is_told_by_itself(old: str, new: str, line: int, column: int, field: str) -> None:
    assert told(API.replace(old, new)) == [("policy.yaml", line, column, f"network_policies.api.endpoints[0].{field}")]


def test_directories_methods_and_plain_addresses_are_told_one_by_one() -> None:
    policy = API + "filesystem_policy: {read_only: [/usr, etc], read_write: [/home, /, /tmp/*]}\n"
    assert told(policy) == [
        ("policy.yaml", 10, 39, "filesystem_policy.read_only[1]"),
        ("policy.yaml", 10, 65, "filesystem_policy.read_write[1]"),
        ("policy.yaml", 10, 68, "filesystem_policy.read_write[2]"),
    ]
    governance = (
        OWNER
        + "plaintext: ['api.example.com:443', nowhere]\n"
        + "actions: [{match: {host: api.example.com, method: [POST, put]}, class: auto}]\n"
    )
    assert told(API, governance) == [
        ("governance.yaml", 3, 36, "plaintext[1]"),
        ("governance.yaml", 4, 58, "actions[0].match.method[1]"),
    ]


def test_cases_and_invariants_are_told_at_their_place() -> None:
    with pytest.raises(PolicyError) as caught:
        load_cases(
            b"schema: 1\ncases:\n  - {name: x, expect: {verdict: maybe}, tool: {server: a, tool: b}}\n", "t.yaml"
        )
    assert [(p.line, p.column, p.field) for p in caught.value.problems] == [(3, 33, "cases[0].expect.verdict")]
    text = (
        "schema: 1\ninvariants:\n"
        "  - {id: a, kind: never_read, directories: [/etc, usr]}\n"
        "  - {id: a, kind: never_read, hosts: [x.example.com]}\n"
    )
    with pytest.raises(PolicyError) as caught:
        load_invariants(text.encode())
    assert sorted((p.line, p.column, p.field) for p in caught.value.problems) == [
        (3, 51, "invariants[0].directories[1]"),
        (4, 5, "invariants[1].directories"),
        (4, 10, "invariants[1].id"),
        (4, 38, "invariants[1].hosts"),
    ]


def test_the_list_of_problems_is_bounded() -> None:
    many = "".join(rule(f"r{n}", f"host: h{n}.example.com, port: 0, protocol: rest, access: full") for n in range(1500))
    with pytest.raises(PolicyError) as caught:
        load_policy(("version: 1\nnetwork_policies:\n" + many).encode())
    assert len(caught.value.problems) == MAX_PROBLEMS + 1
    assert caught.value.problems[-1].reason == "there are 500 more problems"
    with pytest.raises(PolicyError):
        load_governance(b"schema: 2")
