"""A bundle under OpenShell as the runtime: its SDK's messages carry it, and each part that they cannot say has a holder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from google.protobuf import json_format
from hypothesis import example, given, settings
from hypothesis import strategies as st
from openshell._proto import sandbox_pb2

from examples import examples
from saw.cli.main import main
from saw.errors import ConfigError
from saw.policy.errors import PolicyError
from saw.policy.governance import Governance
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.matcher import Matcher
from saw.policy.model import Request
from saw.policy.openshell import export
from saw.policy.openshell_message import message, value
from saw.policy.openshell_runtime import GOVERNANCE_HOLDERS, SUPERVISOR, plan
from saw.policy.yamltext import dump, read

ROOT = Path(__file__).parents[3]
FOLDERS = sorted(path.parent for path in (ROOT / "policies").glob("*/policy.yaml"))
GOVERNANCE = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team-x}\n"
pytestmark = pytest.mark.control("INT-01")


def with_supervisor(bundle: Bundle) -> Bundle:
    tree = read(bundle.members["policy.yaml"], "p")
    for rule in tree["network_policies"].values():
        rule["binaries"] = [*rule["binaries"], {"path": SUPERVISOR}]
    return load_members({**bundle.members, "policy.yaml": dump(tree).encode()})


def unheld(bundle: Bundle) -> list[str]:
    """Return what has to be accepted before OpenShell can run the bundle."""
    with pytest.raises(PolicyError) as caught:
        plan(bundle)
    return [problem.field for problem in caught.value.problems if problem.field.startswith("governance.")]


def told(made: dict[str, Any]) -> dict[str, Any]:
    """Send a message through the SDK's own classes and the wire, and return what arrives."""
    sent = json_format.ParseDict(made, sandbox_pb2.SandboxPolicy())
    arrived = sandbox_pb2.SandboxPolicy.FromString(sent.SerializeToString())
    assert arrived == sent
    return json_format.MessageToDict(arrived, preserving_proto_field_name=True)


def bundle_of(endpoints: str) -> Bundle:
    text = f"version: 1\nnetwork_policies:\n  one:\n    binaries: [{{path: {SUPERVISOR}}}]\n    endpoints:\n{endpoints}"
    return load_members({"policy.yaml": text.encode(), "governance.yaml": GOVERNANCE.encode()})


# ---------------------------------------------------------------- the message


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_blueprint_goes_through_the_messages_of_the_sdk_and_comes_back_equal(folder: Path) -> None:
    bundle = with_supervisor(load_bundle_folder(folder))
    made = plan(bundle, accept=unheld(bundle))
    assert made.message["network_policies"].keys() == bundle.policy.network_policies.keys()
    assert value(told(made.message)) == yaml.safe_load(made.text)


@pytest.mark.parametrize(
    "fields",
    [
        "protocol: rest, access: read-write, deny_rules: [{method: GET, path: /a/*, query: {v: {any: [a, 'b*']}}}]",
        "protocol: rest, rules: [{allow: {method: GET, path: '/**', query: {v: 'b*'}}}], allow_encoded_slash: true",
        "protocol: rest, access: full, allowed_ips: [10.1.0.0/16], path: /v1/a",
        "protocol: websocket, rules: [{allow: {method: WEBSOCKET_TEXT, path: /r}}]",
        "protocol: graphql, rules: [{allow: {operation_type: query, operation_name: 'A*', fields: [a]}}]",
        "protocol: json-rpc, json_rpc: {max_body_bytes: 2048}, rules: [{allow: {method: reports.list}}]",
        "protocol: mcp, mcp: {versions: ['2025-11-25'], strict_tool_names: false}, rules: [{allow: {method: tools/list}}]",
        "protocol: mcp, rules: [{allow: {method: tools/call, tool: {any: [a, b]}}}], deny_rules: [{method: tools/call, tool: c}]",
    ],
)
def test_every_kind_of_endpoint_has_its_place_in_the_message(fields: str) -> None:
    bundle = bundle_of(f"      - {{host: a.example.com, ports: [443, 8443], {fields}}}\n")
    made = plan(bundle, accept=["governance.persistence"])
    assert value(told(made.message)) == yaml.safe_load(made.text)
    if "versions" in fields:
        assert "mcp.versions" not in json.dumps([one.field for one in made.held]), "0.1.x has a field for it"
        assert "mcp.versions" in json.dumps([one.field for one in export(bundle).findings])


def test_what_the_file_says_and_no_field_takes_is_never_dropped() -> None:
    made = export(bundle_of("      - {host: a.example.com, port: 443, protocol: rest, access: full}\n")).value
    assert message(made)["version"] == 1
    for steps in ((), ("network_policies", "one", "endpoints", 0)):
        changed = json.loads(json.dumps(made))
        place = changed
        for step in steps:
            place = place[step]
        place["new_field"] = True
        with pytest.raises(KeyError, match="new_field"):
            message(changed)


def test_a_policy_that_states_what_ours_never_does_is_not_taken_for_ours() -> None:
    made = message(export(bundle_of("      - {host: a.example.com, port: 443, protocol: rest, access: full}\n")).value)
    assert value(told(made))["network_policies"]["one"]["endpoints"][0]["access"] == "full"
    changed = json.loads(json.dumps(made))
    changed["network_policies"]["one"]["endpoints"][0]["allow_uninspected_credentials"] = True
    with pytest.raises(PolicyError, match="allow_uninspected_credentials"):
        value(told(changed))
    with pytest.raises(PolicyError, match="network_middlewares"):
        value(told({**made, "network_middlewares": {"m": {"middleware": "x"}}}))


# ---------------------------------------------------------------- who holds the rest


def test_every_field_of_governance_has_a_holder() -> None:
    assert set(GOVERNANCE_HOLDERS) == {field.name for field in msgspec.structs.fields(Governance)}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_part_of_governance_that_is_set_is_in_the_report(folder: Path) -> None:
    bundle = with_supervisor(load_bundle_folder(folder))
    made = plan(bundle, accept=unheld(bundle))
    fields = [one.field for one in made.held]
    for field in msgspec.structs.fields(Governance):
        said = getattr(bundle.governance, field.name)
        default = field.default if field.default is not msgspec.NODEFAULT else msgspec.NODEFAULT
        where = tuple(f"governance.{field.name}{end}" for end in (".", "["))
        named = any(one == f"governance.{field.name}" or one.startswith(where) for one in fields)
        assert field.name == "schema" or named or said == default, field.name
    for route in bundle.governance.inference.routes:
        assert f"governance.inference.{route.alias}" in fields
    assert all(one.reason and one.cure for one in made.held)


def test_what_nobody_holds_stops_the_plan_until_it_is_accepted_by_name(coding: Bundle) -> None:
    bundle = with_supervisor(coding)
    assert unheld(bundle) == ["governance.persistence", "governance.mcp.files"]
    with pytest.raises(PolicyError, match=r"governance\.mcp\.files") as caught:
        plan(bundle, accept=["governance.persistence"])
    assert len(caught.value.problems) == 1
    made = plan(bundle, accept=["governance.persistence", "governance.mcp.files"])
    by = {one.field: one.by for one in made.held}
    assert (by["governance.lease"], by["governance.credentials.git-token"]) == ("ring 2", "ring 2")
    assert (by["governance.mcp.files"], by["governance.landlock.minimum_abi"]) == ("nobody", "handover")
    assert by["network_policies.*.binaries"] == "openshell"


def test_a_rule_that_does_not_name_the_supervisor_is_refused(coding: Bundle) -> None:
    accept = ["governance.persistence", "governance.mcp.files"]
    with pytest.raises(PolicyError, match="ring 1 would refuse") as caught:
        plan(coding, accept=accept)
    assert [problem.field for problem in caught.value.problems] == [
        f"network_policies.{key}.binaries" for key in coding.policy.network_policies
    ]
    assert plan(with_supervisor(coding), accept=accept)
    with pytest.raises(PolicyError, match="/opt/other"):
        plan(with_supervisor(coding), accept=accept, supervisor="/opt/other")


# ---------------------------------------------------------------- never more than the bundle

SEGMENT = st.sampled_from(["a", "b", "ab", "*", "a*", "**"])
PATHS = st.lists(SEGMENT, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))
MATCHES = st.fixed_dictionaries(
    {"method": st.sampled_from(["GET", "POST", "*"]), "path": PATHS},
    optional={"query": st.sampled_from([{"v": "a"}, {"v": "a*"}, {"v": {"any": ["a", "b"]}}])},
)
ENDPOINTS = st.one_of(
    st.fixed_dictionaries({"access": st.sampled_from(["read-only", "read-write", "full"])}),
    st.fixed_dictionaries({"rules": st.lists(MATCHES.map(lambda match: {"allow": match}), min_size=1, max_size=3)}),
).flatmap(
    lambda base: st.fixed_dictionaries(
        {key: st.just(found) for key, found in base.items()},
        optional={"deny_rules": st.lists(MATCHES, min_size=1, max_size=2)},
    )
)
CALLS = st.tuples(
    st.sampled_from(["GET", "HEAD", "POST", "DELETE"]),
    st.lists(st.sampled_from(["a", "b", "ab", "c"]), max_size=4).map(lambda parts: "/" + "/".join(parts)),
    st.sampled_from(["", "?v=a", "?v=a.b", "?v=b", "?v=a&v=c", "?w=a"]),
)
PRESETS = {"READ_ONLY": {"GET", "HEAD", "OPTIONS"}, "READ_WRITE": {"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH"}}


def openshell_allows(endpoint: dict[str, Any], method: str, path: str, query: str) -> bool:
    """Decide a REST call as the schema reference of 0.1.x states it: ``*`` inside a segment, ``**`` one or more segments."""
    given_values: dict[str, list[str]] = {}
    for pair in filter(None, query.removeprefix("?").split("&")):
        given_values.setdefault(pair.split("=")[0], []).append(pair.split("=")[1])

    def glob(text: str, run: str) -> re.Pattern[str]:
        return re.compile(re.escape(text).replace(r"\*\*", ".+").replace(r"\*", run))

    def matches(rule: dict[str, Any], every: Callable[[Any], bool]) -> bool:
        if rule.get("method", "") not in {"*", method}:
            return False
        if rule["path"] != "**" and not glob(rule["path"], "[^/]*").fullmatch(path):
            return False
        for key, matcher in rule.get("query", {}).items():
            globs = [glob(text, "[^.]*") for text in matcher.get("any") or [matcher["glob"]]]
            if not given_values.get(key) or not every(any(g.fullmatch(v) for g in globs) for v in given_values[key]):
                return False
        return True

    if any(matches(rule, any) for rule in endpoint.get("deny_rules", [])):
        return False
    preset = endpoint.get("access", "").removeprefix("NETWORK_ACCESS_PRESET_")
    if preset:
        return method in PRESETS.get(preset, {method})
    return any(matches(rule["allow"], all) for rule in endpoint["rules"])


@settings(max_examples=examples(150), deadline=None)
@given(ENDPOINTS, st.lists(CALLS, min_size=1, max_size=12))
@example({"access": "full", "deny_rules": [{"method": "GET", "path": "/a"}]}, [("HEAD", "/a", "")])
def test_openshell_allows_no_call_that_the_bundle_refuses_but_where_the_report_says_so(
    endpoint: dict[str, Any], calls: list[tuple[str, str, str]]
) -> None:
    whole = {"host": "a.example.com", "port": 443, "protocol": "rest", "enforcement": "enforce", **endpoint}
    try:
        bundle = bundle_of(f"      - {json.dumps(whole)}\n")
        matcher = Matcher.compile(bundle.policy, bundle.governance)
    except PolicyError:
        return
    made = plan(bundle, accept=["governance.persistence"])
    wider = [one for one in made.held if one.by == "ring 2" and one.field.startswith("network_policies.one.endpoints")]
    there = told(made.message)["network_policies"]["one"]["endpoints"][0]
    for method, path, query in calls:
        decision = matcher.decide(Request("https", "a.example.com", 443, method, path + query, SUPERVISOR))
        here = decision.allowed or decision.reason in {"review_required", "action_denied"}
        assert here or wider or not openshell_allows(there, method, path, query), (method, path, query, decision.reason)


# ---------------------------------------------------------------- the command


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, dict[str, Any]]:
    code = main(["policy", "openshell", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path: Path, coding: Bundle) -> Path:
    made = tmp_path / "bundle"
    made.mkdir()
    for name, raw in with_supervisor(coding).members.items():
        (made / name).write_bytes(raw)
    return made


def test_the_command_writes_file_and_message(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    accept = ["--accept", "governance.persistence", "--accept", "governance.mcp.files"]
    code, answer = run(capsys, folder, "--out", tmp_path / "o.yaml", "--message", tmp_path / "o.json", *accept)
    assert code == 0 and answer["counts"]["ring 2"] > 3 and answer["counts"]["nobody"] == 2
    assert value(told(json.loads((tmp_path / "o.json").read_text()))) == yaml.safe_load(
        (tmp_path / "o.yaml").read_text()
    )
    code, answer = run(capsys, folder, "--out", tmp_path / "other.yaml")
    assert code == 1 and "governance.persistence" in answer["error"]["message"]
    assert not (tmp_path / "other.yaml").exists()


def test_a_signed_bundle_counts_under_its_root_alone(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, root = tmp_path / "b.bundle.json", tmp_path / "root.json"
    bundle.write_bytes(world.bundle(1))
    root.write_bytes(world.root)
    code, answer = run(capsys, bundle, "--root", root)
    assert code == 1 and "nobody holds" in answer["error"]["message"], "it was verified, and then planned"
    code, answer = run(capsys, bundle)
    assert code == 1 and answer["error"]["code"] == ConfigError.code
    bundle.write_bytes(world.bundle(1).replace(b'"signatures"', b'"signaturez"'))
    code, answer = run(capsys, bundle, "--root", root)
    assert code == 1 and answer["error"]["code"] == "malformed"
