"""Filters and lookup about policies: through Ansible's own templating, and their documentation as ansible-doc reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from policy_parts import Officers, officers, write_bundle

from saw.policy.bundle import describe
from saw.policy.loader import load_bundle_folder
from saw.policy.reach_diff import diff_bundles

__all__ = ["officers"]
NAME = "secure_agent.workspace"


@pytest.fixture(scope="session")
def collections(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collections path with this repository."""
    base = tmp_path_factory.mktemp("installed")
    link = base / "ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(Path(__file__).resolve().parents[3])
    return base


class Refused(Exception):
    """What a play that could not evaluate an expression said."""


@pytest.fixture
def template(collections, tmp_path):
    """Evaluate a Jinja expression in a play."""

    def evaluate(text: str, **names: str):
        result = tmp_path / "result.json"
        copy = {"content": "{{ (" + text + ") | to_json }}", "dest": str(result), "mode": "0600"}
        play = {"hosts": "localhost", "gather_facts": False, "vars": names, "tasks": [{"ansible.builtin.copy": copy}]}
        (tmp_path / "play.json").write_text(json.dumps([play]))
        done = subprocess.run(
            [
                Path(sys.executable).parent / "ansible-playbook",
                "-i",
                "localhost,",
                "-c",
                "local",
                tmp_path / "play.json",
            ],
            env={
                **os.environ,
                "ANSIBLE_COLLECTIONS_PATH": str(collections),
                "ANSIBLE_INTERPRETER_PYTHON": sys.executable,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Refused(done.stdout + done.stderr)
        return json.loads(result.read_text())

    return evaluate


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return write_bundle(tmp_path / "coding")


@pytest.mark.thorough
@pytest.mark.control("POL-01")
def test_reach_diff_compares_folders_and_signed_files(template, folder, tmp_path, officers: Officers):
    from datetime import UTC, datetime, timedelta

    from saw.policy.bundle import build_manifest, sign

    wider = write_bundle(tmp_path / "wider", "read-write")
    bundle, now = load_bundle_folder(folder), datetime.now(UTC)
    signed = tmp_path / "b.json"
    manifest = build_manifest(bundle, 1, now, now + timedelta(days=1))
    signed.write_bytes(sign(manifest, bundle.members, [officers.private["ada"]]))
    expected = diff_bundles(bundle, load_bundle_folder(wider))
    for old in (folder, str(signed)):
        diff = template(f"old | {NAME}.reach_diff(new)", old=old, new=wider)
        assert diff["widening"]
        assert diff["reach_digest"] == expected.digest
    assert not template(f"new | {NAME}.reach_diff(new)", new=wider)["widening"]
    assert template(f"'' | {NAME}.reach_diff(new)", new=wider)["widening"]
    digest = template(f"path | {NAME}.policy_digest", path=str(signed))
    assert digest == describe(signed.read_bytes())[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (NAME + ".reach_diff('/nowhere')", "reach_diff: cannot read /nowhere"),
        (NAME + ".policy_digest", "is a folder (sign it first"),
    ],
)
def test_what_a_filter_cannot_read_is_named(template, folder, text, words):
    with pytest.raises(Refused) as refused:
        template(f"path | {text}", path=folder)
    assert words in str(refused.value)


@pytest.mark.thorough
def test_the_lookup_explains_calls(template, folder):
    call = f"policy='{folder}', binary='/usr/bin/git'"
    allowed = template(f"lookup('{NAME}.policy_rule', 'https://git.example.com/x', {call})")
    assert allowed["verdict"] == "allow"
    assert allowed["policy"] == "git"
    refused = template(f"lookup('{NAME}.policy_rule', 'https://git.example.com/x', {call}, method='POST')")
    assert (refused["verdict"], refused["reason"]) == ("deny", "method_or_path_not_allowed")
    assert refused["rule_missing"]
    both = template(f"query('{NAME}.policy_rule', 'https://git.example.com/x', 'https://example.org/', {call})")
    assert [one["verdict"] for one in both] == ["allow", "deny"]
    with pytest.raises(Refused) as wrong:
        template(f"lookup('{NAME}.policy_rule', 'git.example.com', {call})")
    assert "is not an http, https, ws, wss or postgres URL (give absolute URLs)" in str(wrong.value)


def test_a_policy_with_faults_is_told_by_the_lookup(template, folder):
    Path(folder, "policy.yaml").write_text("version: 2\n")
    with pytest.raises(Refused) as wrong:
        template(f"lookup('{NAME}.policy_rule', 'https://git.example.com/', policy='{folder}')")
    assert "policy_rule:" in str(wrong.value)
    assert "policy.yaml:1:" in str(wrong.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(
            ("module", f"policy_{name}")
            for name in ("bundle_check", "key", "release", "release_info", "sign", "verify")
        ),
        ("filter", "reach_diff"),
        ("filter", "policy_digest"),
        ("lookup", "policy_rule"),
    ],
)
def test_ansible_doc_knows_options_examples_and_results(collections, kind, name):
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-doc", "-t", kind, "--json", f"{NAME}.{name}"],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(collections)},
        capture_output=True,
        text=True,
        check=True,
    )
    page = json.loads(done.stdout)[f"{NAME}.{name}"]
    assert page["doc"]["short_description"]
    assert page["doc"]["options"]
    assert page["doc"]["requirements"]
    assert NAME in page["examples"]
    assert page["return"]
