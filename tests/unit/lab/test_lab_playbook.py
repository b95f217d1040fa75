"""Playbooks run inside the main job, which must stay interruptible before, during and after them."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from saw.lab.playbook import run_playbook
from saw.lab.topology import Lab

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A lab whose only playbook does nothing on this machine."""
    repository = tmp_path / "repository"
    (repository / "playbooks").mkdir(parents=True)
    shutil.copy(REPOSITORY / "ansible.cfg", repository)
    play = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.debug": {"msg": "hello"}}]}
    (repository / "playbooks/nothing.yml").write_text(json.dumps([play]), encoding="utf-8")
    lab = Lab(repository, tmp_path / "build")
    lab.inventory_file.parent.mkdir(parents=True)
    lab.inventory_file.write_text("all: {hosts: {localhost: {ansible_connection: local}}}\n", encoding="utf-8")
    return lab


def test_ctrl_c_and_an_end_from_outside_still_count_after_a_playbook(lab: Lab) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    assert before[signal.SIGINT] is signal.default_int_handler
    assert run_playbook(lab, "nothing", say=[].append).changed == 0
    assert {number: signal.getsignal(number) for number in before} == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
