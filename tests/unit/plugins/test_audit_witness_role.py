"""The roles that sign and witness the trail's tree: programs and systemd take what they write; what cannot work is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from saw.audit.note import Signer
from saw.audit.witness_watch import load_settings
from saw.broker.config import load_config
from warm import programs

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("AUD-02")
KEY = Signer("trail.example.com", 1, b"1" * 32).public.line
GIVEN = {
    "audit_witness_log": "https://control.example.com:8443/audit-tree",
    "audit_witness_name": "witness.example.com",
    "audit_witness_key": KEY,
}
WITNESS = ("witness.json", "saw-audit-witness.service", "saw-audit-witness.timer", "sysusers.conf")


def play(role: str, folder: Path, tasks: list[dict[str, object]], **values: object) -> subprocess.CompletedProcess[str]:
    """Run tasks with the variables of a role."""
    told: dict[str, object] = {"ansible_python_interpreter": str(programs() / "python")}
    for name in ("defaults", "vars"):
        file = ROOT / f"roles/{role}/{name}/main.yml"
        told |= (yaml.safe_load(file.read_text()) or {}) if file.exists() else {}
    plays = [
        {"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": {**told, **values}, "tasks": tasks}
    ]
    (folder / "play.yml").write_text(yaml.safe_dump(plays))
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", str(folder / "play.yml")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def written(role: str, folder: Path, names: tuple[str, ...], **values: object) -> dict[str, str]:
    source = ROOT / f"roles/{role}/templates"
    tasks: list[dict[str, object]] = [
        {"ansible.builtin.template": {"src": str(source / f"{name}.j2"), "dest": str(folder / name)}} for name in names
    ]
    done = play(role, folder, tasks, **values)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (folder / name).read_text() for name in names}


def asserted(role: str, file: str, folder: Path, **values: object) -> subprocess.CompletedProcess[str]:
    """Run the first task of a role's file, which refuses what cannot work."""
    return play(role, folder, yaml.safe_load((ROOT / f"roles/{role}/tasks/{file}").read_text())[:1], **values)


def taken_by_systemd(folder: Path, *units: str) -> None:
    for unit in units:
        text = (folder / unit).read_text().replace("/opt/saw/bin/saw", sys.executable)
        (folder / unit).write_text(text)
    command = [
        "systemd-analyze",
        "verify",
        "--man=no",
        "--recursive-errors=no",
        *(str(folder / unit) for unit in units),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_witness_is_configured_as_it_was_told(tmp_path: Path) -> None:
    files = written("audit_witness", tmp_path, WITNESS, **GIVEN)
    settings = load_settings(tmp_path / "witness.json")
    assert (settings.log, settings.name, settings.max_age_s) == (
        GIVEN["audit_witness_log"],
        GIVEN["audit_witness_name"],
        900,
    )
    assert (settings.ca_file, settings.server_name) == (None, None)
    assert f"StateDirectory={settings.state_dir.removeprefix('/var/lib/')}" in files["saw-audit-witness.service"]
    assert "OnFailure" not in files["saw-audit-witness.service"]
    assert "OnUnitInactiveSec=60\n" in files["saw-audit-witness.timer"]
    taken_by_systemd(tmp_path, "saw-audit-witness.service", "saw-audit-witness.timer")
    more = {
        "audit_witness_ca": "PEM",
        "audit_witness_server_name": "broker.saw.internal",
        "audit_witness_on_failure": "page@x.service",
    }
    files = written("audit_witness", tmp_path, WITNESS, **GIVEN, **more)
    settings = load_settings(tmp_path / "witness.json")
    assert (settings.ca_file, settings.server_name) == ("/etc/saw/witness-ca.pem", "broker.saw.internal")
    assert "OnFailure=page@x.service\n" in files["saw-audit-witness.service"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, ""),
        ({"audit_witness_interval_s": 9}, "has to be 10 to 86400"),
        ({"audit_witness_interval_s": 900}, "has to be more than"),
        ({"audit_witness_on_failure": "page.service\nUser=root"}, "has to name a unit"),
        ({"audit_witness_on_failure": "page.service"}, ""),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, object], words: str
) -> None:
    done = asserted("audit_witness", "main.yml", tmp_path, **GIVEN, **change)
    assert (done.returncode == 0) is not bool(words), done.stdout
    assert words in done.stdout


def test_the_control_host_signs_the_tree_and_serves_it_where_it_is_written(tmp_path: Path) -> None:
    names = ("broker.json", "sysusers.conf", "saw-audit-checkpoint.service", "saw-audit-checkpoint.timer")
    tree = {"name": "trail.example.com", "interval_s": 30}
    kept = {
        "retention": "400d",
        "checkpoint": "/var/lib/saw/audit-tree/tiles/checkpoint",
        "key": "/var/lib/saw/audit-tree/log.key.pub",
    }
    base = {"broker_trust_domain": "saw.example"}
    files = written("broker", tmp_path, names, broker_audit_tree=tree, broker_audit_retention=kept, **base)
    config = load_config(tmp_path / "broker.json")
    assert (config.audit_socket, config.audit_group) == ("/run/saw/broker/audit.sock", "saw-audit")
    unit = files["saw-audit-checkpoint.service"]
    for said in (
        f"--tiles {config.audit_tree} ",
        f"--socket {config.audit_socket} ",
        "--name trail.example.com\n",
        "User=saw-audit-tree",
    ):
        assert said in unit
    for said in ("u saw-audit-tree ", "m saw-audit-tree saw-audit\n", "m saw-broker saw-audit\n"):
        assert said in files["sysusers.conf"]
    assert "OnUnitInactiveSec=30\n" in files["saw-audit-checkpoint.timer"]
    taken_by_systemd(tmp_path, "saw-audit-checkpoint.service", "saw-audit-checkpoint.timer")
    plain = written("broker", tmp_path, names[:2], **base)
    assert "audit" not in plain["broker.json"] + plain["sysusers.conf"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("tree", "good"),
    [
        ({}, True),
        ({"name": "trail.example.com/a"}, True),
        ({"name": "trail example"}, False),
        ({"name": "trail%h"}, False),
        ({"name": "-x"}, False),
        ({"interval_s": 60}, False),
        ({"name": "trail\nUser=root"}, False),
        ({"name": "trail", "interval_s": 9}, False),
        ({"name": "trail", "interval_s": 10}, True),
    ],
)
def test_a_tree_that_cannot_be_signed_is_refused(tmp_path: Path, tree: dict[str, object], good: bool) -> None:
    done = asserted("broker", "audit_tree.yml", tmp_path, broker_audit_tree=tree, broker_trust_domain="saw.example")
    assert (done.returncode == 0) is good, done.stdout


def test_the_key_is_checked_before_it_is_taken(tmp_path: Path) -> None:
    [task] = yaml.safe_load((ROOT / "roles/audit_witness/tasks/service.yml").read_text())
    [entry] = [one for one in task["secure_agent.workspace.component"]["files"] if one["dest"].endswith("log.key.pub")]
    file = tmp_path / "key"
    for text, code in ((KEY, 0), (KEY[:-4], 1), (Signer("witness", 4, b"1" * 32).public.line, 1)):
        file.write_text(text + "\n")
        words = [str(file) if word == "%s" else word for word in entry["validate"][1:]]
        assert subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode == code


def handed(tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run the plays without the roles; each host's pinned key is a file of the folder."""
    read, look = yaml.safe_load((ROOT / "playbooks/audit_witness.yml").read_text())
    assert read["hosts"] == "{{ audit_witness_control_hosts | default('control_plane') }}"
    sources = {"/var/lib/saw/audit-tree/log.key.pub": KEY + "\n", "/var/lib/saw/broker/keys/x509/ca.pem": "PEM\n"}
    text = yaml.safe_dump([read, {**look, "roles": [], "tasks": [SHOW]}])
    for number, (there, content) in enumerate(sources.items()):
        (tmp_path / str(number)).write_text(content)
        assert there in text
        text = text.replace(there, str(tmp_path / str(number)))
    pinned = "/etc/saw/witness-log.key.pub"
    assert look["vars"]["audit_witness_pinned_at"] == pinned
    text = text.replace(pinned, str(tmp_path / "pinned-{{ inventory_hostname }}"))
    (tmp_path / "plays.yml").write_text(text)
    (tmp_path / "hosts.ini").write_text(
        "[control_plane]\na\n[audit_witnesses]\nb audit_witness_ca=\nc audit_witness_key=own audit_witness_ca=mine\n"
    )
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", str(tmp_path / "hosts.ini"), "-c", "local"]
    told = json.dumps({"ansible_python_interpreter": str(programs() / "python")})
    return subprocess.run(
        [*command, *more, "-e", told, str(tmp_path / "plays.yml")], capture_output=True, text=True, check=False
    )


def test_a_key_that_is_pinned_is_replaced_only_by_one_that_is_given(tmp_path: Path) -> None:
    """The twin is the same key again; the host ``c`` is given its key by hand."""
    other = Signer("trail.example.com", 1, b"2" * 32).public.line
    for name in "bc":
        (tmp_path / f"pinned-{name}").write_text(KEY + "\n")
    done = handed(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in "bc":
        (tmp_path / f"pinned-{name}").write_text(other + "\n")
    for more in ((), ("--check",)):
        done = handed(tmp_path, *more)
        said = " ".join(done.stdout.split())
        assert done.returncode == 2, said
        assert "the log of a has another key than the one that this witness follows" in said
        assert "b trail" not in said, "nothing is taken"
        assert "c own mine" in said, "what is given by hand counts"
    done = handed(tmp_path, "-e", f"audit_witness_key={KEY}")
    assert done.returncode == 0, done.stdout


def test_the_playbook_takes_key_and_authority_from_the_control_host_unless_they_are_given(tmp_path: Path) -> None:
    """The plays' own way of handing over, with what was read and without the roles."""
    done = handed(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"b {KEY} PEM" in done.stdout
    assert "c own mine" in done.stdout


SHOW = {"ansible.builtin.debug": {"msg": "{{ inventory_hostname }} {{ audit_witness_key }} {{ audit_witness_ca }}"}}
