"""The content for AWX, held against the playbooks that it runs: it asks for what they use, and for all that they need."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pytest
from awx_parts import (
    CONTENT,
    FORMS,
    PLAYBOOKS,
    ROOT,
    Builder,
    CredentialType,
    Question,
    Template,
    Workflow,
    entries,
    load,
    needed,
    uses_of,
)  # fmt: skip

from saw.broker.client import Context

pytestmark = pytest.mark.control("LIF-01")

#: Credentials that whoever loads the content makes first: name → type.
CREDENTIALS = {"saw-hosts": "Machine", "saw-broker": "saw-broker", "saw-officer": "saw-officer-key"}
#: What is needed only with another variable: whoever names an image names its file as well.
TOGETHER = {"workspace_image_path": "workspace_image", "workspace_image_sha256": "workspace_image"}
#: Playbooks that no job template runs, and why.
NOT_OFFERED = {
    "audit_witness": "a witness is under other hands than whoever runs AWX",
    "awx_content": "loads this content",
    "baseline_scan": "needs the scanner on the controller, which the execution environment does not have",
    "data_disk_escrow": "writes what opens a home, sealed, to a file on the controller",
    "data_disk_recover": "needs the recovery key of a home, which no controller of jobs is given",
    "demo_enterprise": "not part of the product",
    "image_build": "needs a checkout and a machine with qemu",
    "image_promote": "image_state does the same",
    "image_release": "needs the built image on the controller",
    "policy_publish": "policy_release does the same with an approval",
    "site": "its parts have templates of their own",
    "workspace_converge": "runs while an image is built; nobody logs in to a workspace",
}

TEMPLATES: tuple[Template, ...] = entries("job_templates")
WORKFLOWS: tuple[Workflow, ...] = entries("workflows")
BY_NAME = {one.name: one for one in TEMPLATES}


def questions(template: Template) -> dict[str, Question]:
    return {one.variable: one for one in (template.survey_spec.spec if template.survey_spec else ())}


@pytest.mark.parametrize("kind", FORMS)
def test_each_file_has_one_variable_whose_entries_the_controller_takes_and_names_are_unique(kind: str) -> None:
    assert set(load(CONTENT / f"{kind}.yml")) == {FORMS[kind][0]}
    names = [one.name for one in entries(kind)]
    assert names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "change",
    [{"surveys": {}}, {"job_type": "scan"}, {"name": "other"}, {"credentials": "saw-hosts"}],
    ids=lambda one: next(iter(one)),
)
def test_the_form_refuses_what_the_controller_would(change: dict[str, Any]) -> None:
    good = msgspec.to_builtins(TEMPLATES[0])
    msgspec.convert(good, Template)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({**good, **change}, Template)


def test_every_playbook_has_a_job_template_or_a_reason_why_not() -> None:
    assert [one.playbook for one in TEMPLATES if not (ROOT / one.playbook).is_file()] == []
    offered = {Path(one.playbook).stem for one in TEMPLATES}
    assert offered | set(NOT_OFFERED) == {path.stem for path in PLAYBOOKS.glob("*.yml")}
    assert not offered & set(NOT_OFFERED)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda one: one.name)
def test_a_survey_asks_for_what_its_playbook_uses_and_for_all_that_it_needs(template: Template) -> None:
    uses, asked = uses_of(ROOT / template.playbook), questions(template)
    wanted = {name for name in needed(uses) if TOGETHER.get(name, name) in asked or name not in TOGETHER}
    assert set(asked) - uses.used - uses.elsewhere - set(uses.given) == set(), "no playbook uses it"
    assert wanted - set(asked) == set(), "the playbook cannot do without it"
    assert {name for name in wanted if not asked[name].required} == set()
    assert template.survey_enabled == bool(asked)


def test_the_reader_of_playbooks_finds_what_has_to_be_given() -> None:
    assert needed(uses_of(PLAYBOOKS / "workspace_stop.yml")) == {"workspace_id"}
    assert needed(uses_of(PLAYBOOKS / "policy_rollback.yml")) == {"policy_rollback_ring", "policy_rollback_to"}
    assert {"workspace_sponsor", "workspace_image_sha256"} <= needed(uses_of(PLAYBOOKS / "workspace_create.yml"))
    assert needed(uses_of(PLAYBOOKS / "baseline.yml")) == set()


@pytest.mark.parametrize("owner", [*TEMPLATES, *WORKFLOWS], ids=lambda one: one.name)
def test_an_answer_that_is_left_out_is_what_the_playbook_does_by_itself(owner: Template | Workflow) -> None:
    """A controller hands on an empty text for a question without answer, which is not the same as nothing."""
    spec = owner.survey_spec.spec if owner.survey_spec else ()
    given = uses_of(ROOT / owner.playbook).given if isinstance(owner, Template) else {}
    for one in spec:
        assert one.required == (one.default is None), one.variable
        if one.default == "":
            assert given[one.variable] in {"", "/dev/log"}, (
                f"{one.variable} is empty, and the playbook takes that for a value"
            )
        assert (one.type == "multiplechoice") == bool(one.choices), one.variable
        assert one.default is None or not one.choices or one.default in one.choices


def test_what_belongs_to_one_run_alone_is_refused_to_run_twice_at_a_time() -> None:
    twice = {one.name for one in TEMPLATES if one.allow_simultaneous}
    assert all(name.startswith("saw-workspace-") for name in twice)
    assert "saw-workspaces-rebuild" not in twice
    named = {
        one.name: re.findall(r"^  hosts: (.*)$", (ROOT / one.playbook).read_text(), re.MULTILINE) for one in TEMPLATES
    }
    local = {name for name, hosts in named.items() if set(hosts) <= {"localhost"}}
    assert {one.name for one in TEMPLATES if one.ask_limit_on_launch} == {one.name for one in TEMPLATES} - local


def test_every_name_leads_to_something() -> None:
    known = {kind: {one.name for one in entries(kind)} for kind in FORMS}
    types = known["credential_types"] | {"Machine"}
    assert set(CREDENTIALS.values()) <= types
    for one in TEMPLATES:
        assert one.project in known["projects"]
        assert one.inventory in known["inventories"]
        assert one.execution_environment in known["execution_environments"]
        assert set(one.credentials) <= set(CREDENTIALS)
    for source in entries("inventory_sources"):
        assert (source.inventory in known["inventories"], source.credential in CREDENTIALS) == (True, True)
        assert source.source_project in known["projects"]
        assert load(ROOT / source.source_path)["plugin"] == "secure_agent.workspace.broker"
        assert source.source_path.endswith("broker.yml")
    for schedule in entries("schedules"):
        assert schedule.unified_job_template in BY_NAME
        assert [
            one.variable for one in questions(BY_NAME[schedule.unified_job_template]).values() if one.required
        ] == []


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda one: one.name)
def test_a_workflow_runs_known_jobs_behind_an_approval_with_all_that_they_need(workflow: Workflow) -> None:
    found = {one.identifier: one for one in workflow.workflow_nodes}
    assert len(found) == len(workflow.workflow_nodes)
    told = {one.variable for one in workflow.survey_spec.spec}
    after = {
        name: {to.identifier for to in (*one.related.success_nodes, *one.related.always_nodes)}
        for name, one in found.items()
    }
    assert set().union(*after.values()) <= set(found)
    (approval,) = [one for one in workflow.workflow_nodes if one.unified_job_template.type == "workflow_approval"]
    assert approval.unified_job_template.timeout > 0
    for node in workflow.workflow_nodes:
        if node is approval:
            continue
        asked = questions(BY_NAME[node.unified_job_template.name])
        assert set(node.extra_data) <= set(asked)
        assert {one.variable for one in asked.values() if one.required} <= told | set(node.extra_data)
        assert {one.name for one in node.related.credentials} <= set(CREDENTIALS)
    assert approval.identifier in after[workflow.workflow_nodes[0].identifier]
    changing = set(found) - {workflow.workflow_nodes[0].identifier, approval.identifier}
    assert changing == behind(after, approval.identifier), "what is approved comes after the approval, and nothing else"


def behind(after: dict[str, set[str]], name: str) -> set[str]:
    """All nodes that run only once ``name`` was done."""
    found = set(after[name])
    for one in after[name]:
        found |= behind(after, one)
    return found


def test_a_release_in_a_workflow_takes_the_digest_that_its_check_handed_on() -> None:
    workflow = next(one for one in WORKFLOWS if one.name == "saw-policy-release-approved")
    first, _, last = workflow.workflow_nodes
    assert (first.job_type, last.job_type, first.unified_job_template) == ("check", "run", last.unified_job_template)
    tasks = load(PLAYBOOKS / "policy_release.yml")[0]["tasks"]
    (handed,) = [one for one in tasks if "ansible.builtin.set_stats" in one]
    assert set(handed["ansible.builtin.set_stats"]["data"]) == {"policy_release_approved"}
    assert handed["when"] == "ansible_check_mode"


@pytest.mark.parametrize("kind", entries("credential_types"), ids=lambda one: one.name)
def test_a_credential_type_holds_no_secret_and_makes_what_programs_read(kind: CredentialType, tmp_path: Path) -> None:
    fields = {one.id: one for one in kind.inputs.fields}
    assert set(kind.inputs.required) == set(fields)
    assert all(fields[name].secret for name in ("key", "client_secret") if name in fields)
    assert not any(one.default for one in fields.values() if one.secret)
    # as a controller renders it: each file in turn, the names of earlier ones known to later ones
    values = {name: f'a "{name}" of 50% \\ {{{{ x }}}}' for name in fields}
    files: dict[str, str] = {}
    sandbox = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - files, no HTML
    order = list(kind.injectors.file)
    assert order == sorted(order, key=lambda label: (len(label), label)), "a database may sort them by length"
    for label, template in kind.injectors.file.items():
        path = tmp_path / label
        path.write_text(sandbox.from_string(template).render(values, tower={"filename": files}))
        files[label.partition(".")[2]] = str(path)
    for template in [
        *kind.injectors.env.values(),
        *(one for many in kind.injectors.extra_vars.values() for one in many),
    ]:
        assert sandbox.from_string(template).render(values, tower={"filename": files}) in files.values()
    if "SAW_CONTEXT" in kind.injectors.env:
        raw = Path(files["context"]).read_bytes()
        context = msgspec.json.decode(raw, type=Context)
        secrets = [values[name] for name, one in fields.items() if one.secret]
        assert not any(json.dumps(secret) in raw.decode() for secret in secrets)
        if context.machine is not None:
            assert (context.machine.url, context.machine.token is not None) == (values["url"], True)
        else:
            assert context.broker.ssh is not None
            assert Path(str(context.broker.ssh.key)).read_text() == f"{values['key']}\n"
            assert (context.broker.ssh.host, context.broker.ssh.user) == (values["host"], values["user"])


def next_run(rule: str) -> datetime:
    """The second start of a schedule; raises ``ValueError`` for what is none."""
    found = re.fullmatch(
        r"DTSTART:(\d{8}T\d{6}Z) RRULE:(FREQ=(?:DAILY|WEEKLY);INTERVAL=\d+(?:;BYDAY=(?:MO|TU|WE|TH|FR|SA|SU))?)", rule
    )
    if found is None:
        raise ValueError(rule)
    from dateutil.rrule import rrulestr

    start = datetime.strptime(found[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return rrulestr(found[2], dtstart=start)[1]  # type: ignore[no-any-return]


def test_schedules_have_rules_that_recur_and_those_that_change_hosts_are_off() -> None:
    schedules = {one.name: one for one in entries("schedules")}
    assert next_run(schedules["saw-drift-daily"].rrule) == datetime(2026, 1, 2, 4, 30, tzinfo=UTC)
    assert next_run(schedules["saw-patching-rolling-weekly"].rrule).weekday() == 5
    for one in schedules.values():
        assert next_run(one.rrule)
        assert not one.enabled or one.unified_job_template.endswith("-report")
    for wrong in ("RRULE:FREQ=DAILY;INTERVAL=1", "DTSTART:20260101T043000Z RRULE:FREQ=OFTEN;INTERVAL=1"):
        with pytest.raises(ValueError, match="RRULE"):
            next_run(wrong)


def test_the_execution_environment_is_one(tmp_path: Path) -> None:
    path = CONTENT / "execution-environment.yml"
    found = msgspec.convert(load(path), Builder)
    version = load(ROOT / "galaxy.yml")["version"]
    archive = f"secure_agent-workspace-{version}.tar.gz"
    assert archive in {one["src"] for one in found.additional_build_files}
    (collection,) = load(CONTENT / found.dependencies["galaxy"])["collections"]
    assert collection == {"name": f"/build/collection/{archive}", "type": "file"}
    assert (CONTENT / found.dependencies["system"]).is_file()
    program = Path(sys.executable).with_name("ansible-builder")
    if not program.exists():  # it is no part of the development environment: where it is, it has the last word
        return
    for name in ("execution-environment.yml", "requirements.yml", "bindep.txt"):
        shutil.copy(CONTENT / name, tmp_path)
    for name in (archive, "requirements.txt", "dist/saw.whl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(
        [program, "create", "--context", tmp_path / "context"], cwd=tmp_path, check=True, capture_output=True
    )


def test_without_the_collection_that_talks_to_a_controller_the_playbook_says_how_to_get_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(PLAYBOOKS / "awx_content.yml")],
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
        env={**os.environ, "ANSIBLE_HOME": str(tmp_path / "home"), "ANSIBLE_NOCOLOR": "1",
             "ANSIBLE_COLLECTIONS_PATH": str(tmp_path)},
    )  # fmt: skip
    told = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, told
    assert "the collection awx.awx is missing on this machine" in told
    assert "ansible-galaxy collection install awx.awx" in told


def test_each_kind_is_loaded_with_all_that_its_file_says() -> None:
    """By name: what a file has, its task hands to the module."""
    for kind, (variable, form) in FORMS.items():
        (task,) = load(PLAYBOOKS / f"tasks/awx_{kind}.yml")
        (module,) = [name for name in task if name.startswith("awx.awx.")]
        assert set(task[module]) == {field.name for field in msgspec.structs.fields(form)}, kind
        assert task["loop"] == f"{{{{ {variable} }}}}"
