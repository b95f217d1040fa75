"""The files of the role edr as they are rendered: their own programs take them, and audit's rules are of known forms."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from saw.edr.config import EdrConfig, read_config

ROLE = Path(__file__).resolve().parents[3] / "roles/edr"
pytestmark = pytest.mark.control("P0-03")
WATCH = re.compile(r"-w /[^ ]+ -p [rwxa]+ -k saw-[a-z]+")
CALL = re.compile(r"-a always,exit -F arch=b64 -S [a-z_0-9,]+( -F [a-z0-9]+(=|&)[0-9a-fx]+)* -k saw-[a-z]+")


def render(name: str, **variables: object) -> str:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    environment = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name).render({**defaults, "ansible_managed": "by a test", **variables})


def test_every_rule_of_audit_has_a_known_form_and_a_key():
    lines = [line for line in render("audit.rules.j2").splitlines() if line and not line.startswith("#")]
    assert len(lines) > 10
    assert [line for line in lines if not (WATCH.fullmatch(line) or CALL.fullmatch(line))] == []
    assert not WATCH.fullmatch("-w /etc/audit/ -p zz -k saw-tampering"), "the form refuses nothing"


def test_the_role_lets_no_rule_through_that_auditctl_would_stumble_over():
    [task] = yaml.safe_load((ROLE / "tasks/providers/embedded/policy.yml").read_text())
    [forms] = [one["lines"] for one in task["vars"]["edr_engine_files"] if one["dest"].endswith(".rules")]

    def taken(line):
        return any(re.fullmatch(form, line) for form in forms)

    lines = [line for line in render("audit.rules.j2").splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not taken(line)] == []
    for bad in (
        "-D",
        "-e 0",
        "-w etc -p wa -k saw-x",
        "-w /etc -p wa",
        "-a never,exit -F arch=b64 -S open -k saw-x",
        f"{lines[0]} -D",
    ):
        assert not taken(bad), bad


@pytest.mark.parametrize(("paths", "taken"), [(["/usr/bin", "/opt/saw"], True), (["/usr/bin ] nonsense"], False)])
def test_aide_takes_its_configuration(tmp_path, paths, taken):
    config = tmp_path / "aide.conf"
    config.write_text(render("aide.conf.j2", edr_integrity_paths=paths) + "\n")
    done = subprocess.run(["aide", f"--config={config}", "--config-check"], capture_output=True, check=False, text=True)
    assert (done.returncode == 0) is taken, done.stderr


@pytest.mark.parametrize(
    ("mirror", "line"),
    [
        ("database.clamav.net", "DatabaseMirror database.clamav.net"),
        ("https://mirror.example/clamav", "PrivateMirror https://mirror.example/clamav"),
        ("", "PrivateMirror none.invalid"),
        ("database.clamav.net\nNonsense yes", ""),
    ],
)
def test_freshclam_takes_its_configuration(tmp_path, mirror, line):
    config = tmp_path / "freshclam.conf"
    config.write_text(render("freshclam.conf.j2", edr_signatures_mirror=mirror) + "\n")
    done = subprocess.run(["freshclam", f"--config-file={config}", "--version"], capture_output=True, check=False)
    assert (done.returncode == 0) is bool(line)
    assert not line or line in config.read_text().splitlines()


@pytest.mark.parametrize("unit", ["saw-edr.service", "saw-edr-scan.service"])
def test_units_run_as_their_own_account_with_capabilities_that_only_read(unit):
    lines = dict(line.split("=", 1) for line in render(f"{unit}.j2").splitlines() if "=" in line)
    assert lines["User"] == "saw-edr"
    held = set(lines["CapabilityBoundingSet"].split())
    assert held == set(lines["AmbientCapabilities"].split()) <= {"CAP_DAC_READ_SEARCH", "CAP_SYS_PTRACE"}
    assert (lines["NoNewPrivileges"], lines["ProtectSystem"]) == ("yes", "strict")
    assert "ProtectKernelModules" not in lines, (
        "it hides a folder whose integrity is checked, so that all of it seems removed"
    )
    if unit == "saw-edr-scan.service":
        assert (lines["PrivateNetwork"], held) == ("yes", {"CAP_DAC_READ_SEARCH"})


# --- engines of others ---------------------------------------------------------------------------------------------------------

FALCO = {"edr_provider": "falco"}
AGENT = {"edr_provider": "wazuh", "edr_wazuh_manager": "siem.example.com", "edr_wazuh_ca": "ca.pem"}
MANAGER = {"edr_provider": "wazuh", "edr_wazuh_alerts": "/var/ossec/logs/alerts/alerts.json"}
SECRET = "enrol-me-7f3a"


def templar_of(**values: object) -> Templar:
    """Ansible's templating with the role's variables and ``values``."""
    own = {
        **yaml.safe_load((ROLE / "defaults/main.yml").read_text()),
        **yaml.safe_load((ROLE / "vars/main.yml").read_text()),
    }

    def trusted(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: trusted(one) for name, one in value.items()}
        if isinstance(value, list):
            return [trusted(one) for one in value]
        return trust_as_template(value) if isinstance(value, str) else value

    return Templar(loader=DataLoader(), variables={**trusted(own), **values})


def told(tmp_path: Path, **values: object) -> EdrConfig:
    """``/etc/saw/edr.json`` as the role writes it, read as the host does."""
    place = tmp_path / "edr.json"
    text = "{{ edr_config | combine(edr_config_of[edr_provider]) | to_json }}"
    place.write_text(str(templar_of(**values).template(trust_as_template(text))))
    return read_config(place)


def test_every_provider_is_told_to_the_watcher(tmp_path):
    embedded = told(tmp_path)
    assert (embedded.provider, embedded.alerts, embedded.vendor) == ("embedded", None, None)
    ignore = [{"kind": "engine_alert", "subject": "/srv/*", "reason": "our build"}]
    falco = told(tmp_path, **FALCO, edr_alerts_minimum="high", edr_ignore=ignore)
    assert (falco.alerts.format, falco.alerts.file, falco.alerts.minimum) == (
        "falco",
        "/var/log/falco/alerts.json",
        "high",
    )
    assert falco.vendor.service == "falco-modern-bpf.service"
    assert "/etc/falco" in falco.protected and falco.ignored("engine_alert", "/srv/x")
    agent = told(tmp_path, **AGENT)
    assert (agent.vendor.service, agent.alerts) == ("wazuh-agent.service", None)
    manager = told(tmp_path, **MANAGER)
    assert (manager.vendor.service, manager.alerts.format) == ("wazuh-manager.service", "wazuh")
    vendor = told(
        tmp_path, edr_provider="vendor_package", edr_vendor={"package": "a", "service": "a.service", "health": ["true"]}
    )
    assert (vendor.vendor.service, vendor.alerts) == ("a.service", None)


def test_falco_writes_what_is_read_and_no_command_lines_of_its_own():
    config = yaml.safe_load(render("falco.yaml.j2", edr_falco_folder="/var/log/falco"))
    assert config["file_output"] == {"enabled": True, "keep_alive": True, "filename": "/var/log/falco/alerts.json"}
    assert (config["json_output"], config["json_include_output_property"]) == (True, False)
    assert config["webserver"] == {"enabled": False}, "it would listen on all addresses"
    rotated = render("falco.logrotate.j2", edr_falco_folder="/var/log/falco")
    assert "systemctl kill --signal=USR1 falco-modern-bpf.service" in rotated


def test_the_agent_of_wazuh_knows_its_manager_and_runs_nothing_for_it():
    values = {**AGENT, "edr_wazuh_groups": ["saw", "edge"], "edr_wazuh_password": SECRET}
    text = render("ossec.conf.j2", **values)
    root = ET.fromstring(text)  # noqa: S314 - our own template
    assert (
        root.findtext("client/server/address")
        == root.findtext("client/enrollment/manager_address")
        == "siem.example.com"
    )
    assert root.findtext("client/enrollment/groups") == "saw,edge"
    assert root.findtext("client/enrollment/server_ca_path") == "etc/saw-manager-ca.pem"
    assert root.findtext("client/enrollment/authorization_pass_path") == "etc/authd.pass"
    assert root.findtext("active-response/disabled") == "yes"
    assert SECRET not in text
    assert {one.get("report_changes") for one in root.iter("directories")} == {"no"}, "contents would leave the host"
    assert ET.fromstring(render("ossec.conf.j2", **AGENT)).find("client/enrollment/authorization_pass_path") is None  # noqa: S314
    odd = render("ossec.conf.j2", **AGENT, edr_integrity_paths=["/srv/a&b<c"])
    assert "/srv/a&b<c" in [one.text for one in ET.fromstring(odd).iter("directories")]  # noqa: S314


def run(tmp_path: Path, *files: str, hosts: str = "localhost,", **values: object) -> tuple[int, str]:
    """Run files of the role's tasks in check mode on hosts that are this machine, which has none of these engines."""
    home = tmp_path / "collections/ansible_collections/secure_agent/workspace"
    if not home.exists():
        home.parent.mkdir(parents=True)
        home.symlink_to(ROLE.parents[1])
    step = {"ansible.builtin.include_role": {"name": "secure_agent.workspace.edr", "tasks_from": "{{ item }}"}}
    tasks = [{**step, "loop": list(files)}]
    named = {"ansible_python_interpreter": sys.executable, **values}
    play = [{"hosts": "all", "connection": "local", "gather_facts": False, "vars": named, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", hosts, "--check", "--diff", "-vv"]
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"), "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "play.yml")], capture_output=True, text=True, check=False, env=environment
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


#: What ``wazuh-control status`` of a manager writes; it ends with 1, as daemons are off that nobody configured.
STATUS = """\
wazuh-clusterd not running...
wazuh-modulesd is running...
wazuh-monitord is running...
wazuh-logcollector is running...
wazuh-remoted is running...
wazuh-syscheckd is running...
wazuh-analysisd is running...
wazuh-maild not running...
wazuh-execd is running...
wazuh-db is running...
wazuh-authd is running...
wazuh-dbd not running...
"""


@pytest.mark.parametrize(
    ("said", "well"),
    [
        (STATUS, True),
        (STATUS.replace("analysisd is", "analysisd not"), False),
        (STATUS.replace("wazuh-remoted is running...\n", ""), False),
        (STATUS.replace("wazuh-db is", "wazuh-db not").replace("wazuh-dbd not", "wazuh-dbd is"), False),
        ("wazuh-db: Process 7 not used by Wazuh, removing...\n" + STATUS, True),
        ("", False),
        ("ERROR: Another instance is locking this process.\n", False),
    ],
    ids=["optional ones are off", "analysisd", "remoted", "db, and dbd runs", "an old number", "nothing", "locked"],
)
@pytest.mark.parametrize("code", [0, 1])
def test_a_manager_of_wazuh_is_well_while_the_needed_daemons_run(tmp_path, said, well, code):
    control = tmp_path / "wazuh-control"
    (tmp_path / "said").write_text(said)
    control.write_text(f'#!/bin/sh\n[ "$*" = status ] || exit 9\ncat {tmp_path}/said\nexit {code}\n')
    control.chmod(0o755)
    health = told(tmp_path, **MANAGER).vendor.health
    assert health.count("/var/ossec/bin/wazuh-control") == 1
    command = [str(control) if one == "/var/ossec/bin/wazuh-control" else one for one in health]
    assert (subprocess.run(command, check=False).returncode == 0) is well


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (FALCO, ""),
        (AGENT, ""),
        (MANAGER, ""),
        ({"edr_provider": "wazuh"}, "needs edr_wazuh_manager for an agent, or edr_wazuh_alerts on a manager"),
        ({**AGENT, **MANAGER}, "needs edr_wazuh_manager for an agent, or edr_wazuh_alerts on a manager"),
        ({**AGENT, "edr_wazuh_ca": ""}, "gives the password to anybody"),
        ({**AGENT, "edr_wazuh_manager": "a b"}, "has to be a name or an address"),
        ({**AGENT, "edr_wazuh_groups": ["a,b"]}, "has to be a name or an address, and edr_wazuh_groups names"),
        ({"edr_repository": {"url": "https://m/", "suite": "s", "key": "k", "key_sha256": "0"}}, "belongs to edr_provider"),
        (
            {**FALCO, "edr_repository": {"url": "http://m/", "suite": "s", "key": "k", "key_sha256": "0"}},
            "has to be an https address",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_refused_first(values, words):
    first = yaml.safe_load((ROLE / "tasks/preflight.yml").read_text())[0]
    templar = templar_of(**values)
    holds = {one["words"]: templar.template(trust_as_template(one["holds"])) for one in first["loop"]}
    refused = [text for text, held in holds.items() if not held]
    assert (bool(refused), any(words in text for text in refused)) == (bool(words), bool(words)), refused


@pytest.mark.parametrize(
    ("values", "booted", "taken"),
    [(AGENT, True, True), (AGENT, False, False), (FALCO, False, True), ({}, False, True)],
    ids=str,
)
def test_no_agent_enrols_in_a_tree_that_is_not_booted(values, booted, taken):
    [task] = [
        one
        for one in yaml.safe_load((ROLE / "tasks/preflight.yml").read_text())
        if one["name"] == "Refuse to enrol an agent in an image"
    ]
    templar = templar_of(edr_booted={"stat": {"exists": booted}}, **values)
    assert templar.evaluate_conditional(trust_as_template(task["ansible.builtin.assert"]["that"])) is taken


@pytest.mark.thorough
def test_a_fresh_host_is_forecast_and_the_key_of_a_repository_is_the_named_one(tmp_path):
    key, ca, rule = (tmp_path / name for name in ("key.asc", "ca.pem", "ours.yaml"))
    key.write_text("-----BEGIN PGP PUBLIC KEY BLOCK-----\n")
    ca.write_text("-----BEGIN CERTIFICATE-----\n")
    rule.write_text("- rule: ours\n")
    repository = {
        "url": "https://mirror.example.com/deb", "suite": "stable", "components": ["main"], "key": str(key),
        "key_sha256": hashlib.sha256(key.read_bytes()).hexdigest(),
    }  # fmt: skip
    parts = ["install", "enrol", "policy"]
    booted = {"edr_booted": {"stat": {"exists": False}}}
    falco = {**FALCO, **booted, "edr_repository": repository, "edr_falco_rules": [str(rule)]}
    code, said = run(tmp_path, *(f"providers/falco/{one}.yml" for one in parts), **falco)
    assert code == 0, said
    for text in ("Signed-By: /etc/apt/keyrings/saw-edr.asc", "/etc/falco/rules.d/ours.yaml", "json_output: true"):
        assert text in said
    wazuh = {**AGENT, **booted, "edr_repository": repository, "edr_wazuh_ca": str(ca), "edr_wazuh_password": SECRET}
    code, said = run(tmp_path, *(f"providers/wazuh/{one}.yml" for one in parts), **wazuh)
    assert code == 0, said
    assert "<manager_address>siem.example.com</manager_address>" in said
    assert "/var/ossec/etc/authd.pass" in said and SECRET not in said
    other = {**falco, "edr_repository": {**repository, "key_sha256": "0" * 64}}
    code, said = run(tmp_path, "providers/falco/install.yml", **other)
    assert code != 0 and "has another SHA-256 than edr_repository.key_sha256" in said, said


@pytest.mark.thorough
def test_the_key_of_each_host_s_repository_is_looked_at(tmp_path):
    keys = {}
    for host in ("first", "second"):
        (tmp_path / f"{host}.asc").write_text(f"-----BEGIN PGP PUBLIC KEY BLOCK----- {host}\n")
        keys[host] = hashlib.sha256((tmp_path / f"{host}.asc").read_bytes()).hexdigest()

    def named(digests: dict[str, str]) -> tuple[int, str]:
        repository = {
            "url": "https://mirror.example.com/deb", "suite": "stable", "components": ["main"],
            "key": f"{tmp_path}/{{{{ inventory_hostname }}}}.asc", "key_sha256": "{{ digests[inventory_hostname] }}",
        }  # fmt: skip
        return run(
            tmp_path,
            "providers/repository.yml",
            hosts="first,second,",
            digests=digests,
            edr_repository=repository,
            **FALCO,
        )

    code, said = named(keys)
    assert code == 0, said
    code, said = named({**keys, "second": "0" * 64})
    assert code != 0, said
    assert "fatal: [second]" in said and "fatal: [first]" not in said
    assert "second.asc has another SHA-256 than edr_repository.key_sha256" in said
