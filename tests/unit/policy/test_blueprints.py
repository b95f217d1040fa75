"""Every blueprint under ``policies/`` loads, compiles and decides as its own cases say, and is narrow in the same ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from saw.cli.main import main
from saw.policy import globs
from saw.policy.casefile import load_cases, run_case
from saw.policy.loader import load_bundle_folder
from saw.policy.matcher import Matcher
from saw.policy.model import READ_METHODS, Request

ROOT = Path(__file__).parents[3]
FOLDERS = sorted(path.parent for path in (ROOT / "policies").glob("*/policy.yaml"))
NAMES = {"coding", "documentation", "issue-triage", "knowledge-worker", "onboarding", "operations", "research-notebook"}


def by_name(path: Path) -> str:
    return path.name


def test_all_seven_are_there() -> None:
    assert {folder.name for folder in FOLDERS} >= NAMES


@pytest.mark.control("POL-01")
@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_a_blueprint_passes_check_and_test(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(folder)]) == 0
    assert main(["policy", "test", str(folder)]) == 0
    assert "cases as expected" in capsys.readouterr().out


@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_its_cases_show_both_sides(folder: Path) -> None:
    cases = load_cases((folder / "tests.yaml").read_bytes(), "tests.yaml").cases
    verdicts = [case.expect.verdict for case in cases]
    assert len(cases) >= 12
    assert verdicts.count("allow") >= 4 and verdicts.count("deny") >= 4
    assert len({case.name for case in cases}) == len(cases)


@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_its_cases_notice_a_policy_that_denies_everything(folder: Path) -> None:
    bundle = load_bundle_folder(folder)
    empty = Matcher(type(bundle.policy)(version=1), bundle.governance)
    cases = load_cases((folder / "tests.yaml").read_bytes(), "tests.yaml").cases
    assert any(run_case(case, empty, bundle.governance).fault for case in cases if case.request is not None)


@pytest.mark.parametrize("folder", FOLDERS, ids=by_name)
def test_it_is_owned_named_after_its_folder_and_narrow(folder: Path) -> None:
    bundle = load_bundle_folder(folder)
    blueprint = bundle.governance.blueprint
    assert blueprint.name == folder.name
    assert blueprint.owner.startswith("team-") and blueprint.incident_contact
    assert not bundle.governance.allow_audit and not bundle.governance.plaintext
    assert bundle.policy.landlock.compatibility == "hard_requirement"
    for rule in bundle.policy.network_policies.values():
        for endpoint in rule.endpoints:
            assert endpoint.protocol == "rest" and endpoint.enforcement == "enforce"
            assert endpoint.access in {"", "read-only"}, "writes are listed one by one"
            assert endpoint.host.endswith(".example.com")
    for rule in bundle.policy.network_policies.values():
        for endpoint in rule.endpoints:
            for allow in endpoint.rules or ():
                assert allow.allow.method in READ_METHODS or allow.allow.path != "/**"


@pytest.mark.control("POL-01")
def test_operations_lets_no_write_pass_without_a_person() -> None:
    bundle = load_bundle_folder(ROOT / "policies/operations")
    matcher = Matcher.compile(bundle.policy, bundle.governance)
    seen = 0
    for rule in bundle.policy.network_policies.values():
        for endpoint in rule.endpoints:
            for allow in endpoint.rules or ():
                path = allow.allow.path.replace("**", "x/y").replace("*", "x")
                host = endpoint.host.replace("*", "x")
                binary = next(item.path for item in rule.binaries if globs.is_exact(item.path))
                call = Request("https", host, endpoint.all_ports[0], allow.allow.method, path, binary)
                decision = matcher.decide(call)
                if allow.allow.method in READ_METHODS:
                    assert decision.allowed and decision.action_class == "auto"
                else:
                    seen += 1
                    assert decision.reason == "review_required"
    assert seen >= 3
