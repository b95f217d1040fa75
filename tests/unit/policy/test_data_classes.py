"""Classes of data: declared in ``governance.yaml``, held against every destination, compared, proven and explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.cli.main import main
from saw.policy import globs
from saw.policy.data_classes import MAX_WORK, strays, within
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_members
from saw.policy.openshell import export
from saw.policy.reach_automata import Budget
from saw.policy.reach_diff import diff_bundles
from saw.policy.reach_invariants import load_invariants
from saw.policy.reach_prove import prove

POLICY = """version: 1
network_policies:
  api:
    endpoints:
      - {host: api.example.com, port: 443, protocol: rest, access: read-only}
      - {host: "*.docs.example.com", port: 443, protocol: rest, access: read-only}
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = """schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team-x}
inference:
  routes: [{alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/v1"}]
"""
STAYS = '{handles: [internal], never: [restricted], only_to: {internal: ["**.example.com"]}}'


def bundle(classes: str = "", policy: str = POLICY, governance: str = GOVERNANCE) -> Bundle:
    text = governance + (f"data_classes: {classes}\n" if classes else "")
    return load_members({"policy.yaml": policy.encode(), "governance.yaml": text.encode()})


def problems(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        bundle(*args, **kwargs)
    return str(caught.value)


@pytest.mark.control("POL-01")
def test_a_bundle_whose_destinations_lie_within_loads_and_one_with_a_stray_does_not() -> None:
    assert bundle(STAYS).governance.data_classes.handles == ("internal",)
    outside = POLICY.replace("api.example.com", "api.example.org")
    found = problems(STAYS, outside)
    assert "policy.yaml:5:16" in found and "internal data may go to **.example.com only" in found
    assert bundle(STAYS.replace('"**.example.com"', '"**.example.com", api.example.org'), outside)
    assert bundle("{handles: [internal]}", outside), "without only_to a class goes where policy allows"


def test_a_glob_is_compared_by_what_it_accepts() -> None:
    one_label = '{handles: [internal], only_to: {internal: ["*.example.com", "*.docs.example.com"]}}'
    assert bundle(one_label)
    assert "*.docs.example.com lies outside" in problems(one_label.replace('"*.docs.example.com"', "docs.example.com"))
    assert "*.docs.example.com lies outside" in problems(
        one_label.replace('"*.docs.example.com"', "a.docs.example.com")
    )


def test_the_service_behind_a_model_counts_and_not_its_alias() -> None:
    away = GOVERNANCE.replace("models.example.com", "models.example.org")
    found = problems(STAYS, governance=away)
    assert "governance.yaml:4:" in found and "models.example.org lies outside" in found
    assert "inference.local" not in found


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        ("{handles: [Internal]}", "not a class of data"),
        ("{handles: [internal], never: [internal]}", "internal is handled as well"),
        ("{only_to: {internal: [a.example.com]}}", "internal is not handled"),
        ("{handles: [internal], only_to: {internal: []}}", "the list is empty"),
        ("{handles: [internal], only_to: {internal: ['*']}}", "host"),
        ("{handles: [internal], only_to: {internal: 'a.example.com'}}", "expected a list"),
        ("{handles: internal}", "expected a list"),
        ("{handles: [internal], holds: [x]}", "this field is not known"),
    ],
)
def test_refused(classes: str, reason: str) -> None:
    assert reason in problems(classes)


@pytest.mark.control("POL-01")
@pytest.mark.parametrize(
    ("old", "new", "setting"),
    [
        (STAYS, STAYS.replace("[internal]", "[internal, personal]"), "data_classes.handles.personal"),
        (STAYS, STAYS.replace("never: [restricted], ", ""), "data_classes.never.restricted"),
        (STAYS, STAYS.replace('"**.example.com"', '"**.example.com", a.example.org'), "data_classes.only_to.internal"),
        (STAYS, "{handles: [internal], never: [restricted]}", "data_classes.only_to.internal"),
        ("", "{handles: [internal]}", "data_classes.handles.internal"),
    ],
)
def test_each_widening_is_shown_and_its_way_back_is_none(old: str, new: str, setting: str) -> None:
    diff = diff_bundles(bundle(old), bundle(new))
    assert [(item.region.setting, item.risk) for item in diff.gained] == [(setting, "high")] and diff.widening
    back = diff_bundles(bundle(new), bundle(old))
    assert not back.widening and [item.region.setting for item in back.lost] == [setting]


def test_another_spelling_of_the_same_hosts_is_no_change_of_reach() -> None:
    policy = POLICY.replace('"*.docs.example.com"', "docs.example.com")
    spelled = '{handles: [internal], only_to: {internal: [API.example.com, "*.example.com"]}}'
    other = '{handles: [internal], only_to: {internal: ["*.example.com"]}}'
    diff = diff_bundles(bundle(spelled, policy), bundle(other, policy))
    assert not diff.gained and not diff.lost


@pytest.mark.control("POL-01")
def test_invariants_say_who_may_handle_what_and_a_child_stays_within_its_parent() -> None:
    text = """schema: 1
invariants:
  - {id: none, kind: data_only_to, data_class: restricted}
  - {id: home, kind: data_only_to, data_class: internal, hosts: ["**.example.com"]}
  - {id: child, kind: subset_of}
"""
    invariants = load_invariants(text.encode())

    def verdicts(one: Bundle) -> list[str]:
        return [finding.verdict for finding in prove(one, invariants, {"": bundle(STAYS)})]

    assert verdicts(bundle(STAYS)) == ["holds", "holds", "holds"]
    assert verdicts(bundle("{handles: [restricted]}")) == ["broken", "holds", "broken"]
    away = bundle("{handles: [internal]}", POLICY.replace("api.example.com", "api.example.org"))
    found = prove(away, invariants, {"": bundle(STAYS)})
    assert [finding.verdict for finding in found] == ["holds", "broken", "broken"]
    assert found[1].rules == ("network_policies.api.endpoints[0].host",)
    with pytest.raises(PolicyError, match="data_only_to needs data_class"):
        load_invariants(b"schema: 1\ninvariants: [{id: a, kind: data_only_to}]\n")


def test_explain_proposes_no_rule_that_data_may_not_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def explained(classes: str) -> dict[str, Any]:
        folder = tmp_path / ("with" if classes else "without")
        folder.mkdir()
        (folder / "policy.yaml").write_text(POLICY)
        (folder / "governance.yaml").write_text(GOVERNANCE + classes)
        arguments = ["GET", "https://new.example.org/x", "--binary", "/usr/bin/curl", "--json"]
        assert main(["policy", "explain", str(folder), *arguments]) == 1
        return dict(json.loads(capsys.readouterr().out))

    assert explained("")["changes"]
    refused = explained(f"data_classes: {STAYS}\n")
    assert not refused["changes"] and "internal data may go to **.example.com only" in refused["impossible"]


def test_the_export_names_what_openshell_has_no_field_for() -> None:
    found = [finding.field for finding in export(bundle(STAYS)).findings]
    assert "governance.data_classes.internal" in found


def test_what_takes_too_long_to_compare_counts_as_outside() -> None:
    one = bundle(STAYS)
    hosts = one.governance.data_classes.only_to["internal"]
    assert not list(strays(one.policy, one.governance, hosts, Budget(MAX_WORK)))
    assert [stray.host for stray in strays(one.policy, one.governance, hosts, Budget(40))] == [
        "*.docs.example.com",
        "models.example.com",
    ]
    many = ", ".join(f'"**.x{number}.example.com"' for number in range(1500))
    endpoints = "".join(
        f'      - {{host: "*.{number}.example.com", port: 443, protocol: rest, access: read-only}}\n'
        for number in range(1500)
    )
    policy = POLICY.replace("    binaries", f"{endpoints}    binaries")
    found = problems(f"{{handles: [internal], only_to: {{internal: [{many}]}}}}", policy)
    assert found.count("lies outside") == 1000, "the list ends, and so does the work"


LABEL = st.sampled_from(["a", "b", "*", "**", "a-*"])
HOST = st.lists(LABEL, min_size=1, max_size=3).map(lambda labels: ".".join([*labels, "example", "com"]))


def readable(host: str) -> bool:
    try:
        globs.host_glob(host)
    except globs.GlobError:
        return False
    return True


@settings(max_examples=examples(150))
@given(part=HOST.filter(readable), wholes=st.lists(HOST.filter(readable), min_size=1, max_size=3), data=st.data())
def test_no_name_of_a_glob_that_lies_within_lies_outside(part: str, wholes: list[str], data: st.DataObject) -> None:
    if not within(part, wholes, Budget()):
        return
    labels = st.lists(st.sampled_from(["a", "b", "a-x", "zz"]), min_size=1, max_size=4)
    name = ".".join([*data.draw(labels), "example", "com"])
    if globs.host_glob(part).fullmatch(name):
        assert any(globs.host_glob(whole).fullmatch(name) for whole in wholes)
