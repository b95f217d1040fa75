"""The policy guide, the page on reach and the page on releasing, as they are written and in this order, against a real broker."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from broker_rig import Lab
from page import ROOT, run_page


@pytest.fixture(scope="module")
def desk() -> Iterator[tuple[Lab, Path]]:
    """A broker that trusts nobody yet, and a folder with the repository's policies."""
    directory = Path(tempfile.mkdtemp(prefix="saw-page-"))
    lab = Lab(directory)
    try:
        lab.start()
        folder = directory / "desk"
        folder.mkdir()
        shutil.copytree(ROOT / "policies", folder / "policies")
        (folder / "context.json").write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        yield lab, folder
    finally:
        lab.stop()
        shutil.rmtree(directory)


def walk(page: str, desk: tuple[Lab, Path], read=lambda _: {}) -> list[str]:
    lab, folder = desk
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"SAW_CONTEXT": str(folder / "context.json"), "PATH": path}
    return run_page(page, folder, environment, read, {"/var/lib/saw/broker": str(lab.config.state)})


def test_the_policy_guide(desk: tuple[Lab, Path]) -> None:
    _, folder = desk
    authored, _ = walk("docs/policy.md", desk)
    assert "decided at: policies/coding/policy.yaml" in authored
    [release] = desk[0].operator.request("GET", "/v1/policy/state")["releases"]
    assert (release["ring"], release["blueprint"], release["revision"]) == ("stable", "coding", 1)
    assert (folder / "policies/mine/policy.yaml").is_file()


def test_the_page_on_reach(desk: tuple[Lab, Path]) -> None:
    [printed] = walk("docs/reach.md", desk)
    assert '"gained": []' in printed
    assert "Content-Security-Policy" in (desk[1] / "diff.html").read_text()


@pytest.mark.thorough
def test_the_page_on_releasing(desk: tuple[Lab, Path]) -> None:
    lab, folder = desk

    def aloud(printed: str) -> Mapping[str, str]:
        found = re.search(r"^\s+([0-9a-f]{64})  root\.json", printed, re.MULTILINE)
        return {"DIGEST": found[1]} if found else {}

    walk("docs/policy-release.md", desk, aloud)
    state = lab.operator.request("GET", "/v1/policy/state")
    assert state["root_version"] == 3
    assert [one["revision"] for one in state["releases"] if one["ring"] == "stable"] == [2]
    assert (folder / "founded/metadata/1.root.json").is_file()
    assert (folder / "policy-mirror/metadata/timestamp.json").is_file()
