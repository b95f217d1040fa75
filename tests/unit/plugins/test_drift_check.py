"""Drift is looked for with real playbooks on a scratch host: each place is named, and nobody's silence counts as none."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import yaml
from broker_rig import Lab

from saw.audit import validate
from saw.broker.client import BrokerRefusal
from saw.drift.findings import TrailDestination, open_store, record
from saw.drift.report import read_report
from saw.edr.forward import deliver
from saw.edr.service import factory_of

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.control("P0-01")
SECRET = "a-value-that-nobody-may-read"
COMPONENT = [f"component-{number}" for number in range(9)]
UNWANTED = ["unwanted-0", "unwanted-1"]

#: What the plays want; the tasks of the role take `root`, the scratch host's folder.
TASKS = [
    {
        "name": "Files of a component",
        "secure_agent.workspace.component": {
            "files": [
                *({"dest": f"{{{{ root }}}}/{name}", "content": f"{name}\n"} for name in COMPONENT),
                {"dest": "{{ root }}/credential", "secret_base64": f"{{{{ '{SECRET}' | b64encode }}}}", "mode": "0600"},
            ]
        },
    },
    {
        "name": "What a baseline holds",
        "secure_agent.workspace.host_baseline": {
            "settings": [
                {"path": "{{ root }}/login.defs", "key": "UMASK", "value": "027"},
                {"path": "{{ root }}/login.defs", "key": "AGE", "value": "1"},
            ],
            "words_removed": [{"path": "{{ root }}/common-auth", "word": "nullok"}],
            "permissions": [{"path": "{{ root }}/shadow", "mode": "0640"}, {"path": "{{ root }}/cron.d", "mode": "0700"}],
        },
    },
    {"name": "A copy", "ansible.builtin.copy": {"content": "copied\n", "dest": "{{ root }}/copied", "mode": "0644"}},
    {"name": "A line", "ansible.builtin.lineinfile": {"path": "{{ root }}/hosts.allow", "line": f"token {SECRET}"}},
    {
        "name": "Nothing of it",
        "ansible.builtin.file": {"path": "{{ root }}/{{ item }}", "state": "absent"},
        "loop": UNWANTED,
    },
    {
        "name": "What is not told",
        "ansible.builtin.copy": {"content": SECRET, "dest": f"{{{{ root }}}}/{SECRET}", "mode": "0600"},
        "no_log": True,
    },
    {"name": "What only a real run tells", "ansible.builtin.command": "true"},
]  # fmt: skip
#: Each place that is not as it should be once :func:`drift_everywhere` was there.
PLACES = {
    *(("Files of a component", f"{{root}}/{name}") for name in [*COMPONENT, "credential"]),
    ("What a baseline holds", "setting {root}/login.defs:UMASK"),
    ("What a baseline holds", "setting {root}/login.defs:AGE"),
    ("What a baseline holds", "word {root}/common-auth"),
    ("What a baseline holds", "mode {root}/shadow"),
    ("What a baseline holds", "mode {root}/cron.d"),
    ("A copy", "{root}/copied"),
    ("A line", "{root}/hosts.allow"),
    *(("Nothing of it", f"{{root}}/{name}") for name in UNWANTED),
    ("What is not told", ""),
}


def as_wanted(root: Path) -> None:
    """Make the scratch host as the plays want it."""
    for name in COMPONENT:
        (root / name).write_text(f"{name}\n")
    (root / "copied").write_text("copied\n")
    (root / "credential").write_text(SECRET)
    (root / SECRET).write_text(SECRET)
    (root / "hosts.allow").write_text(f"token {SECRET}\n")
    (root / "login.defs").write_text("UMASK 027\nAGE 1\n")
    (root / "common-auth").write_text("auth required pam_unix.so\n")
    (root / "shadow").write_text("")
    (root / "cron.d").mkdir(exist_ok=True)
    (root / "cron.d").chmod(0o700)
    for name in UNWANTED:
        (root / name).unlink(missing_ok=True)
    for name, mode in {"credential": 0o600, SECRET: 0o600, "shadow": 0o640}.items():
        (root / name).chmod(mode)


def drift_everywhere(root: Path) -> None:
    """Change each of the places."""
    for name in [*COMPONENT[:5], "copied", "credential", SECRET, *UNWANTED]:
        (root / name).write_text("changed\n")
    for name in COMPONENT[5:]:
        (root / name).unlink()
    (root / "hosts.allow").write_text("")
    (root / "login.defs").write_text("UMASK 000\nAGE 99\n")
    (root / "common-auth").write_text("auth required pam_unix.so nullok\n")
    (root / "shadow").chmod(0o644)
    (root / "cron.d").chmod(0o755)


class Ended(NamedTuple):
    """The end of a check: exit code, the report file, and all that was printed."""

    code: int
    report: dict[str, Any]
    printed: str


class Rig:
    """A scratch host, a host that is away, and plays for both."""

    def __init__(self, folder: Path, lab: Lab) -> None:
        self.folder, self.lab = folder, lab
        self.root = folder / "host"
        self.root.mkdir()
        tasks = folder / "installed/ansible_collections/example/fleet/roles/scratch/tasks/main.yml"
        tasks.parent.mkdir(parents=True)
        tasks.write_text(yaml.safe_dump(TASKS, sort_keys=False))
        play = {"gather_facts": False, "roles": ["example.fleet.scratch"]}
        first = {
            "name": "First",
            "hosts": "away",
            "gather_facts": False,
            "tasks": [{"name": "Ask", "ansible.builtin.ping": {}}],
        }
        (folder / "site.yml").write_text(
            yaml.safe_dump([first, {"name": "Scratch", "hosts": "scratch", **play}], sort_keys=False)
        )
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        hosts = {
            "scratch": {
                "ansible_connection": "local",
                "ansible_python_interpreter": sys.executable,
                "root": str(self.root),
            },
            "away": {"ansible_host": "127.0.0.1", "ansible_port": port, "ansible_ssh_common_args": "-o BatchMode=yes"},
        }
        (folder / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": hosts}}))
        link = folder / "installed/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)

    def check(self, *options: str) -> Ended:
        """Run ``saw drift check`` on the plays and report to the broker."""
        command = [
            sys.executable,
            "-m",
            "saw.cli.main",
            "drift",
            "check",
            "--inventory",
            str(self.folder / "hosts.yml"),
        ]
        command += [
            "--playbook",
            "site.yml",
            "--output",
            "report.json",
            "--report",
            "--syslog",
            "",
            "--state",
            "state",
            *options,
        ]
        return self.run(command)

    def play(self, **variables: object) -> Ended:
        """Run the playbook drift_report, which runs the same command."""
        more = {
            "drift_report_playbooks": ["site.yml"], "drift_report_output": "report.json", "drift_report_findings": True,
            "drift_report_syslog": "", "drift_report_state": str(self.folder / "state"), **variables,
        }  # fmt: skip
        (self.folder / "variables.json").write_text(json.dumps(more))
        program = Path(sys.executable).with_name("ansible-playbook")
        playbook = "secure_agent.workspace.drift_report"
        return self.run([str(program), "--inventory", "hosts.yml", "--extra-vars", "@variables.json", playbook])

    def run(self, command: list[str]) -> Ended:
        """Run a command that leaves a report."""
        report = self.folder / "report.json"
        report.unlink(missing_ok=True)
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=300, cwd=self.folder,
            env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(self.folder / "installed"), "SAW_CONTEXT": self.lab.context,
                 "ANSIBLE_HOME": str(self.folder / "home"), "ANSIBLE_PIPELINING": "1"},
        )  # fmt: skip
        assert report.exists(), done.stdout + done.stderr
        return Ended(done.returncode, json.loads(report.read_text()), done.stdout + done.stderr)

    def findings(self) -> list[dict[str, Any]]:
        """The findings of drift in the broker's trail, oldest first."""
        found, after = [], 0
        while page := self.lab.operator.request("GET", f"/v1/audit/events?source=broker&after={after}&limit=1000")[
            "events"
        ]:
            found += [item["event"] for item in page]
            after = page[-1]["seq"]
        return [event for event in found if event["class_uid"] == 2003]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, broker_context: Lab) -> Rig:
    return Rig(tmp_path_factory.mktemp("drift"), broker_context)


@pytest.fixture(scope="module")
def clean(rig: Rig) -> Ended:
    """The check of a host that is as it should be, by the playbook."""
    as_wanted(rig.root)
    return rig.play(drift_report_limit="scratch")


@pytest.fixture(scope="module")
def drifted(rig: Rig, clean: Ended) -> Ended:
    """The check after everything drifted, of a host that is away as well."""
    assert clean.code == 0
    drift_everywhere(rig.root)
    before = state_of(rig.root)
    ended = rig.check("--limit", "all")
    assert state_of(rig.root) == before, "the look changed something"
    return ended


def state_of(root: Path) -> list[tuple[str, int, bytes]]:
    """What the scratch host looks like."""
    files = [path for path in root.rglob("*") if path.is_file() and not path.is_symlink()]
    return sorted((str(path), path.lstat().st_mode, path.read_bytes()) for path in files)


@pytest.mark.thorough
def test_a_host_as_it_should_be_has_an_empty_report(rig: Rig, clean: Ended) -> None:
    assert clean.code == 0, clean.printed
    report = clean.report
    assert (report["format"], report["version"], report["hosts"]) == ("saw-drift-report", 1, ["scratch"])
    assert [report[name] for name in ("drift", "unchecked", "waived", "problems")] == [[], [], [], []]
    assert {one["task"] for one in report["not_asked"]} == {"What only a real run tells"}


@pytest.mark.thorough
def test_drift_in_twenty_places_is_named_place_by_place_with_host_role_and_task(rig: Rig, drifted: Ended) -> None:
    assert len(PLACES) == 20
    assert drifted.code == 1
    named = {(one["task"], one["place"]) for one in drifted.report["drift"]}
    assert named == {(task, place.format(root=rig.root)) for task, place in PLACES}
    assert {(one["host"], one["role"]) for one in drifted.report["drift"]} == {("scratch", "scratch")}
    assert len(drifted.report["drift"]) == 20
    (hidden,) = [one for one in drifted.report["drift"] if one["hidden"]]
    assert hidden["task"] == "What is not told"
    assert "places that drifted: 20" in drifted.printed


def test_no_value_is_in_what_is_printed_kept_or_reported(rig: Rig, drifted: Ended) -> None:
    everything = [drifted.printed, json.dumps(drifted.report), json.dumps(rig.findings())]
    everything += [path.read_bytes().decode("latin-1") for path in (rig.folder / "state").iterdir()]
    assert [text for text in everything if SECRET in text] == []


def test_a_host_that_is_away_is_unchecked_and_keeps_no_other_host_from_being_checked(rig: Rig, drifted: Ended) -> None:
    """Ansible itself ends a playbook when a play lost all its hosts."""
    (lost,) = drifted.report["unchecked"]
    assert (lost["host"], lost["reason"]) == ("away", "unreachable")
    assert drifted.report["hosts"] == ["away", "scratch"]
    assert drifted.report["problems"] == []


def test_each_finding_is_one_valid_event_of_the_trail(rig: Rig, drifted: Ended) -> None:
    events = rig.findings()
    assert len(events) == 21
    for event in events:
        validate(event)
        assert event["unmapped"]["saw"]["principal"].startswith("operator:")
    told = [event["unmapped"]["saw"] for event in events]
    assert sum(one["kind"] == "drift" for one in told) == 20
    assert [one["host"] for one in told if one["kind"] == "host_unchecked"] == ["away"]
    assert len({event["finding_info"]["uid"] for event in events}) == 21


def test_a_finding_is_told_once_while_it_stands_and_once_when_it_has_gone(rig: Rig, drifted: Ended) -> None:
    """The report is told again as it is, then without all drift but one; of the host that is away nothing is known then."""
    assert drifted.code == 1
    before = rig.findings()
    report = read_report(rig.folder / "report.json")
    kept = next(one for one in report.drift if one.task == "Nothing of it")
    mended = msgspec.structs.replace(
        report, drift=(kept,), unchecked=(), hosts=("scratch",), problems=("a play broke",)
    )
    told = []
    for now in (report, mended, mended):
        store = open_store(rig.folder / "state", ("broker",))
        try:
            record(now, store, factory_of("saw-drift"), datetime.now(UTC), lambda: str(uuid.uuid4()))
            deliver(store, "broker", TrailDestination(rig.lab.operator))
        finally:
            store.close()
        told.append(len(rig.findings()) - len(before))
    assert told == [0, 20, 20]
    new = rig.findings()[len(before) :]
    assert [event["status"] for event in new].count("Resolved") == 19
    opened = {event["finding_info"]["uid"]: event["unmapped"]["saw"] for event in before}
    for event in new:
        validate(event)
        if event["status"] == "Resolved":
            assert opened[event["finding_info"]["uid"]]["kind"] == "drift"
            assert opened[event["finding_info"]["uid"]].get("place") != kept.place


@pytest.mark.parametrize(
    "change",
    [{"kind": "other"}, {"finding": "not an id"}, {"place": "x" * 257}, {"value": "a"}, {"resolved": None}],
    ids=lambda change: next(iter(change)),
)
def test_the_broker_takes_no_finding_of_another_form(rig: Rig, change: dict[str, Any]) -> None:
    good = {"kind": "drift", "finding": str(uuid.uuid4()), "resolved": False, "host": "h", "task": "t", "place": "/x"}
    before = len(rig.findings())
    with pytest.raises(BrokerRefusal) as refused:
        rig.lab.operator.request("POST", "/v1/findings/drift", {**good, **change})
    assert (refused.value.code, len(rig.findings())) == ("malformed", before)
    assert rig.lab.operator.request("POST", "/v1/findings/drift", good) == {"recorded": True}
    assert len(rig.findings()) == before + 1
