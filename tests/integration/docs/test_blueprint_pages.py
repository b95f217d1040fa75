"""The pages on blueprints and on OpenShell, as they are written: neither needs a broker."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from page import ROOT, run_page
from test_openshell_fabric import Made

from saw.policy.loader import load_bundle_folder


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder with the repository's policies."""
    shutil.copytree(ROOT / "policies", tmp_path / "policies")
    return tmp_path


def walk(page: str, desk: Path) -> str:
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return "\n".join(run_page(page, desk, {"PATH": path}))


def test_the_page_on_blueprints(desk: Path) -> None:
    walk("docs/blueprints.md", desk)
    draft = load_bundle_folder(desk / "drafts/coding")
    assert draft.governance.blueprint.name == "coding-draft"
    assert "/v2/items" in (desk / "drafts/coding/tests.yaml").read_text(encoding="utf-8")


@pytest.mark.control("INT-01")
def test_the_page_on_openshell_and_agent_policy_fabric(desk: Path) -> None:
    (desk / "bundle").mkdir()
    (desk / "trust").mkdir()
    made = Made(desk / "bundle")
    made.write(made.manifest()).rename(desk / "bundle/team-bundle.yaml")
    (desk / "bundle/signer.pub").rename(desk / "trust/signer.pub")
    printed = walk("docs/openshell.md", desk)
    assert "imported/coding: everything is carried over" in printed
    assert "exit code 1" in printed and "rules/no-deletes.yaml" in printed
    assert (
        load_bundle_folder(desk / "imported/team").policy.network_policies["api"].endpoints[0].host == "api.example.com"
    )
