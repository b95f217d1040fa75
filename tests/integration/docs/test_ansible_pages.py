"""docs/ansible.md and docs/awx.md as they are written: real playbooks, inventory and callback against a real broker and bastion.

A controller is the far end: the collection ``awx.awx`` is a stand-in that notes what it is told. What a controller makes of the
credential type for machines is used for real: ansible-runner runs a play that signs in at the provider and asks at a gate.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pytest
import yaml
from page import ROOT, files, run_page
from session_rig import RULES, Bastion, activate, make_key
from sso_rig import SsoLab, sso_lab, until

from saw.broker.gate_settings import GateSettings, MachineSettings
from saw.policy.keys import create_key
from saw.policy.signers import open_signer
from saw.review.decide import decide, look

ANSIBLE = (ROOT / "docs/ansible.md").read_text(encoding="utf-8")
HERE = Path(sys.executable).parent
AUDIENCE = "https://saw.example/broker"
SECRET = secrets.token_hex(16)
STAND_IN = """\
import json, os
from ansible.plugins.action import ActionBase
class ActionModule(ActionBase):
    def run(self, tmp=None, task_vars=None):
        with open(os.environ["STAND_IN"], "a") as file:
            print(json.dumps([self._task.action, self._task.args]), file=file)
        return {"changed": False}
"""
JOB = """\
- hosts: localhost
  gather_facts: false
  tasks:
    - name: An approval is claimed
      secure_agent.workspace.approval_gate:
        {name: rolling-update, purpose: kernel of November, requested_by: ada@example.com, timeout: 240, poll: 2}
      register: gate
    - ansible.builtin.debug: {msg: "CLAIMED {{ gate.id }}"}
"""


class Desk:
    """A controller's machine with a broker, a bastion and the workspace ``ws-demo`` of the ring ``canary``."""

    def __init__(self, lab: SsoLab, bastion: Bastion, folder: Path) -> None:
        self.lab, self.bastion, self.folder = lab, bastion, folder
        for name in ("log", "home", "etc"):
            (folder / name).mkdir(parents=True)
        link = folder / "installed/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)
        told = {
            "broker": {"socket": lab.config.operator_socket, "ssh": None},
            "bastion": {"host": "127.0.0.1", "port": bastion.port, "user": "root"},
        }
        (folder / "etc/context.json").write_text(json.dumps(told))
        self.environment = {
            "PATH": f"{HERE}:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(folder / "installed"),
            "ANSIBLE_HOME": str(folder / "ansible"),
            "ANSIBLE_NOCOLOR": "1",
            "SAW_CONTEXT": str(folder / "etc/context.json"),
            "SAW_SSH_KEYS": str(folder / "keys"),
        }
        self.places = {
            "/etc/saw/context.json": str(folder / "etc/context.json"),
            "/etc/saw/broker.json": str(lab.config_file),
            "/opt/saw/bin/saw": "saw",
            "/var/log/saw": str(folder / "log"),
            "/home/agent": str(folder / "home"),
        }

    def run(self, *line: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            line, cwd=self.folder, env={**os.environ, **self.environment, **more}, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    def written(self, text: str) -> str:
        """Return ``text`` of a page with the places of real hosts where they lie here."""
        for place, here in self.places.items():
            text = text.replace(place, here)
        return text


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    """A broker with the gate of docs/approval-gate.md, and a client of the provider that is the machine ``awx``."""
    client = {"client_id": "awx-jobs", "client_secret": SECRET, "grant_types": ["client_credentials"]}
    directory = Path(tempfile.mkdtemp(prefix="saw-desk-"))
    with sso_lab(
        directory, sessions=RULES, machine_audience=AUDIENCE,
        clients=[{**client, "redirect_uris": [], "response_types": []}],
        gates={"rolling-update": GateSettings(group="fleet-approvers", expires_in_s=600)},
        machines={"awx": MachineSettings(scopes=("gate:rolling-update",), oauth_client="awx-jobs")},
    ) as lab:  # fmt: skip
        bastion = Bastion(lab, directory)
        try:
            number = activate(lab, "ws-demo")
            bastion.sql("UPDATE workspaces SET ring = 'canary'")
            bastion.start("ws-demo", number)
            yield Desk(lab, bastion, directory / "desk")
        finally:
            bastion.stop()


def _requested(desk: Desk, person: str = "") -> str:
    """Put down a session that nobody has used yet, of a person or of the operator; return its id."""
    with tempfile.TemporaryDirectory(dir=desk.folder) as folder:
        make_key(Path(folder) / "key")
        body = {"workspace_id": "ws-demo", "public_key": (Path(folder) / "key.pub").read_text()}
    session = str(desk.lab.operator.request("POST", "/v1/sessions", body)["session_id"])
    desk.bastion.sql("UPDATE sessions SET person = ? WHERE id = ?", person, session)
    return session


@pytest.mark.thorough
@pytest.mark.control("ID-03")
def test_the_page_on_ansible(desk: Desk) -> None:
    for name, text in files(ANSIBLE).items():
        if "/" not in name:
            (desk.folder / name).write_text(desk.written(text))
    mine, other = _requested(desk, "ada@example.com"), _requested(desk)
    printed = run_page("docs/ansible.md", desk.folder, desk.environment, places=desk.places)
    assert "failed=0" in printed[0]
    assert [desk.bastion.show(one)["reason"] for one in (mine, other)] == ["ended_by_operator", None]
    assert re.search(r"@ring_canary:\n.*--ws-demo\n", printed[2])
    assert "load average" in printed[2]
    newest = desk.lab.operator.request("GET", "/v1/sessions?workspace_id=ws-demo")["sessions"][0]
    assert "uptime" in newest["command"]
    recorded = [json.loads(line) for line in (desk.folder / "log/ansible.jsonl").read_text().splitlines()]
    assert "End what one person has open" in json.dumps(recorded)
    assert "left the team" not in json.dumps(recorded)


def test_the_plays_on_the_page_configure_a_broker_and_name_a_credential(desk: Desk) -> None:
    """Where the page restarts a unit of systemd, the broker of the test is restarted."""
    [play] = yaml.safe_load(files(ANSIBLE)["configure.yml"])
    settings, restart = play["tasks"]
    assert set(restart) - {"name", "when"} == {"ansible.builtin.systemd_service"}
    file = desk.folder / "broker.json"
    file.write_bytes(desk.lab.config_file.read_bytes())
    here = {"path": str(file), "owner": "root", "group": "root", "saw": str(HERE / "saw")}
    settings["secure_agent.workspace.broker_config"] |= here
    tasks = yaml.safe_load(desk.written(files(ANSIBLE)["tasks/placeholder.yml"]))
    tasks[0]["ansible.builtin.copy"]["content"] = tasks[0]["ansible.builtin.copy"]["content"].replace(
        "'policies/coding'", f"'{ROOT}/policies/coding'"
    )
    (desk.folder / "home/.config").mkdir()
    asked = {"ansible.builtin.assert": {"that": "settings.restart_needed"}}
    (desk.folder / "both.yml").write_text(
        yaml.safe_dump([{"hosts": "localhost", "gather_facts": False, "tasks": [settings, asked, *tasks]}])
    )
    done = desk.run("ansible-playbook", "both.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert msgspec.json.decode(file.read_bytes())["rollout"]["first_wave"] == 5
    token = desk.folder / "home/.config/tool-token"
    assert (token.read_text(), token.stat().st_mode & 0o777) == ("openshell:resolve:env:GIT_TOKEN", 0o600)


@pytest.fixture(scope="module")
def checkout(desk: Desk) -> Path:
    """A copy of the checkout in which things are built, and the stand-in for the controller's collection."""
    folder = desk.folder / "checkout"
    folder.mkdir()
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    link = folder / "installed/ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(folder)
    plugins = folder / "installed/ansible_collections/awx/awx/plugins/action"
    plugins.mkdir(parents=True)
    for tasks in (folder / "playbooks/tasks").glob("awx_*.yml"):
        for module in re.findall(r"^  awx\.awx\.(\w+):", tasks.read_text(), re.MULTILINE):
            (plugins / f"{module}.py").write_text(STAND_IN)
    return folder


@pytest.mark.control("LIF-01")
def test_the_page_on_awx_builds_and_loads_the_content(desk: Desk, checkout: Path) -> None:
    noted = desk.folder / "noted"
    environment = {
        **desk.environment,
        "ANSIBLE_COLLECTIONS_PATH": str(checkout / "installed"),
        "STAND_IN": str(noted),
        "VIRTUAL_ENV": "",
    }
    run_page("docs/awx.md", checkout, environment)
    made = checkout / "extensions/aap"
    [wheel], [archive] = list((made / "dist").glob("*.whl")), list(made.glob("secure_agent-workspace-*.tar.gz"))
    assert wheel.stat().st_size > 100_000
    definition = yaml.safe_load((made / "execution-environment.yml").read_text())
    assert archive.name in {one["src"] for one in definition["additional_build_files"]}
    assert "--hash=sha256:" in (made / "requirements.txt").read_text()
    told = [json.loads(line) for line in noted.read_text().splitlines()]
    types = [args["name"] for module, args in told if module == "awx.awx.credential_type"]
    assert types == ["saw-broker", "saw-broker-machine", "saw-officer-key"] * 2
    [image] = [args["image"] for module, args in told if module == "awx.awx.execution_environment"]
    assert image == "registry.example.org/saw-ee@sha256:…"
    [machine] = [args for module, args in told[:3] if args["name"] == "saw-broker-machine"]
    assert machine["injectors"]["env"] == {"SAW_CONTEXT": "{{ tower.filename.context }}"}
    templates = {args["name"] for module, args in told if module == "awx.awx.job_template"}
    page = (ROOT / "docs/awx.md").read_text(encoding="utf-8")
    row = page.partition("`saw-workspace-create`, ")[2].partition("` |")[0]
    named = {"saw-workspace-create", *(f"saw-workspace{part}" for part in re.findall(r"`(-[a-z]+)", f"{row}`"))}
    assert named <= templates


@pytest.mark.control("REV-01")
def test_a_job_with_the_credential_for_machines_signs_in_and_asks_at_a_gate(desk: Desk, checkout: Path) -> None:
    lab, base = desk.lab, desk.folder / "runner"
    values = {
        "url": f"https://localhost:{lab.port}", "ca": lab.ca_file.read_text(), "token_url": f"{lab.provider.issuer}/token",
        "client_id": "awx-jobs", "client_secret": SECRET, "resource": AUDIENCE,
    }  # fmt: skip
    made = _injected("saw-broker-machine", values, base)
    (base / "project").mkdir()
    (base / "project/job.yml").write_text(JOB)
    create_key(desk.folder, "ben")
    reviewer = {"groups": ["fleet-approvers"], "public_key": (desk.folder / "ben.pub").read_text()}
    lab.operator.request("PUT", "/v1/reviewers/ben@example.com", reviewer)
    trusted = {"SSL_CERT_FILE": str(lab.provider.ca_file)}
    with subprocess.Popen(
        [HERE / "ansible-runner", "run", str(base), "-p", "job.yml"],
        env={**os.environ, **desk.environment, **made, **trusted}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as job:  # fmt: skip

        def waiting() -> dict[str, Any] | None:
            assert job.poll() is None, job.stdout and job.stdout.read()
            rows = lab.operator.request("GET", "/v1/reviews?state=pending")["reviews"]
            return rows[0] if rows else None

        review = until(waiting, 240)["id"]
        decide(lab.operator, look(lab.operator, review), open_signer(str(desk.folder / "ben.key")), "approve", "")
        text = job.communicate(timeout=240)[0]
    assert (job.returncode, f"CLAIMED {review}" in text) == (0, True), text
    assert lab.audited(principal="machine:awx")
    kept = "".join(path.read_text() for path in (base / "artifacts").rglob("*") if path.is_file())
    assert SECRET not in kept + text + json.dumps(lab.events())


def _injected(kind: str, values: dict[str, str], base: Path) -> dict[str, str]:
    """Do what a controller does with a credential: write its files, and return its environment."""
    text = (ROOT / "extensions/aap/credential_types.yml").read_text(encoding="utf-8").replace("!unsafe ", "")
    types = yaml.safe_load(text)["controller_credential_types"]
    [injectors] = [one["injectors"] for one in types if one["name"] == kind]
    templates = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - files, no HTML
    names: dict[str, str] = {}
    base.mkdir(mode=0o700)
    for label, template in injectors["file"].items():
        path = base / label
        path.touch(mode=0o600)
        path.write_text(templates.from_string(template).render(values, tower={"filename": names}))
        names[label.partition(".")[2]] = str(path)
    return {
        name: templates.from_string(template).render(tower={"filename": names})
        for name, template in injectors["env"].items()
    }
