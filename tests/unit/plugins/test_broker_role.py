"""The role broker: what it writes is a configuration that the broker reads, limits of rollouts included."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from saw.addressing import Band
from saw.audit.ship import load_settings
from saw.broker.config import BrokerConfig, ImageSettings, RolloutSettings, load_config
from saw.broker.forwarding_settings import ForwardingSettings
from saw.broker.notification_settings import Email, Kind, Webhook
from saw.broker.number_settings import NumberSettings
from saw.broker.step_up import StepUp, StepUpSettings
from saw.broker.terminal.settings import TerminalBastion
from saw.errors import ConfigError
from saw.jobs.config import load_config as load_worker
from saw.secrets.settings import SecretsSettings
from warm import programs

ROLE = Path(__file__).resolve().parents[3] / "roles/broker"


def variables() -> dict[str, object]:
    """The role's defaults and its own variables."""
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    return {**defaults, **yaml.safe_load((ROLE / "vars/main.yml").read_text())}


def templar_of(**values: object) -> Templar:
    """Ansible's templating with the role's variables, of which some are templates themselves, and ``values``."""
    own = {name: trust_as_template(told) if isinstance(told, str) else told for name, told in variables().items()}
    return Templar(loader=DataLoader(), variables={**own, **values})


#: A host that does not run systemd, such as a tree that an image is made of.
UNBOOTED = {"broker_init": {"stat": {"exists": False}}}


def template_of(name: str, place: Path, **values: object) -> None:
    """Write what Ansible's own templating makes of a template with the role's defaults and ``values``."""
    template = ROLE / "templates" / name
    command = [Path(sys.executable).parent / "ansible", "localhost", "-i", "localhost,", "-c", "local"]
    command += ["-m", "ansible.builtin.template", "-a", f"src={template} dest={place}"]
    told = {
        "ansible_python_interpreter": str(programs() / "python"),
        "broker_trust_domain": "saw.example",
        **variables(),
        **values,
    }
    done = subprocess.run([*command, "-e", json.dumps(told)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rendered(base: Path, **values: object) -> BrokerConfig:
    """The configuration that the role makes of ``values``, as the broker reads it."""
    place = base / "broker.json"
    template_of("broker.json.j2", place, **values)
    return load_config(place)


def test_the_defaults_of_the_role_are_those_of_the_broker(tmp_path: Path) -> None:
    found = rendered(tmp_path)
    assert found.rollout == RolloutSettings()
    assert found.postgresql is None
    assert (found.audit_socket, found.audit_group, found.terminal) == (None, None, None)
    assert "audit_" not in (tmp_path / "broker.json").read_text()
    assert "jobs" not in json.loads((tmp_path / "broker.json").read_text())


@pytest.mark.thorough
def test_ports_of_workspaces_are_granted_as_far_as_the_variable_says_and_not_at_all_without(tmp_path: Path) -> None:
    assert rendered(tmp_path).forwarding is None
    told = {"ports": [3000, "8000-8999"], "max_hours": "4", "blueprints": ["coding"]}
    found = rendered(tmp_path, broker_forwarding=told).forwarding
    assert found == ForwardingSettings(("3000", "8000-8999"), 4, ("coding",))
    assert rendered(tmp_path, broker_forwarding={"ports": ["3000"]}).forwarding == ForwardingSettings(("3000",))
    for bad in (
        {"max_hours": 4},
        {"ports": ["80"]},
        {"ports": ["3000"], "max_hours": 25},
        {"ports": ["3000"], "more": 1},
    ):
        with pytest.raises(ConfigError):
            rendered(tmp_path, broker_forwarding=bad)


def test_every_limit_of_a_rollout_can_be_set(tmp_path: Path) -> None:
    wanted = RolloutSettings(
        max_refused=2,
        max_silent_s=60,
        max_deny_rate_increase=0.25,
        min_calls=5,
        first_wave=3,
        soak_s=30,
        require_rollback=True,
    )
    names = RolloutSettings.__struct_fields__
    # As on a command line (-e name=value) too, where every value is text.
    for values in (
        {f"broker_rollout_{name}": getattr(wanted, name) for name in names},
        {f"broker_rollout_{name}": str(getattr(wanted, name)).lower() for name in names},
    ):
        assert rendered(tmp_path, **values).rollout == wanted


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "value"),
    [("max_silent_s", 9), ("max_deny_rate_increase", 1.5), ("min_calls", 0), ("soak_s", -1), ("max_refused", -1)],
)
def test_a_limit_out_of_range_is_refused_before_the_file_is_taken(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"rollout\.{name} must be"):
        rendered(tmp_path, **{f"broker_rollout_{name}": value})
    tasks = yaml.safe_load((ROLE / "tasks/service.yml").read_text())
    [entry] = [one for one in tasks[0]["secure_agent.workspace.component"]["files"] if one["dest"].endswith(".json")]
    assert entry["validate"][0] == "/opt/saw/bin/saw"
    check = [sys.executable, "-m", "saw.cli.main", *entry["validate"][1:-1], str(tmp_path / "broker.json")]
    refused = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (refused.returncode, f"rollout.{name} must be" in refused.stderr) == (1, True), (
        "the host runs the same check"
    )


SSO = {
    "origin": "https://saw.example.com:8445",
    "provider": {"issuer": "https://idp.example.com", "client_id": "saw", "client_secret_file": "/etc/saw/oidc.secret"},
    "roles": {"approver": ["approvers"]},
}
TERMINAL = {"bastion": {"host": "edge.example.com"}}


def test_single_sign_on_is_off_until_it_is_configured(tmp_path: Path) -> None:
    assert rendered(tmp_path).sso is None
    assert "sso" not in json.loads((tmp_path / "broker.json").read_text())
    found = rendered(tmp_path, broker_sso=SSO).sso
    assert found is not None
    assert (found.origin, found.provider.issuer) == (SSO["origin"], "https://idp.example.com")
    # The secret itself is in neither file: systemd hands it over.
    assert found.provider.client_secret_file == "/run/credentials/saw-broker.service/oidc-client-secret"
    public = rendered(
        tmp_path, broker_sso={**SSO, "provider": {"issuer": "https://idp.example.com", "client_id": "saw"}}
    )
    assert public.sso is not None
    assert public.sso.provider.client_secret_file is None


def test_changes_of_the_job_worker_are_no_alarm_and_those_of_others_are_as_told(tmp_path: Path) -> None:
    jobs = next(one for one in JOBS if "ansible" in one)
    for named, jobs_of, listed in (
        ({}, jobs, ("saw-worker",)),
        ({"automation": ["ci", "saw-worker"]}, jobs, ("ci", "saw-worker")),
        ({"automation": ["ci"]}, {}, ("ci",)),
        ({}, {}, ()),
    ):
        found = rendered(tmp_path, broker_sso={**SSO, **named}, broker_jobs=jobs_of).sso
        assert found is not None
        assert found.automation == listed


def test_numbers_are_told_and_those_of_before_stay(tmp_path: Path) -> None:
    assert rendered(tmp_path).numbers == NumberSettings(most=1000)
    assert "numbers" not in json.loads((tmp_path / "broker.json").read_text())
    told = {"most": 5000, "places": {"east": {"first": 5001, "last": 6000}}}
    assert rendered(tmp_path, broker_numbers=told).numbers == NumberSettings(5000, {"east": Band(5001, 6000)})
    with pytest.raises(ConfigError):
        rendered(tmp_path, broker_numbers={"most": 64_001})


def test_step_up_is_told_as_it_is(tmp_path: Path) -> None:
    told = {"reviews": {"max_age_s": 600}, "groups": {"security": {"acr": ["phr"]}}}
    found = rendered(tmp_path, broker_sso={**SSO, "step_up": told}).sso
    assert found is not None
    assert found.step_up == StepUpSettings(reviews=StepUp(max_age_s=600), groups={"security": StepUp(acr=("phr",))})
    with pytest.raises(ConfigError):
        rendered(tmp_path, broker_sso={**SSO, "step_up": {"reviews": {}}})


def test_the_unit_is_handed_the_secret_and_is_as_before_without(tmp_path: Path) -> None:
    unit, place = "saw-broker.service.j2", tmp_path / "saw-broker.service"
    template_of(unit, place)
    plain = place.read_text().splitlines()
    assert "RestartSec=1" in plain
    template_of(unit, place, broker_sso=SSO, broker_terminal=TERMINAL)
    given = place.read_text().splitlines()
    # nothing else of the unit's confinement is given up for terminals
    assert [line for line in given if line not in plain] == [
        "LoadCredential=oidc-client-secret:/etc/saw/oidc.secret",
        "# ssh of a terminal is confined before it starts",
        "SystemCallFilter=landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    ]
    assert [line for line in plain if line not in given] == []
    assert [line for line in plain if "LoadCredential" in line] == [
        "LoadCredentialEncrypted=saw-secrets:/etc/credstore.encrypted/saw-secrets"
    ]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"origin": "http://saw.example.com"}, "sso.origin"),
        ({"origin": "https://saw.example.com/"}, "sso.origin"),
        ({"rp_id": "other.example"}, "sso.rp_id"),
        ({"provider": {"issuer": "http://idp.example.com", "client_id": "saw"}}, "sso.provider.issuer"),
        ({"provider": {**SSO["provider"], "algorithms": ["HS256"]}}, "sso.provider.algorithms"),
        ({"provider": {**SSO["provider"], "algorithms": ["none"]}}, "sso.provider.algorithms"),
        ({"provider": {**SSO["provider"], "skew_s": 3600}}, "sso.provider.skew_s"),
        ({"provider": {**SSO["provider"], "client_secret": "x"}}, "client_secret"),
        ({"roles": {}}, "sso.roles"),
        ({"roles": {"root": ["x"]}}, "sso.roles"),
        ({"session": {"recheck_s": 1}}, "sso.session.recheck_s"),
        ({"key_file": "/etc/saw/pages.key"}, "sso.certificate_file"),
    ],
    ids=str,
)
def test_a_wrong_field_of_single_sign_on_is_named(tmp_path: Path, change: dict[str, object], field: str) -> None:
    path = tmp_path / "broker.json"
    base = {
        "trust_domain": "saw.example",
        "state_dir": "/s",
        "operator_socket": "/o",
        "server_names": ["b.saw.internal"],
    }
    path.write_text(json.dumps({**base, "sso": SSO}))
    assert load_config(path).sso is not None
    path.write_text(json.dumps({**base, "sso": {**SSO, **change}}))
    with pytest.raises(ConfigError, match=field.rpartition(".")[2]):
        load_config(path)


PAGE = (ROLE.parents[1] / "docs/audit.md").read_text(encoding="utf-8")
#: As the page on the audit trail shows it.
SHIP = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])["broker_audit_ship"]


#: How long it is kept, as the same page shows it.
KEPT = yaml.safe_load(
    next(part for part in PAGE.split("```yaml\n") if part.startswith("broker_audit_retention")).partition("```")[0]
)["broker_audit_retention"]


def written(folder: Path, names: list[str], **values: object) -> dict[str, str]:
    """What one run of Ansible makes of several templates with the role's defaults and ``values``."""
    tasks = [
        {"ansible.builtin.template": {"src": str(ROLE / "templates" / f"{name}.j2"), "dest": str(folder / name)}}
        for name in names
    ]
    told = {
        "ansible_python_interpreter": str(programs() / "python"),
        "broker_trust_domain": "saw.example",
        **variables(),
        **values,
    }
    play = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": told, "tasks": tasks}]
    (folder / "play.yml").write_text(yaml.safe_dump(play))
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", str(folder / "play.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: (folder / name).read_text() for name in names}


def test_the_trail_is_shipped_where_it_was_asked_for(tmp_path: Path) -> None:
    names = ["broker.json", "audit.json", "saw-audit-ship.service", "sysusers.conf"]
    jobs = {"retention": "30d"}
    files = written(tmp_path, names, broker_audit_ship=SHIP, broker_audit_retention=KEPT, broker_jobs=jobs)
    found, settings = load_config(tmp_path / "broker.json"), load_settings(tmp_path / "audit.json")
    assert (found.audit_socket, found.audit_group) == ("/run/saw/broker/audit.sock", "saw-audit")
    assert settings.socket == found.audit_socket
    assert settings.receiver.key_file == "/run/credentials/saw-audit-ship.service/client-key"
    assert "LoadCredential=client-key:/etc/saw/siem-client.key" in files["saw-audit-ship.service"]
    assert "m saw-broker saw-audit" in files["sysusers.conf"]
    # What goes has been acknowledged by the receiver: the forwarder's cursor is where the broker looks.
    assert found.audit is not None
    assert (found.audit.days, found.audit.shipped) == (400, f"{settings.state_dir}/cursor.json")
    assert found.jobs is not None
    assert found.jobs.retention == "30d"


def test_an_otlp_receiver_is_that_of_the_page_and_its_token_is_handed_over(tmp_path: Path) -> None:
    page = next(part for part in PAGE.split("```yaml\n") if "protocol: otlp" in part.partition("```")[0])
    shown = yaml.safe_load(page.partition("```")[0])["broker_audit_ship"]
    files = written(tmp_path, ["audit.json", "saw-audit-ship.service"], broker_audit_ship=shown)
    receiver = load_settings(tmp_path / "audit.json").receiver
    assert (receiver.protocol, receiver.token_file) == ("otlp", "/run/credentials/saw-audit-ship.service/token")
    assert "LoadCredential=token:/etc/saw/otel-token" in files["saw-audit-ship.service"]
    assert "client-key" not in files["audit.json"] + files["saw-audit-ship.service"]


def test_without_a_client_key_none_is_handed_over_and_a_wrong_receiver_is_refused(tmp_path: Path) -> None:
    plain = {name: SHIP["receiver"][name] for name in ("host", "port", "ca_file")}
    files = written(tmp_path, ["audit.json", "saw-audit-ship.service"], broker_audit_ship={"receiver": plain})
    assert load_settings(tmp_path / "audit.json").receiver.key_file is None
    assert "LoadCredential" not in files["saw-audit-ship.service"]
    task = yaml.safe_load((ROLE / "tasks/audit_ship.yml").read_text())[0]
    entry = task["secure_agent.workspace.component"]["files"][0]
    check = [sys.executable, "-m", "saw.cli.main", *entry["validate"][1:-1], str(tmp_path / "audit.json")]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    (tmp_path / "audit.json").write_text(files["audit.json"].replace(str(plain["port"]), "0"))
    assert subprocess.run(check, capture_output=True, check=False).returncode == 1


GATES = (ROLE.parents[1] / "docs/approval-gate.md").read_text(encoding="utf-8").split("```yaml\n")


def test_gates_and_machines_are_those_of_the_page(tmp_path: Path) -> None:
    values = {}
    for part in GATES[1:]:
        found = yaml.safe_load(part.partition("```")[0])
        values |= (
            {name: value for name, value in found.items() if name.startswith("broker_")}
            if isinstance(found, dict)
            else {}
        )
    assert set(values) == {"broker_gates", "broker_machines", "broker_machine_audience"}
    config = rendered(tmp_path, broker_sso=SSO, **values)
    assert config.gates["rolling-update"].quorum == 2
    assert (config.machines["awx"].scopes, config.machines["awx"].oauth_client) == (
        ("gate:rolling-update",),
        "awx-jobs",
    )
    assert config.machine_audience == "https://saw.example.com/broker"
    assert rendered(tmp_path).gates == {}
    with pytest.raises(ConfigError, match="oauth_client needs sso"):
        rendered(tmp_path, **values)


def test_who_can_break_the_glass_is_as_on_the_page(tmp_path: Path) -> None:
    page = (ROLE.parents[1] / "docs/break-glass.md").read_text(encoding="utf-8")
    values = yaml.safe_load(page.split("```yaml\n")[1].partition("```")[0])
    found = rendered(tmp_path, **values).break_glass
    assert (found.group, found.keys, found.last_s, found.review_within_s) == ("break-glass", 2, 900, 86_400)
    assert rendered(tmp_path).break_glass is None
    with pytest.raises(ConfigError, match=r"break_glass.keys must be 2 to 8"):
        rendered(tmp_path, broker_break_glass={"group": "break-glass", "keys": 1})


TOLD = yaml.safe_load(
    (ROLE.parents[1] / "docs/notifications.md")
    .read_text(encoding="utf-8")
    .partition("```yaml\n")[2]
    .partition("```")[0]
)["broker_notifications"]


def test_who_is_told_is_that_of_the_page_and_secrets_are_handed_over(tmp_path: Path) -> None:
    (tmp_path / "broker.json").write_text(templated("broker.json", broker_notifications=TOLD))
    hook, mail = load_config(tmp_path / "broker.json").notifications
    assert isinstance(hook, Webhook)
    assert isinstance(mail, Email)
    given = "/run/credentials/saw-broker.service/notify-"
    assert (hook.secret_file, mail.password_file) == (f"{given}chat", f"{given}mail")
    assert mail.recipients("maintainers") == ("ben@example.com", "cleo@example.com")
    assert mail.recipients("") == ("operations@example.com",)
    plain = templated("saw-broker.service").splitlines()
    unit = templated("saw-broker.service", broker_notifications=TOLD).splitlines()
    assert [line for line in unit if line not in plain] == [
        "LoadCredential=notify-chat:/etc/saw/chat.secret",
        "LoadCredential=notify-mail:/etc/saw/mail.password",
    ]
    # numbers as texts, as variables of an inventory often are, and a channel without a login
    local = {"name": "local", "type": "email", "host": "127.0.0.1", "port": "25", "tls": "none"}
    local |= {"from": "saw@example.com", "to": ["ops@example.com"], "ca_file": "/etc/saw/mail-ca.pem"}
    (tmp_path / "broker.json").write_text(templated("broker.json", broker_notifications=[local]))
    [found] = load_config(tmp_path / "broker.json").notifications
    assert isinstance(found, Email)
    assert (found.port, found.password_file) == (25, None)
    assert templated("saw-broker.service", broker_notifications=[local]).splitlines() == plain
    assert "notifications" not in json.loads(templated("broker.json"))


def test_channels_are_taken_by_the_specification_and_their_files_are_waited_for() -> None:
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    spec = ArgumentSpecValidator({"broker_notifications": options["broker_notifications"]})
    assert spec.validate({"broker_notifications": TOLD}).error_messages == []
    assert spec.validate({"broker_notifications": [{**TOLD[0], "colour": "red"}]}).error_messages
    assert set(options["broker_notifications"]["options"]) == {"type"} | {
        name for kind in (Webhook, Email) for name in kind.__struct_encode_fields__
    }
    assert [Kind(name) for name in options["broker_notifications"]["options"]["kinds"]["choices"]] == [
        kind for kind in Kind if kind is not Kind.TEST
    ]
    service = yaml.safe_load((ROLE / "tasks/service.yml").read_text())[0]
    told = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    told |= {"broker_notifications": [TOLD[0], {**TOLD[1], "ca_file": "/etc/saw/mail-ca.pem"}]}
    templar = Templar(loader=DataLoader(), variables=told)
    assert sorted(templar.template(trust_as_template(service["vars"]["broker_secret_files"]))) == [
        "/etc/saw/chat.secret", "/etc/saw/mail-ca.pem", "/etc/saw/mail.password",
    ]  # fmt: skip


def test_terminals_are_what_the_variable_says(tmp_path: Path) -> None:
    found = rendered(tmp_path, broker_sso=SSO, broker_terminal={**TERMINAL, "per_person": 2}).terminal
    assert found is not None
    assert (found.files_dir, found.bastion, found.per_person) == (
        "/opt/saw/share/terminal", TerminalBastion("edge.example.com", 2222, "saw-session"), 2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"bastion": {"host": "edge example"}}, "terminal.bastion.host"),
        ({"bastion": {"host": "-oProxyCommand=x"}}, "terminal.bastion.host"),
        ({"bastion": {"host": "edge.example.com", "port": 0}}, "terminal.bastion.port"),
        ({"bastion": {"host": "edge.example.com", "user": "-l"}}, "terminal.bastion.user"),
        ({"source_address": "10.0.0.1,elsewhere"}, "terminal.source_address"),
        ({"per_person": 65}, "terminal.per_person"),
        ({"in_all": 1001}, "terminal.in_all"),
        ({"runtime_dir": "run"}, "terminal.runtime_dir"),
        ({"emulator": "x"}, "emulator"),
    ],
    ids=str,
)
def test_a_wrong_field_of_terminals_is_named(tmp_path: Path, change: dict[str, object], field: str) -> None:
    path = tmp_path / "broker.json"
    names = {
        "trust_domain": "saw.example",
        "state_dir": "/s",
        "operator_socket": "/o",
        "server_names": ["b.saw.internal"],
    }
    base = {**names, "sso": SSO}
    good: dict[str, object] = {"files_dir": "/f", **TERMINAL, "source_address": "10.77.0.10,fd00::/64"}
    path.write_text(json.dumps({**base, "terminal": good}))
    assert load_config(path).terminal is not None
    path.write_text(json.dumps({**base, "terminal": {**good, **change}}))
    with pytest.raises(ConfigError, match=re.escape(field)):
        load_config(path)
    path.write_text(json.dumps({**names, "terminal": good}))
    with pytest.raises(ConfigError, match="terminal needs sso"):
        load_config(path)


def test_the_terminal_emulator_is_the_pinned_one_or_the_run_ends_with_the_cure(tmp_path: Path) -> None:
    modules, installed = tmp_path / "node_modules", tmp_path / "installed"
    pinned = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    for one in pinned["broker_terminal_emulator"]:
        (modules / one["file"]).parent.mkdir(parents=True)
        shutil.copy(ROLE / "files/terminal/node_modules" / one["file"], modules / one["file"])
    text = (ROLE / "tasks/terminal.yml").read_text().replace("/opt/saw/share/terminal", str(installed))
    tasks = [task for task in yaml.safe_load(text) if "ansible.builtin.apt" not in task]
    assert len(tasks) == 2
    told = {
        **pinned, "broker_terminal_files": str(modules), "role_path": str(ROLE), "ansible_python_interpreter": sys.executable,
    }  # fmt: skip
    play = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": told, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    link = tmp_path / "collections/ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROLE.parents[1])

    def run() -> str:
        command = [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", str(tmp_path / "play.yml")]
        environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections")}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        return "" if done.returncode == 0 else " ".join(done.stdout.split())

    assert run() == ""
    assert {hashlib.sha256(path.read_bytes()).hexdigest() for path in installed.iterdir()} == {
        one["sha256"] for one in pinned["broker_terminal_emulator"]
    }
    changed = modules / "@xterm/addon-fit/lib/addon-fit.js"
    changed.write_text(changed.read_text() + " ")
    (modules / "@xterm/xterm/lib/xterm.js").unlink()
    refused = run()
    assert f"{changed} is missing, or is another version" in refused
    assert f"{modules}/@xterm/xterm/lib/xterm.js is missing, or is another version" in refused
    assert f"npm ci --ignore-scripts --prefix {ROLE}/files/terminal" in refused


def templated(name: str, **values: object) -> str:
    """What Ansible's templating makes of a template, within this process."""
    text = trust_as_template((ROLE / "templates" / f"{name}.j2").read_text())
    return str(templar_of(ansible_managed="by Ansible", broker_trust_domain="saw.example", **values).template(text))


PAGE_OF_JOBS = (ROLE.parents[1] / "docs/jobs.md").read_text(encoding="utf-8").split("```yaml\n")
#: As the page on jobs shows them: playbooks on the control host, and AWX.
JOBS = [
    found["broker_jobs"]
    for part in PAGE_OF_JOBS[1:]
    if "broker_jobs" in (found := yaml.safe_load(part.partition("```")[0]))
]


@pytest.mark.control("LIF-01")
def test_lifecycle_jobs_are_run_as_the_page_says(tmp_path: Path) -> None:
    names = ["broker.json", "worker.json", "saw-worker.service", "sysusers.conf"]
    plain, ansible, awx = [tmp_path / name for name in ("plain", "ansible", "awx")]
    for folder, jobs in ((plain, {}), (ansible, JOBS[0]), (awx, JOBS[1])):
        folder.mkdir()
        for name in names:
            (folder / name).write_text(templated(name, broker_jobs=jobs, broker_worker_saw="/s"))
    assert load_config(plain / "broker.json").jobs is None
    assert "saw-worker" not in (plain / "sysusers.conf").read_text() + (plain / "broker.json").read_text()
    found = load_config(ansible / "broker.json").jobs
    assert found is not None
    assert (found.worker_socket, found.worker_group) == ("/run/saw/broker/worker.sock", "saw-worker")
    assert "m saw-broker saw-worker" in (ansible / "sysusers.conf").read_text()
    worker = load_worker(ansible / "worker.json")
    assert worker.broker_socket == found.worker_socket
    assert worker.ansible is not None
    assert worker.ansible.key_file == "/run/credentials/saw-worker.service/ssh-key"
    unit = (ansible / "saw-worker.service").read_text()
    assert f"LoadCredential=ssh-key:{JOBS[0]['ansible']['key_file']}" in unit
    assert "SupplementaryGroups=saw-operators" in unit
    assert "awx-token" not in unit
    worker, unit = load_worker(awx / "worker.json"), (awx / "saw-worker.service").read_text()
    assert worker.awx is not None
    assert worker.awx.token_file == "/run/credentials/saw-worker.service/awx-token"
    assert f"LoadCredential=awx-token:{JOBS[1]['awx']['token_file']}" in unit
    assert "saw-operators" not in unit  # AWX brings its own way to the broker


@pytest.mark.control("LIF-01")
def test_the_host_checks_the_workers_configuration_before_it_is_taken(tmp_path: Path) -> None:
    tasks = yaml.safe_load((ROLE / "tasks/jobs.yml").read_text())
    [part] = [task["secure_agent.workspace.component"] for task in tasks if task["name"] == "Run lifecycle jobs"]
    [entry] = [one for one in part["files"] if one["dest"] == "/etc/saw/worker.json"]
    assert entry["validate"][1:] == ["worker", "check", "--config", "%s"]
    good = {"state_dir": "/s", "broker_socket": "/b", "ansible": {"inventory": str(tmp_path)}}
    command = [sys.executable, "-m", "saw.cli.main", "worker", "check", "--config", str(tmp_path / "worker.json")]
    for settings, code in ((good, 0), ({**good, "ansible": {"inventory": "/missing"}}, 1), ({**good, "more": 1}, 1)):
        (tmp_path / "worker.json").write_text(json.dumps(settings))
        assert subprocess.run(command, capture_output=True, check=False).returncode == code


REPLICAS = (
    (ROLE.parents[1] / "docs/replicas.md").read_text(encoding="utf-8").partition("```yaml\n")[2].partition("```")[0]
)


def test_a_database_of_postgresql_is_that_of_the_page_and_its_files_are_waited_for(tmp_path: Path) -> None:
    database = yaml.safe_load(REPLICAS)["broker_database"]
    needs = yaml.safe_load((ROLE / "tasks/service.yml").read_text())[0]["vars"]["broker_secret_files"]
    parts = [(ROLE / "templates" / name).read_text() for name in ("broker.json.j2", "saw-broker.service.j2")]
    together = tmp_path / "all.j2"
    together.write_text("\n=====\n".join([*parts, f"{needs}"]))
    template_of(str(together), tmp_path / "all", broker_database=database)
    config, unit, files = (tmp_path / "all").read_text().split("\n=====\n")
    (tmp_path / "broker.json").write_text(config)
    assert load_config(tmp_path / "broker.json").postgresql == database
    assert "RestartSec=8\n" in unit, "a database elsewhere may be away for longer than ten quick starts take"
    assert sorted(yaml.safe_load(files)) == ["/etc/saw/broker.pgpass", "/etc/saw/database-ca.pem"]


@pytest.mark.control("ID-01")
def test_files_of_operators_are_waited_for_and_the_accounts_that_they_belong_to_come_first() -> None:
    first = yaml.safe_load((ROLE / "tasks/main.yml").read_text())[0]
    assert first["ansible.builtin.import_tasks"] == "accounts.yml"
    service = yaml.safe_load((ROLE / "tasks/service.yml").read_text())[0]
    assert "/etc/sysusers.d/saw-broker.conf" in service["secure_agent.workspace.component"]["watch"], (
        "groups need a restart"
    )
    provider = {**SSO["provider"], "ca_file": "/etc/saw/idp.pem"}
    pages = {"certificate_file": "/etc/saw/pages.pem", "key_file": "/etc/saw/pages.key"}
    asked = {"broker_secret_files": service, "broker_page_files": service}
    asked["broker_worker_files"] = next(
        task for task in yaml.safe_load((ROLE / "tasks/jobs.yml").read_text()) if task["name"] == "Run lifecycle jobs"
    )

    def waited_for(**values: object) -> dict[str, list[str]]:
        templar = templar_of(**values)
        return {name: templar.template(trust_as_template(task["vars"][name])) for name, task in asked.items()}

    assert waited_for(broker_sso={**SSO, **pages, "provider": provider}, broker_jobs=JOBS[0]) == {
        "broker_secret_files": ["/etc/saw/oidc.secret", "/etc/saw/idp.pem"],
        "broker_page_files": ["/etc/saw/pages.pem", "/etc/saw/pages.key"],
        "broker_worker_files": ["/etc/saw/fleet/inventory", "/etc/saw/fleet/known_hosts", "/etc/saw/fleet/collections"],
    }
    vault = {
        "url": "https://v.example.com",
        "ca_file": "/etc/saw/v.pem",
        "approle": {"role_id": "r", "secret_id_file": "/etc/saw/v.id"},
    }
    assert waited_for(broker_secrets={"provider": "vault", "vault": vault})["broker_page_files"] == [
        "/etc/saw/v.pem",
        "/etc/saw/v.id",
    ]
    assert waited_for(broker_jobs=JOBS[1])["broker_worker_files"] == ["/etc/saw/awx-ca.pem"]
    assert waited_for() == {name: [] for name in asked}


SECRETS = [
    yaml.safe_load(part.partition("```")[0])["broker_secrets"]
    for part in (ROLE.parents[1] / "docs/broker.md").read_text(encoding="utf-8").split("```yaml\n")[1:]
    if "broker_secrets" in part.partition("```")[0]
]


@pytest.mark.thorough
@pytest.mark.control("ID-01")
def test_secrets_are_sealed_until_the_page_says_otherwise(tmp_path: Path) -> None:
    unit = "saw-broker.service.j2"
    move = "ExecStartPre=/opt/saw/bin/saw broker secrets move --config /etc/saw/broker.json"
    load = "LoadCredentialEncrypted=saw-secrets:/etc/credstore.encrypted/saw-secrets"
    assert rendered(tmp_path).secrets == SecretsSettings("sealed")
    template_of(unit, tmp_path / "default")
    assert {move, load} <= set((tmp_path / "default").read_text().splitlines())
    # what does not run has no key of its own yet
    assert rendered(tmp_path, **UNBOOTED).secrets == SecretsSettings()
    assert "secrets" not in json.loads((tmp_path / "broker.json").read_text())
    template_of(unit, tmp_path / "plain", **UNBOOTED)
    plain = (tmp_path / "plain").read_text().splitlines()
    assert move not in plain and not any("Credential" in line for line in plain)
    told = []
    for number, secrets in enumerate(SECRETS):
        found = rendered(tmp_path, broker_secrets=secrets).secrets
        template_of(unit, tmp_path / str(number), broker_secrets=secrets)
        lines = (tmp_path / str(number)).read_text().splitlines()
        assert (
            lines.index(move)
            == lines.index("ExecStartPre=/opt/saw/bin/saw broker init --config /etc/saw/broker.json") - 1
        )
        told.append((found.provider, load in lines, "RestartSec=8" in lines))
        assert set(lines) - set(plain) <= {move, load, "RestartSec=8"}, "nothing else of the unit changes"
    # a place that keys are moved from is named too, and then its key is still handed over
    assert sorted(told) == [
        ("files", False, False),
        ("files", True, False),
        ("sealed", True, False),
        ("vault", False, True),
    ]
    for named in ({"sealed": {"credential": "other"}}, {"provider": "sealed", "sealed": {"credential": "other"}}):
        assert rendered(tmp_path, broker_secrets=named).secrets.provider == "sealed"
        template_of(unit, tmp_path / "named", broker_secrets=named)
        assert "LoadCredentialEncrypted=other:/etc/credstore.encrypted/other" in (tmp_path / "named").read_text()
    with pytest.raises(ConfigError, match=r"secrets\.vault is missing"):
        rendered(tmp_path, broker_secrets={"provider": "vault"})


def test_the_key_of_sealed_secrets_is_made_once_on_a_host_that_runs() -> None:
    [task] = yaml.safe_load((ROLE / "tasks/secrets.yml").read_text())
    command = task["ansible.builtin.command"]
    templar = templar_of()
    argv = templar.template([trust_as_template(part) for part in command["argv"]])
    options = ["--name=saw-secrets", "--out=/etc/credstore.encrypted/saw-secrets", "--with-key=auto"]
    assert argv == ["/opt/saw/bin/saw", "broker", "secrets", "key", *options]
    assert templar.template(trust_as_template(command["creates"])) == "/etc/credstore.encrypted/saw-secrets"
    assert command["removes"] == "/run/systemd/system"
    main = yaml.safe_load((ROLE / "tasks/main.yml").read_text())
    names = [step.get("ansible.builtin.include_tasks") or step.get("ansible.builtin.import_tasks") for step in main]
    assert names.index("secrets_place.yml") < names.index("secrets.yml") < names.index("service.yml")
    [step] = [one for one in main if one.get("ansible.builtin.include_tasks") == "secrets.yml"]
    for values, wanted in (
        ({}, True),
        (UNBOOTED, False),
        ({"broker_secrets": {"provider": "files"}}, False),
        ({"broker_secrets": {"provider": "sealed"}}, True),
        ({"broker_secrets": {"provider": "files", "sealed": {}}}, True),
        ({"broker_secrets": {"provider": "vault"}}, False),
    ):
        assert templar_of(**values).evaluate_conditional(trust_as_template(step["when"])) is wanted, values


def placed(
    tmp_path: Path, *, booted: bool, creds: bool = True, key: bool = False, check: bool = False, **values: object
) -> str:
    """What the role says of where keys are, on a host below ``tmp_path``: the real tasks, with the host's paths moved there."""
    host = tmp_path / "host"
    shutil.rmtree(host, ignore_errors=True)
    (host / "bin").mkdir(parents=True)
    if booted:
        (host / "run").mkdir()
    if key:
        (host / "saw-secrets").write_text("sealed")
    if creds:
        (host / "bin/systemd-creds").write_text("#!/bin/sh\n")
        (host / "bin/systemd-creds").chmod(0o755)
    text = (ROLE / "tasks/secrets_place.yml").read_text()
    text = text.replace("/run/systemd/system", str(host / "run")).replace("/etc/credstore.encrypted", str(host))
    tasks = yaml.safe_load(text.replace("[systemd-creds,", f"[{host}/bin/systemd-creds,"))
    told = {"ansible_python_interpreter": sys.executable, "broker_trust_domain": "saw.example", **variables(), **values}
    play = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "vars": told, "tasks": tasks}]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(play))
    command = [Path(sys.executable).parent / "ansible-playbook", "-i", "localhost,", str(tmp_path / "play.yml")]
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1"}
    done = subprocess.run(
        [*command, *(["--check"] if check else [])], capture_output=True, text=True, check=False, env=environment
    )
    assert "changed=0" in done.stdout, done.stdout + done.stderr
    return ("refused: " if done.returncode else "") + " ".join(done.stdout.split())


@pytest.mark.thorough
def test_plain_files_are_loud_and_what_cannot_be_sealed_is_refused(tmp_path: Path) -> None:
    loud = "WARNING: the broker's own keys are in plain files"
    for check in (False, True):
        sealed = placed(tmp_path, booted=True, check=check)
        assert not sealed.startswith("refused") and loud not in sealed
        plain = placed(tmp_path, booted=True, check=check, broker_secrets={"provider": "files"})
        assert loud in plain and "Take {provider: files} out of broker_secrets" in plain
    assert "the first run on the running host seals them" in placed(tmp_path, booted=False, creds=False)
    refused = placed(tmp_path, booted=True, creds=False)
    assert refused.startswith("refused") and "systemd-creds does not run here" in refused
    assert loud in placed(tmp_path, booted=True, creds=False, broker_secrets={"provider": "files"})


@pytest.mark.thorough
def test_brokers_that_share_their_files_get_no_key_of_each_host_by_default(tmp_path: Path) -> None:
    shared = {"broker_database": "postgresql://saw@db.example.com/saw"}
    refused = placed(tmp_path, booted=True, **shared)
    assert refused.startswith("refused") and "brokers on one database need the same key" in refused
    assert not placed(tmp_path, booted=True, key=True, **shared).startswith("refused")
    assert not placed(tmp_path, booted=True, broker_secrets={"provider": "sealed"}, **shared).startswith("refused")
    assert not placed(tmp_path, booted=False, **shared).startswith("refused")


@pytest.mark.control("IMG-01")
def test_images_are_searched_before_they_are_registered(tmp_path: Path) -> None:
    found = rendered(tmp_path).image
    assert found.require == ("sbom", "provenance", "scan", "advisories")
    assert found.scan_max_age_s == ImageSettings().scan_max_age_s == 7 * 86_400
    assert rendered(tmp_path, broker_image_scan_max_age="86400").image.scan_max_age_s == 86_400
    with pytest.raises(ConfigError, match="scan_max_age_s"):
        rendered(tmp_path, broker_image_scan_max_age=60)
    hardened = rendered(tmp_path, broker_image_require=["baseline"], broker_image_baseline_floor="74").image
    assert (hardened.require, hardened.baseline_floor, found.baseline_floor) == (("baseline",), 74, 0)
    with pytest.raises(ConfigError, match="baseline_floor"):
        rendered(tmp_path, broker_image_require=["baseline"], broker_image_baseline_floor=101)
    with pytest.raises(ConfigError, match=r"image\.require does not name baseline"):
        rendered(tmp_path, broker_image_baseline_floor=70)
    main = yaml.safe_load((ROLE / "tasks/main.yml").read_text())
    [loud] = [one for one in main if "WARNING" in str(one.get("ansible.builtin.debug", ""))]
    for require, wanted in ((found.require, False), (["sbom", "provenance"], True)):
        said = templar_of(broker_image_require=list(require)).evaluate_conditional(trust_as_template(loud["when"]))
        assert said is wanted
