"""One play with the whole surface: the action group, the callback ``audit`` and the lookup ``saw_secret_ref``."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ansible_collections.secure_agent.workspace.plugins.callback import audit
from policy_parts import write_bundle

from saw.audit import ChainedEvent, validate, verify_chain
from saw.cli.main import main as saw

ROOT = Path(__file__).resolve().parents[3]
NAME = "secure_agent.workspace"
SECRET = "hunter2-never-written"
CREDENTIALS = """
credentials:
  - id: git-token
    ref: local:git-token
    inject: {header: Authorization, format: "Bearer {secret}"}
    hosts: ["git.example.com:443"]
"""


class Played:
    """What came of the play: its words, and the lines that the callback wrote."""

    def __init__(self, words: str, log: Path) -> None:
        self.words, self.log = words, log
        self.raw = log.read_text()
        self.events: list[dict[str, Any]] = [json.loads(line)["event"] for line in self.raw.splitlines()]

    def of(self, task: str) -> dict[str, Any]:
        [found] = [event for event in self.events if event["unmapped"]["saw"]["task"] == task]
        return found


@pytest.fixture(scope="module")
def played(broker_context, tmp_path_factory) -> Played:
    base = tmp_path_factory.mktemp("surface")
    link = base / "ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    policy = Path(write_bundle(base / "coding"))
    (policy / "governance.yaml").write_text((policy / "governance.yaml").read_text() + CREDENTIALS)
    look = f"lookup('{NAME}.saw_secret_ref', '%s', policy='{policy}'%s)"
    profile = {"sponsor": "ada@example.com", "blueprint": "coding", "ring": "stable", "image": "workspace"}
    register = {"id": "ws-surface", "state": "provisioning", "reason": SECRET, **profile}
    refused = {"id": "ws-surface", **profile, "ring": "canary"}

    def copy(content: str, name: str) -> dict[str, Any]:
        return {"content": content, "dest": str(base / name), "mode": "0600"}

    def looked(name: str, more: str = "") -> dict[str, Any]:
        told = {"ansible.builtin.debug": {"msg": "{{ " + look % (name, more) + " }}"}}
        return {"name": f"look {name}{more}", **told, "ignore_errors": True}

    tasks: list[dict[str, Any]] = [
        {"name": "register", f"{NAME}.workspace_registration": register},
        {"name": "register again", f"{NAME}.workspace_registration": register},
        {"name": "sessions", f"{NAME}.session_info": {"workspace": "ws-surface"}},
        {"name": "trail", f"{NAME}.audit_query": {"workspace": "ws-surface", "limit": 5}},
        {"name": "refused", f"{NAME}.workspace_registration": refused, "ignore_errors": True},
        {"name": "name of {{ secret }}", "ansible.builtin.copy": copy("{{ secret }}", "one")},
        {"name": "quiet", "ansible.builtin.copy": copy("{{ secret }}", "two"), "no_log": True},
        {
            "name": "loud",
            "ansible.builtin.command": {"cmd": "sh -c 'echo {{ secret }}; exit 3'"},
            "ignore_errors": True,
        },
        {"name": "place", "ansible.builtin.copy": copy("{{ " + look % ("git-token", "") + " }}", "ref")},
        looked("git-tokem"),
        looked("git-token", ", host='evil.example.com:443'"),
        looked("git-token", ", host='git.example.com:443'"),
    ]
    play = {
        "name": "surface",
        "hosts": "localhost",
        "gather_facts": False,
        "vars": {"secret": SECRET, "ansible_python_interpreter": sys.executable},
        "module_defaults": {f"group/{NAME}.broker": {"context": broker_context.context}},
        "tasks": tasks,
    }
    (base / "surface.yml").write_text(json.dumps([play]))
    log = base / "log/ansible.jsonl"
    environment = {key: value for key, value in os.environ.items() if key != "SAW_CONTEXT"} | {
        "ANSIBLE_COLLECTIONS_PATH": str(base),
        "ANSIBLE_CALLBACKS_ENABLED": f"{NAME}.audit",
        "ANSIBLE_INJECT_INVOCATION": "1",  # which older releases do by themselves
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCALHOST_WARNING": "0",
        "SAW_ANSIBLE_AUDIT": str(log),
        "SAW_ANSIBLE_AUDIT_ARGUMENTS": "state,id,msg",
    }
    line = [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-c", "local", "surface.yml"]
    done = subprocess.run(line, env=environment, cwd=base, capture_output=True, text=True, timeout=300, check=False)
    words = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 0, words
    assert (base / "ref").read_text() == "openshell:resolve:env:GIT_TOKEN"
    return Played(words, log)


@pytest.mark.thorough
def test_credentials_are_given_once_for_the_group(played: Played) -> None:
    # Without the group's defaults each of these would ask the socket of this machine, and fail.
    assert played.of("register")["status_id"] == 1
    tasks = {event["unmapped"]["saw"]["task"] for event in played.events}
    assert tasks & {"register again", "sessions", "trail"} == set()
    refused = played.of("refused")
    assert (refused["status_id"], refused["status_detail"]) == (2, "profile_fixed")


def test_every_module_that_talks_to_the_broker_is_in_the_group() -> None:
    group = set(yaml.safe_load((ROOT / "meta/runtime.yml").read_text())["action_groups"]["broker"])
    asking = {
        path.stem
        for path in (ROOT / "plugins/modules").glob("*.py")
        if "secure_agent.workspace.broker.attributes" in path.read_text()
    }
    assert asking - group == set()
    assert {name for name in group if not (ROOT / f"plugins/modules/{name}.py").exists()} == set()
    assert {"audit_query", "session_info", "session_revoke"} <= asking
    for name in ("audit_query", "session_info", "session_revoke"):
        page = importlib.import_module(f"ansible_collections.{NAME}.plugins.modules.{name}")
        assert NAME in page.EXAMPLES


@pytest.mark.control("AUD-01")
def test_changes_and_failures_are_events_in_a_chain_and_secrets_are_not(played: Played, capsys) -> None:
    for event in played.events:
        validate(event)
    changed = played.of("register")
    ours = changed["unmapped"]["saw"]
    assert changed["api"]["operation"] == f"{NAME}.workspace_registration"
    assert (ours["host"], ours["play"], ours["playbook"]) == ("localhost", "surface", "surface.yml")
    assert ours["arguments"] == {"state": "provisioning", "id": "ws-surface"}
    assert (ours["changed"], ours["check_mode"]) == (True, False)
    assert played.of("name of {{ secret }}")["status_id"] == 1
    quiet = played.of("quiet")["unmapped"]["saw"]
    assert quiet["no_log"]
    assert "arguments" not in quiet
    loud = played.of("loud")
    assert (loud["status_id"], loud["unmapped"]["saw"]["ignored"]) == (2, True)
    assert SECRET in played.words
    assert SECRET not in played.raw
    assert saw(["audit", "verify", "--file", str(played.log), "--json"]) == 0
    assert f'"events": {len(played.events)}' in capsys.readouterr().out
    assert played.log.stat().st_mode & 0o777 == 0o600


@pytest.mark.control("CRED-01")
def test_a_credential_is_referred_to_by_a_name_that_exists(played: Played) -> None:
    assert "has no credential 'git-tokem' (it has: git-token)" in played.words
    assert "git-token is not for evil.example.com:443 (it is for: git.example.com:443)" in played.words
    assert '"msg": "openshell:resolve:env:GIT_TOKEN"' in played.words


# --- the callback alone ----------------------------------------------------------------------------------------------


class Told:
    """A callback with its options, and the warnings that it gave."""

    def __init__(self, path: Path) -> None:
        self.warnings: list[str] = []
        self.callback = audit.CallbackModule(display=SimpleNamespace(warning=self.warnings.append, verbosity=0))
        self.callback.get_option = {"path": str(path), "arguments": ["state", "token", "long", "deep"]}.get

    def change(self, **returned: Any) -> None:
        task = SimpleNamespace(
            get_ds=lambda: None, check_mode=True, no_log=False, resolved_action="ns.col.mod", action="mod"
        )
        host = SimpleNamespace(name="h", vars={"saw_workspace": {"id": "ws-demo"}})
        result = SimpleNamespace(task=task, host=host, result=returned, is_changed=lambda: True)
        self.callback.v2_runner_on_ok(result)


def test_plays_share_one_chain_and_values_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "a/b.jsonl"
    arguments = {"state": "present", "token": audit.HIDDEN, "long": "x" * 9000, "deep": {"state": "y"}, "other": "z"}
    for _ in range(2):
        told = Told(path)
        told.change(invocation={"module_args": arguments})
        told.callback.v2_runner_on_unreachable(
            SimpleNamespace(
                task=SimpleNamespace(
                    get_ds=lambda: {"name": "t"}, check_mode=False, no_log=True, resolved_action=None, action="mod"
                ),
                host=SimpleNamespace(name="h", vars={}),
                result={"msg": SECRET},
                is_changed=lambda: False,
            )
        )
        assert told.warnings == []
    chained = [ChainedEvent(**json.loads(line)) for line in path.read_text().splitlines()]
    assert [one.seq for one in chained] == [1, 2, 3, 4]
    assert verify_chain(chained).complete
    ours = chained[0].event["unmapped"]["saw"]
    assert ours["arguments"] == {"state": "present", "long": "x" * 256}
    assert (ours["workspace"], ours["check_mode"]) == ("ws-demo", True)
    assert chained[1].event["unmapped"]["saw"]["unreachable"]
    assert SECRET not in path.read_text()


def test_what_cannot_be_written_is_one_warning_and_the_play_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "torn.jsonl"
    path.write_text('{"source": "ansible"')
    told = Told(path)
    told.change()
    told.change()
    assert len(told.warnings) == 1
    assert "ends within a line; move it away" in told.warnings[0]
    assert path.read_text() == '{"source": "ansible"'
    link = tmp_path / "link.jsonl"
    link.symlink_to("/nowhere")
    told = Told(link)
    told.change()
    assert len(told.warnings) == 1
