"""A real ansible-playbook at a gate of a real broker: shown, asked, approved, gone on; used, denied and changed are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from broker_rig import Lab, cli, running_broker
from page import run_page

from saw.broker.gate_settings import GateSettings
from saw.policy.keys import create_key
from saw.policy.signers import open_signer
from saw.review.decide import decide, look

PAGE = (Path(__file__).resolve().parents[3] / "docs/approval-gate.md").read_text(encoding="utf-8")
#: The playbook as the page has it.
UPDATE = PAGE.partition("```yaml\n# update.yml\n")[2].partition("```")[0]
ROLE = """\
- name: Change a host
  ansible.builtin.debug: {msg: "CHANGED {{ inventory_hostname }} after {{ gate.id }} to {{ release }}"}
- name: One host cannot be changed
  ansible.builtin.fail: {msg: broken}
  when: inventory_hostname == 'ws-2'
"""
SECOND = """\
- name: Approvals that do not count
  hosts: ws-1
  gather_facts: false
  vars: {extra: "{{ playbook_dir }}/extra.yml"}
  module_defaults:
    secure_agent.workspace.approval_gate: {name: rolling-update, requested_by: ada, timeout: 240, poll: 2}
  tasks:
    - name: An approval is claimed
      secure_agent.workspace.approval_gate: {purpose: used}
      register: used
    - name: It is claimed again
      secure_agent.workspace.approval_gate: {purpose: used, id: "{{ used.id }}"}
      register: again
      failed_when: again.failure.code | default('') != 'already_claimed'
    - name: People deny
      secure_agent.workspace.approval_gate: {purpose: never}
      register: never
      failed_when: never.failure.code | default('') != 'review_denied'
    - name: Why
      ansible.builtin.debug: {msg: "WHY {{ never.msg }}"}
    - name: Another approval is there
      secure_agent.workspace.approval_gate: {purpose: later, state: asked}
      register: later
      until: later.state == 'approved'
      retries: 240
      delay: 1
    - name: The tree is changed
      ansible.builtin.debug: {msg: "{{ lookup('ansible.builtin.pipe', 'touch ' ~ extra) }}"}
    - name: It is claimed for another tree
      secure_agent.workspace.approval_gate: {purpose: later, id: "{{ later.id }}"}
      register: changed
      failed_when: changed.failure.code | default('') != 'statement_changed'
    - name: What was refused
      ansible.builtin.debug: {msg: "DIFFER {{ changed.failure.details.differ }}"}
    - name: The tree is as it was
      ansible.builtin.debug: {msg: "{{ lookup('ansible.builtin.pipe', 'rm ' ~ extra) }}"}
    - name: It is claimed for this tree
      secure_agent.workspace.approval_gate: {purpose: later, id: "{{ later.id }}"}
"""


@pytest.fixture(scope="module")
def fleet() -> Iterator[Lab]:
    """A broker with the gate of the page; ``ben`` decides."""
    with running_broker(gates={"rolling-update": GateSettings(group="fleet-approvers", expires_in_s=600)}) as lab:
        create_key(lab.directory, "ben")
        body = {"groups": ["fleet-approvers"], "public_key": (lab.directory / "ben.pub").read_text()}
        lab.operator.request("PUT", "/v1/reviewers/ben", body)
        yield lab


@pytest.fixture(scope="module")
def project(fleet: Lab) -> Iterator[Path]:
    """A project with one playbook, and next to it what Ansible needs to find the collection."""
    with tempfile.TemporaryDirectory(prefix="saw-gate-") as name:
        base = Path(name)
        link = base / "collections/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(Path(__file__).resolve().parents[3])
        (base / "project/roles/update/tasks").mkdir(parents=True)
        (base / "project/roles/update/tasks/main.yml").write_text(ROLE)
        (base / "project/update.yml").write_text(UPDATE)
        (base / "project/second.yml").write_text(SECOND)
        (base / "project/inventory").write_text("[workspaces]\nws-1 ansible_host=10.0.0.1\nws-2\nws-3\n")
        (base / "checkout").symlink_to("project")
        (base / "ben.key").symlink_to(fleet.directory / "ben.key")
        (base / "context.json").write_text(json.dumps({"broker": {"socket": fleet.config.operator_socket}}))
        yield base / "project"


def start(project: Path, playbook: str, *arguments: str) -> subprocess.Popen[str]:
    base = project.parent
    return subprocess.Popen(
        [Path(sys.executable).parent / "ansible-playbook", "-i", "inventory", "-c", "local", playbook, *arguments],
        cwd=project,
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(base / "collections"),
            "ANSIBLE_HOME": str(base / "home"),
            "ANSIBLE_NOCOLOR": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SAW_CONTEXT": str(base / "context.json"),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(play: subprocess.Popen[str]) -> tuple[int, str]:
    text = play.communicate(timeout=300)[0]
    return play.returncode, " ".join(text.split())


def waiting(lab: Lab, purpose: str, but: str = "") -> dict[str, Any]:
    """Wait for a question with ``purpose`` that is pending."""

    def find() -> dict[str, Any] | None:
        rows = lab.operator.request("GET", "/v1/reviews?state=pending")["reviews"]
        return next((row for row in rows if row["path"] == purpose and row["id"] != but), None)

    return until(find, purpose)


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(what)


def say(lab: Lab, identifier: str, decision: Any = "approve", comment: str = "") -> None:
    """Decide as ``ben``, on what the own machine makes of the statement."""
    decide(lab.operator, look(lab.operator, identifier), open_signer(str(lab.directory / "ben.key")), decision, comment)


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
def test_a_rolling_update_waits_at_its_gate_for_each_wave(fleet: Lab, project: Path) -> None:
    told = ("-e", "release=7", "-e", "requested_by=ada")
    code, text = ended(start(project, "update.yml", *told, "--check", "--diff"))
    assert code == 0, text
    assert "+++ after: this statement" in text
    assert "roles/update/tasks/main.yml file" in text
    assert fleet.operator.request("GET", "/v1/reviews")["reviews"] == []

    play = start(project, "update.yml", *told, "-v")
    first = waiting(fleet, "kernel of November")
    shown = " ".join(fleet.operator.request("GET", f"/v1/reviews/{first['id']}")["rendering"].split())
    for part in (
        "hosts 1 to 1 of 3",
        "ws-1 (10.0.0.1)",
        'release = "7"',
        "by ada, through operator:root",
        "NOT bound: requested_by",
    ):
        assert part in shown
    assert play.poll() is None
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    environment = {"SAW_CONTEXT": str(project.parent / "context.json"), "PATH": path, "REVIEW": first["id"]}
    printed = run_page("docs/approval-gate.md", project.parent, environment)
    assert "4 files, the same" in printed[1]
    second = waiting(fleet, "kernel of November", first["id"])
    state = fleet.operator.request("GET", f"/v1/reviews/{first['id']}")
    assert (state["state"], state["claimed_at"] is not None) == ("done", True)
    rendering = fleet.operator.request("GET", f"/v1/reviews/{second['id']}")["rendering"]
    assert "- host ws-1" in rendering
    assert "+ host ws-2" in rendering
    assert "~ file" not in rendering
    say(fleet, second["id"])
    code, text = ended(play)
    assert code != 0
    assert f"{first['id']} waits for 1 of fleet-approvers" in text
    assert f"{second['id']} was approved by ben" in text
    assert f"CHANGED ws-1 after {first['id']} to 7" in text
    assert fleet.operator.request("GET", f"/v1/reviews/{second['id']}")["state"] == "failed"


@pytest.mark.control("REV-02")
@pytest.mark.control("REV-03")
def test_an_approval_that_was_used_denied_or_is_for_another_tree_stops_the_play(fleet: Lab, project: Path) -> None:
    play = start(project, "second.yml")
    say(fleet, waiting(fleet, "used")["id"])
    say(fleet, waiting(fleet, "never")["id"], "deny", "not on a Friday")
    later = waiting(fleet, "later")
    say(fleet, later["id"])
    code, text = ended(play)
    assert code == 0, text
    assert "was denied by ben: not on a Friday" in text
    assert "DIFFER ['+ file extra.yml file" in text
    assert fleet.operator.request("GET", f"/v1/reviews/{later['id']}")["state"] == "executing"


def test_a_tree_that_differs_from_ones_own_is_named(fleet: Lab, project: Path, tmp_path: Path) -> None:
    rows = fleet.operator.request("GET", "/v1/reviews")["reviews"]
    identifier = next(row["id"] for row in rows if row["path"] == "kernel of November")
    for name in ("update.yml", "inventory"):
        (tmp_path / name).write_text((project / name).read_text() + "\n")
    done = cli(fleet, "review", "compare", identifier, str(tmp_path))
    assert done.returncode == 1
    assert "~ file update.yml" in done.stdout
    assert "+ file roles/update/tasks/main.yml" in done.stdout
    assert cli(fleet, "review", "compare", identifier, str(project)).returncode == 0
