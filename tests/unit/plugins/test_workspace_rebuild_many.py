"""Playbook workspace_rebuild_many stops at the first workspace that fails; a program stands for rebuilds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("LIF-01")
IMAGE = {"workspace_image": "trixie", "workspace_image_path": "/srv/i.qcow2", "workspace_image_sha256": "a" * 64}
#: Writes down what it was asked for, and fails for one workspace.
PROGRAM = """#!{python}
import json, os, sys
told = json.loads(sys.argv[-1])
with open({log!r}, "a") as log:
    log.write(json.dumps([*sys.argv[1:-2], told, os.environ["AWX_ISOLATED_DATA_DIR"]]) + "\\n")
sys.exit(told["workspace_id"] == "ws-bad")
"""


def test_the_first_then_the_rest_one_by_one_and_none_after_one_that_fails(tmp_path: Path) -> None:
    program, log = tmp_path / "rebuild", tmp_path / "log"
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    runs = [
        {"workspace_rebuild_many_workspaces": "ws-1 ws-2 ws-3", "workspace_rebuild_many_part": "first"},
        {"workspace_rebuild_many_workspaces": "ws-1 ws-2 ws-3", "workspace_rebuild_many_part": "rest"},
        {"workspace_rebuild_many_workspaces": "ws-4 ws-bad ws-5"},
    ]
    plays = [
        {
            "import_playbook": str(ROOT / "playbooks/workspace_rebuild_many.yml"),
            "vars": {**IMAGE, **run, "workspace_rebuild_many_program": str(program)},
        }
        for run in runs
    ]
    (tmp_path / "plays.yml").write_text(yaml.safe_dump(plays))
    done = play(tmp_path, "plays.yml")
    assert done.returncode == 2, done.stdout + done.stderr
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    assert [one[-2]["workspace_id"] for one in asked] == ["ws-1", "ws-2", "ws-3", "ws-4", "ws-bad"]
    assert {one[-3] for one in asked} == {"secure_agent.workspace.workspace_rebuild"}
    assert all(one[-2].items() >= IMAGE.items() for one in asked)
    assert {one[-1] for one in asked} == {""}, "the controller's callback would take part"


def test_a_list_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    done = play(
        tmp_path,
        str(ROOT / "playbooks/workspace_rebuild_many.yml"),
        "-e",
        json.dumps({"workspace_rebuild_many_workspaces": "ws-1 ws-1", **IMAGE}),
    )
    assert done.returncode == 2
    assert "has to name each workspace once" in " ".join(done.stdout.split())


def play(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("ansible-playbook")
    return subprocess.run(
        [str(program), "-i", "localhost,", *words], capture_output=True, text=True, check=False, timeout=120, cwd=folder,
        env={**os.environ, "ANSIBLE_HOME": str(folder / "home"), "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1",
             "AWX_ISOLATED_DATA_DIR": "/runner"},
    )  # fmt: skip
