"""OpenShell's policy file, out and in: it keeps to the public schema, and an import never grants what it did not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.cli.main import main
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Request
from saw.policy.openshell import export
from saw.policy.openshell_import import Imported, import_policy
from saw.policy.reach_diff import diff_bundles
from saw.policy.yamltext import dump, read

ROOT = Path(__file__).parents[3]
FOLDERS = sorted(path.parent for path in (ROOT / "policies").glob("*/policy.yaml"))
CURL = "/usr/bin/curl"

#: Fields of the public schema that both dialects know and that an export may use, by structure.
ENDPOINT = {
    "host", "port", "ports", "path", "protocol", "enforcement", "access", "rules", "deny_rules", "allowed_ips",
    "allow_encoded_slash",
}  # fmt: skip
TOP = {"version", "filesystem_policy", "landlock", "process", "network_policies"}
MATCH = {"method", "path", "query"}


def assert_public(value: dict[str, Any]) -> None:
    """Check the exported values against the public schema as its reference states it."""
    assert set(value) == TOP and value["version"] == 1
    assert set(value["filesystem_policy"]) == {"include_workdir", "read_only", "read_write"}
    assert value["process"] == {"run_as_user": "sandbox", "run_as_group": "sandbox"}
    for rule in value["network_policies"].values():
        assert set(rule) <= {"name", "endpoints", "binaries"}
        assert all(set(binary) == {"path"} for binary in rule["binaries"])
        for endpoint in rule["endpoints"]:
            assert set(endpoint) <= ENDPOINT
            assert ("port" in endpoint) != ("ports" in endpoint) and ("access" in endpoint) != ("rules" in endpoint)
            assert endpoint["enforcement"] in {"enforce", "audit"}, (
                "the default there is audit, so it is always written"
            )
            for match in [r["allow"] for r in endpoint.get("rules", ())] + endpoint.get("deny_rules", []):
                assert set(match) <= MATCH and match["method"] and match["path"]


@pytest.mark.control("INT-01")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_blueprint_is_exported_in_the_public_schema_with_a_report(folder: Path) -> None:
    made = export(load_bundle_folder(folder))
    assert_public(yaml.safe_load(made.text))
    fields = {finding.field for finding in made.findings}
    assert {"governance.blueprint", "governance.lease", "governance.actions"} <= fields
    assert all(finding.reason and finding.cure for finding in made.findings)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_what_is_exported_and_imported_again_grants_no_more(folder: Path) -> None:
    """Every request of the blueprint's own cases: what the bundle refuses for want of a rule stays refused."""
    bundle = load_bundle_folder(folder)
    made = imported(export(bundle).text)
    before, after = Matcher.compile(bundle.policy, bundle.governance), compiled(made)
    cases = yaml.safe_load((folder / "tests.yaml").read_text())["cases"]
    compared = 0
    for case in cases:
        if "request" in case and ".example" in case["request"]["url"]:
            call = case["request"]
            host, _, path = call["url"].removeprefix("https://").partition("/")
            name, _, port = host.partition(":")
            request = Request(
                "https", name, int(port or 443), call.get("method", "GET"), f"/{path}", call.get("binary")
            )
            one, other = before.decide(request), after.decide(request)
            compared += 1
            if not one.allowed:
                assert not other.allowed
            elif request.method == "GET":
                assert other.allowed
    assert compared >= 8


def test_everything_that_governance_says_is_in_the_report(coding: Bundle) -> None:
    text = "\n".join(str(finding) for finding in export(coding).findings)
    for word in ("git-token", "api-token", "model-key", "inference.local", "mcp.files", "refs/heads/agent/**", "lease"):
        assert word in text


def test_a_host_that_openshell_refuses_is_refused_before_a_file_is_written(coding: Bundle) -> None:
    def exported(host: str) -> str:
        tree = read(coding.members["policy.yaml"], "p")
        tree["network_policies"]["notes-api"]["endpoints"].append(
            {"host": host, "port": 8443, "protocol": "rest", "access": "read-only"}
        )
        return export(load_members({**coding.members, "policy.yaml": dump(tree).encode()})).text

    for good in ("*.data.example.com", "*-x.data.example.com", "a.*.data.example.com", "**.data.example.com"):
        assert good in exported(good)
    with pytest.raises(PolicyError, match="OpenShell refuses the host"):
        exported("a.us-*.data.example.com")


# ---------------------------------------------------------------- import


def imported(text: str, **more: Any) -> Imported:
    return import_policy(text.encode(), "in.yaml", name="x", owner="team-x", **more)


def compiled(made: Imported) -> Matcher:
    bundle = load_members(made.files)
    return Matcher.compile(bundle.policy, bundle.governance)


def policy(endpoint: str, *, binaries: str = "[{path: /usr/bin/curl}]", more: str = "", top: str = "") -> str:
    return (
        f"version: 1\n{top}network_policies:\n  one:\n    binaries: {binaries}\n    endpoints:\n"
        f"      - {{host: a.example.com, port: 443, {endpoint}}}\n{more}"
    )


def get(matcher: Matcher, path: str, method: str = "GET", host: str = "a.example.com") -> str:
    decision = matcher.decide(Request("https", host, 443, method, path, CURL))
    return "allow" if decision.allowed or decision.reason == "review_required" else "deny"


def told(made: Imported, effect: str) -> str:
    return "\n".join(f"{finding.field}: {finding.reason}" for finding in made.findings if finding.effect == effect)


REST = "protocol: rest, enforcement: enforce"


@pytest.mark.control("INT-01")
def test_both_dialects_load() -> None:
    old = policy(f"{REST}, tls: terminate, access: read-only", binaries="[{path: /usr/bin/curl, harness: true}]")
    assert imported(old).dialect == "0.0"
    assert get(compiled(imported(old)), "/x") == "allow"
    new = policy(
        f"{REST}, access: read-only",
        more="      - {host: m.example.com, port: 443, protocol: mcp, mcp: {versions: ['2025-11-25']}}\n",
    )
    assert imported(new).dialect == "0.1"
    assert get(compiled(imported(new)), "/x") == "allow"
    assert "m.example.com" not in imported(new).files["policy.yaml"].decode()
    assert "endpoints[1].protocol: a mcp endpoint needs something that it allows" in told(imported(new), "left_out")


def test_defaults_that_are_looser_there_are_told_and_tightened() -> None:
    made = imported(policy("protocol: rest, access: read-only"))
    assert "audit, the default there" in told(made, "narrower") and "best_effort, the default there" in told(
        made, "narrower"
    )
    assert get(compiled(made), "/x", "POST") == "deny" and get(compiled(made), "/x") == "allow"
    assert not load_members(made.files).governance.allow_audit


@pytest.mark.parametrize(
    ("path", "inside", "outside"),
    [
        ("/a/**", "/a/b/c", "/a"),
        ("/a/**/z", "/a/b/c/z", "/a/z"),
        ("/**/info/refs", "/x/info/refs", "/info/refs"),
        ("/a/*/z", "/a/b/z", "/a/b/c/z"),
        ("**", "/anything/at/all", None),
    ],
)
def test_an_allow_pattern_never_grants_more_than_there(path: str, inside: str, outside: str | None) -> None:
    matcher = compiled(imported(policy(f"{REST}, rules: [{{allow: {{method: GET, path: '{path}'}}}}]")))
    assert get(matcher, inside) == "allow"
    assert outside is None or get(matcher, outside) == "deny"


@pytest.mark.parametrize(
    ("path", "denied", "dialect"),
    [
        ("/a/*/z", ["/a/b/z", "/a/b/c/z"], "either"),
        ("/a/*", ["/a/b", "/a/"], "0.1"),
        ("/a/b*/z", ["/a/b1/z", "/a/b1/c/z"], "either"),
        ("**", ["/", "/a"], "either"),
    ],
)
def test_a_deny_pattern_never_denies_less_than_there(path: str, denied: list[str], dialect: Any) -> None:
    text = policy(f"{REST}, access: full, deny_rules: [{{method: '*', path: '{path}'}}]")
    matcher = compiled(imported(text, dialect=dialect))
    assert [get(matcher, item) for item in denied] == ["deny"] * len(denied)
    assert path == "**" or get(matcher, "/other") == "allow"


def test_rules_without_method_or_path_do_not_become_rules_about_everything() -> None:
    both = "rules: [{allow: {method: GET}}, {allow: {path: /x}}, {allow: {method: GET, path: /good}}]"
    made = imported(policy(f"{REST}, {both}"))
    matcher = compiled(made)
    assert get(matcher, "/good") == "allow" and get(matcher, "/x") == "deny" and get(matcher, "/other") == "deny"
    assert told(made, "left_out").count("matches nothing there and everything here") == 2


def test_a_query_glob_that_would_cover_more_here_is_left_out() -> None:
    def rule(value: str) -> str:
        return policy(
            f"{REST}, rules: [{{allow: {{method: GET, path: /x, query: {{v: '{value}'}}}}}}, "
            "{allow: {method: GET, path: /y}}]"
        )

    assert "stops at a dot" in told(imported(rule("1.*")), "left_out")
    assert get(compiled(imported(rule("1.*"))), "/x?v=1.2.3") == "deny"
    assert get(compiled(imported(rule("1.2"))), "/x?v=1.2") == "allow"
    assert get(compiled(imported(rule("**"))), "/x?v=1.2.3") == "allow"
    assert get(compiled(imported(rule("*"))), "/x?v=1.2.3") == "deny"


@pytest.mark.parametrize("dialect", ["0.0", "0.1"])
def test_a_websocket_endpoint_comes_from_there_and_goes_there_as_it_was(dialect: Any) -> None:
    rules = "rules: [{allow: {method: GET, path: '/r/**'}}, {allow: {method: WEBSOCKET_TEXT, path: '/r/**'}}]"
    made = imported(policy(f"protocol: websocket, enforcement: enforce, {rules}"), dialect=dialect)
    assert told(made, "left_out") == told(made, "wider") == ""
    exported = export(load_members(made.files))
    endpoint = read(exported.text.encode(), "x")["network_policies"]["one"]["endpoints"][0]
    assert (endpoint["protocol"], [rule["allow"]["method"] for rule in endpoint["rules"]]) == (
        "websocket",
        ["GET", "WEBSOCKET_TEXT"],
    )
    assert any(finding.effect == "wider" and "plain GET" in finding.reason for finding in exported.findings)
    opening = Request("https", "a.example.com", 443, "GET", "/r/1", CURL, upgrade="websocket")
    assert get(compiled(made), "/r/1") == "deny"
    # Messages are writes, so they wait for an action rule like every other write.
    assert compiled(made).decide(opening).reason == "action_denied"
    read_only = imported(policy("protocol: websocket, enforcement: enforce, access: read-only"), dialect=dialect)
    assert compiled(read_only).decide(opening).frames == "none"


REFUSED_FIELDS = [
    "protocol: tcp",
    "protocol: sql, access: full",
    "protocol: rest, access: full, tls: skip",
    "protocol: rest, access: full, credential_signing: sigv4, signing_service: s3",
    "protocol: rest, access: full, request_body_credential_rewrite: true",
    "protocol: rest, access: full, credential_binding: {provider: p}",
    "protocol: rest, access: full, deny_rules: [{method: GET, path: '/a/?'}]",
    "protocol: rest, access: full, made_up: 1",
    "protocol: rest",
]


@pytest.mark.parametrize("fields", REFUSED_FIELDS)
def test_a_refused_endpoint_is_named_and_its_calls_stay_denied(fields: str) -> None:
    more = f"      - {{host: b.example.com, port: 443, {REST}, access: read-only}}\n"
    made = imported(policy(fields, more=more))
    matcher = compiled(made)
    assert "endpoints[0]" in told(made, "left_out")
    assert get(matcher, "/x") == "deny"
    assert get(matcher, "/x", host="b.example.com") == "allow"


@pytest.mark.control("INT-01")
def test_no_wider_endpoint_takes_over_the_calls_of_one_that_was_left_out() -> None:
    wide = f"      - {{host: '*.a.example.com', port: 443, {REST}, access: full}}\n"
    made = imported(
        policy(
            "path: /admin/**, protocol: sql, access: read-only",
            more=f"      - {{host: a.example.com, port: 443, {REST}, access: full}}\n" + wide,
        )
    )
    matcher = compiled(made)
    assert get(matcher, "/admin/x") == "deny"
    assert "would decide the calls" in told(made, "left_out")
    assert get(matcher, "/admin/x", host="b.a.example.com") == "allow", "another host has nothing to do with it"


def test_an_endpoint_without_rules_left_is_not_taken_over_either() -> None:
    wide = f"      - {{host: a.example.com, port: 443, {REST}, access: full}}\n"
    made = imported(policy(f"path: /admin/x, {REST}, rules: [{{allow: {{path: /admin/x}}}}]", more=wide))
    assert get(compiled(made), "/admin/x") == "deny"


PIECES = st.fixed_dictionaries(
    {},
    optional={
        "host": st.sampled_from(["a.example.com", "*.example.com", "*", "10.0.0.1", 5]),
        "port": st.sampled_from([443, 0, "443"]),
        "ports": st.sampled_from([[443, 8443], [], [0]]),
        "path": st.sampled_from(["", "/a/**", "/a/*", "**", "a", 3]),
        "protocol": st.sampled_from(["rest", "REST", "tcp", "mcp", "graphql", "json-rpc", "", 1]),
        "tls": st.sampled_from(["skip", "terminate", "passthrough"]),
        "enforcement": st.sampled_from(["enforce", "audit", "other"]),
        "access": st.sampled_from(["read-only", "full", "all"]),
        "rules": st.sampled_from(
            [[], [1], [{"allow": {"method": "GET", "path": "/a/**/b"}}], [{"allow": {"path": "/x"}}, {"deny": {}}]]
        ),
        "deny_rules": st.sampled_from([[], ["x"], [{"method": "GET", "path": "/a/*"}], [{"path": "/a/?"}]]),
        "allowed_ips": st.sampled_from([["10.0.0.0/8"], ["127.0.0.0/8"], "10.0.0.0/8"]),
        "mcp": st.just({"versions": ["x"]}),
        "zz": st.just(1),
    },
)
RULES = st.dictionaries(
    st.sampled_from(["a", "b.c", "b", "_provider_x", "with space"]),
    st.fixed_dictionaries(
        {"endpoints": st.lists(PIECES, max_size=4)},
        optional={
            "binaries": st.sampled_from([[], ["/usr/bin/curl"], [{"path": "/usr/bin/curl", "harness": True}], [{}]])
        },
    ),
    max_size=3,
)


@settings(max_examples=examples(200), deadline=None)
@given(RULES)
def test_any_network_policy_is_imported_with_findings_or_refused_with_a_reason(rules: dict[str, Any]) -> None:
    raw = dump({"version": 1, "network_policies": rules}).encode()
    try:
        made = import_policy(raw, "in.yaml", name="x", owner="team-x")
    except PolicyError as error:
        assert error.problems
        return
    policy = load_members(made.files).policy
    kept = sum(len(rule.endpoints) for rule in policy.network_policies.values())
    given_endpoints = sum(len(rule["endpoints"]) for rule in rules.values())
    assert kept >= given_endpoints or told(made, "left_out"), "nothing goes without a word"


def test_a_program_that_was_left_out_does_not_fall_to_a_wider_rule() -> None:
    other = (
        "  two:\n    binaries: [{path: /usr/bin/curl}]\n"
        f"    endpoints: [{{host: a.example.com, port: 443, {REST}, access: full}}]\n"
    )
    made = imported(
        policy(
            f"path: /admin/x, {REST}, access: read-only",
            binaries="[{path: '/usr/bin/cur?'}, {path: /usr/bin/wget}]",
            more=other,
        )
    )
    assert get(compiled(made), "/admin/x", "DELETE") == "deny"
    assert "binaries[0]" in told(made, "left_out")


def test_what_went_through_a_middleware_does_not_pass_without_it() -> None:
    middleware = (
        "network_middlewares: {guard: {middleware: openshell/regex, endpoints: {include: ['*.example.com']}}}\n"
    )
    made = imported(policy(f"{REST}, access: read-only", top=middleware))
    assert "network_middlewares.guard" in told(made, "lost") and get(compiled(made), "/x") == "deny"
    elsewhere = middleware.replace("*.example.com", "*.example.org")
    assert get(compiled(imported(policy(f"{REST}, access: read-only", top=elsewhere))), "/x") == "allow"


def test_an_endpoint_path_selects_the_same_calls() -> None:
    made = imported(policy(f"path: /v1/**, {REST}, access: read-only"))
    matcher = compiled(made)
    assert [get(matcher, path) for path in ("/v1", "/v1/x", "/v2")] == ["allow", "allow", "deny"]
    assert get(compiled(imported(policy(f"path: /v*/x, {REST}, access: read-only"))), "/v1/x") == "deny"


@pytest.mark.parametrize(
    "text", ["version: 2\n", "version: 1\nnetwork_policies: [1]\n", "a: &x 1\n", "version: 1\nversion: 1\n"]
)
def test_what_is_no_policy_is_refused_whole(text: str) -> None:
    with pytest.raises(PolicyError):
        imported(text)


def test_every_field_of_the_file_is_carried_or_named() -> None:
    """A field that nobody knows, at every level, is in the findings or in the result."""
    places = {
        "top": "zz: 1\n" + policy(f"{REST}, access: read-only"),
        "landlock": "landlock: {zz: 1}\n" + policy(f"{REST}, access: read-only"),
        "process": "process: {zz: 1}\n" + policy(f"{REST}, access: read-only"),
        "endpoint": policy(f"{REST}, access: read-only, zz: 1"),
        "match": policy(f"{REST}, rules: [{{allow: {{method: GET, path: /x, zz: 1}}}}]"),
        "deny": policy(f"{REST}, access: full, deny_rules: [{{method: GET, path: /x, zz: 1}}]"),
        "binary": policy(f"{REST}, access: read-only", binaries="[{path: /usr/bin/curl, zz: 1}]"),
    }
    for place, text in places.items():
        assert "zz" in told(imported(text), "left_out"), place


# ---------------------------------------------------------------- the commands


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    code = main(["policy", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_export_and_import_as_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "coding.yaml", tmp_path / "again"
    code, answer = run(capsys, "export", ROOT / "policies/coding", "--openshell", file)
    assert code == 0 and answer["counts"]["wider"] > 0 and answer["counts"]["left_out"] == 4
    code, answer = run(capsys, "import", file, "--out", out, "--owner", "team-x")
    assert code == 0 and answer["counts"]["left_out"] == 0
    assert run(capsys, "check", out)[0] == 0 and run(capsys, "test", out)[0] == 0
    assert load_bundle_folder(out).governance.blueprint.owner == "team-x"
    code, answer = run(capsys, "import", file, "--out", out, "--owner", "team-x")
    assert code == 1 and "exists already" in answer["error"]["message"]


def test_an_import_that_loses_something_says_so_in_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.yaml").write_text(policy("protocol: tcp"))
    code, answer = run(
        capsys, "import", tmp_path / "in.yaml", "--out", tmp_path / "o", "--owner", "team-x", "--dialect", "0.1"
    )
    assert code == 1 and not answer["ok"] and answer["counts"]["left_out"] == 2
    assert json.loads((tmp_path / "o/import.json").read_text())["findings"] == answer["findings"]


SPOKEN = [
    "graphql, access: read-write, deny_rules: [{operation_type: mutation, fields: ['delete*']}]",
    "graphql, graphql_max_body_bytes: 2048, rules: [{allow: {operation_type: query, operation_name: 'A*', fields: [a]}}]",
    "json-rpc, json_rpc: {max_body_bytes: 2048}, rules: [{allow: {method: reports.list}}, {allow: {method: '*'}}]",
    "mcp, mcp: {allow_all_known_mcp_methods: true}, rules: [{allow: {tool: 'a*'}}], deny_rules: [{tool: {any: [ab]}}]",
    "mcp, rules: [{allow: {method: tools/call, params: {name: a}}}, {allow: {method: initialize}}]",
]


@pytest.mark.control("INT-01")
@pytest.mark.parametrize("fields", SPOKEN)
def test_endpoints_that_look_into_bodies_go_there_and_come_back_as_they_were(fields: str) -> None:
    made = imported(policy(f"protocol: {fields}, enforcement: enforce"))
    bundle = load_members(made.files)
    before = bundle.policy.network_policies["one"].endpoints[0]
    exported = export(bundle)
    back = load_members(imported(exported.text).files)
    assert not diff_bundles(bundle, back).gained and not diff_bundles(back, bundle).gained
    assert back.policy.network_policies["one"].endpoints[0].protocol == before.protocol
    if before.protocol in {"graphql", "mcp"}:
        assert any(f.effect == "wider" and f.field.endswith(".protocol") for f in exported.findings)


@pytest.mark.parametrize(
    ("protocol", "without", "good", "told_of"),
    [
        ("json-rpc", "{}", "{method: a}", "it names no method"),
        ("graphql", "{fields: [a]}", "{operation_type: query}", "names the type of operation"),
        ("graphql", "{operation_type: query, fields: ['a?']}", "{operation_type: query}", "wildcards"),
        ("mcp", "{tool: a}", "{method: ping}", "names its method"),
    ],
)
def test_a_rule_that_means_nothing_there_grants_nothing_here(
    protocol: str, without: str, good: str, told_of: str
) -> None:
    rules = f"rules: [{{allow: {without}}}, {{allow: {good}}}]"
    made = imported(policy(f"protocol: {protocol}, {rules}, enforcement: enforce"))
    assert len(load_members(made.files).policy.network_policies["one"].endpoints[0].rules or ()) == 1
    assert told_of in told(made, "left_out")


def test_a_deny_rule_that_cannot_be_read_takes_its_endpoint_along() -> None:
    more = f"      - {{host: b.example.com, port: 443, {REST}, access: read-only}}\n"
    denied = "deny_rules: [{operation_type: '*', fields: ['a?']}]"
    made = imported(policy(f"protocol: graphql, access: full, {denied}", more=more))
    assert [e.host for e in load_members(made.files).policy.network_policies["one"].endpoints] == ["b.example.com"]
