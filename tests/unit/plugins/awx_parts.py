"""What the content for AWX may look like, as the modules of awx.awx take it, and a reader of what a playbook needs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import jinja2
import msgspec
import yaml
from jinja2 import nodes

ROOT = Path(__file__).resolve().parents[3]
CONTENT = ROOT / "extensions/aap"
PLAYBOOKS = ROOT / "playbooks"
Name = Annotated[str, msgspec.Meta(pattern=r"^saw(-[a-z]+)*\Z")]


class Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the modules of awx.awx take; a field that is not listed would be ignored in silence, or refused."""


class Question(Strict):
    variable: Annotated[str, msgspec.Meta(pattern=r"^[a-z][a-z0-9_]*\Z")]
    question_name: str
    question_description: str
    type: Literal["text", "integer", "multiplechoice"]
    required: bool
    default: str | int | None = None
    choices: tuple[str, ...] = ()
    min: int | None = None
    max: int | None = None


class Survey(Strict):
    name: Name
    description: str
    spec: tuple[Question, ...]


class Template(Strict):
    name: Name
    description: str
    organization: str
    project: str
    playbook: str
    inventory: str
    execution_environment: str
    credentials: tuple[str, ...]
    job_type: Literal["run"]
    ask_job_type_on_launch: bool
    ask_diff_mode_on_launch: bool
    allow_simultaneous: bool
    survey_enabled: bool
    survey_spec: Survey | None = None
    ask_limit_on_launch: bool = False
    ask_credential_on_launch: bool = False


class Named(Strict):
    name: str


class Identified(Strict):
    identifier: str


class Unified(Strict):
    name: str
    type: Literal["job_template", "workflow_approval"]
    organization: Named | None = None
    description: str = ""
    timeout: int = 0


class Related(Strict):
    success_nodes: tuple[Identified, ...] = ()
    failure_nodes: tuple[Identified, ...] = ()
    always_nodes: tuple[Identified, ...] = ()
    credentials: tuple[Named, ...] = ()


class Node(Strict):
    identifier: str
    unified_job_template: Unified
    related: Related = Related()
    job_type: Literal["run", "check"] = "run"
    diff_mode: bool = False
    extra_data: dict[str, str] = {}


class Workflow(Strict):
    name: Name
    description: str
    organization: str
    inventory: str
    allow_simultaneous: bool
    survey_enabled: bool
    survey_spec: Survey
    workflow_nodes: tuple[Node, ...]


class Schedule(Strict):
    name: Name
    description: str
    unified_job_template: str
    organization: str
    rrule: str
    enabled: bool


class Field(Strict):
    id: Annotated[str, msgspec.Meta(pattern=r"^(?!tower\Z)[a-z_]+\Z")]
    label: str
    type: Literal["string"]
    format: Literal["ssh_private_key"] | None = None
    secret: bool = False
    multiline: bool = False
    default: str | None = None


class Inputs(Strict):
    fields: tuple[Field, ...]
    required: tuple[str, ...]


class Injectors(Strict):
    file: dict[Annotated[str, msgspec.Meta(pattern=r"^template(\.[a-z]+)?\Z")], str]
    env: dict[Annotated[str, msgspec.Meta(pattern=r"^SAW_[A-Z]+\Z")], str] = {}
    extra_vars: dict[str, list[str]] = {}


class CredentialType(Strict):
    name: Name
    description: str
    kind: Literal["cloud"]
    inputs: Inputs
    injectors: Injectors


class Inventory(Strict):
    name: Name
    organization: str
    description: str


class InventorySource(Strict):
    name: Name
    description: str
    inventory: str
    organization: str
    source: Literal["scm"]
    source_project: str
    source_path: str
    credential: str
    execution_environment: str
    overwrite: bool
    overwrite_vars: bool
    update_on_launch: bool
    update_cache_timeout: int


class Project(Strict):
    name: Name
    description: str
    organization: str
    scm_type: Literal["git"]
    scm_url: str
    scm_branch: str
    scm_clean: bool
    default_environment: str


class Environment(Strict):
    name: Name
    description: str
    image: str
    pull: Literal["missing"]


#: Kind → its variable, as infra.aap_configuration names it, and the form of one entry.
FORMS: dict[str, tuple[str, type[Any]]] = {
    "credential_types": ("controller_credential_types", CredentialType),
    "execution_environments": ("controller_execution_environments", Environment),
    "projects": ("controller_projects", Project),
    "inventories": ("controller_inventories", Inventory),
    "inventory_sources": ("controller_inventory_sources", InventorySource),
    "job_templates": ("controller_templates", Template),
    "workflows": ("controller_workflows", Workflow),
    "schedules": ("controller_schedules", Schedule),
}


class _Loader(yaml.SafeLoader):
    """YAML with Ansible's tag for text that is not a template."""


_Loader.add_constructor("!unsafe", lambda loader, node: loader.construct_scalar(node))


def load(path: Path) -> Any:
    return yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506 - a SafeLoader


def entries(kind: str) -> tuple[Any, ...]:
    variable, form = FORMS[kind]
    return tuple(msgspec.convert(load(CONTENT / f"{kind}.yml"), dict[str, tuple[form, ...]])[variable])  # type: ignore[valid-type]


# What a playbook uses, read from its text.


class Uses(msgspec.Struct):
    """Variables that a playbook uses, those of them that it sets or has a value for, and those that have to be given."""

    used: set[str] = set()
    given: dict[str, Any] = {}
    optional: set[str] = set()
    undefined: set[str] = set()
    imported: set[str] = set()
    """What playbooks that are taken in as a whole need for themselves."""
    elsewhere: set[str] = set()
    """What such playbooks use."""
    facts: set[str] = set()
    """What it sets for the plays that follow."""


def texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, one in value.items():
            yield from (
                (f"{{{{ {text} }}}}" for text in texts(one))
                if name in {"when", "that", "until", "failed_when", "changed_when"}
                else texts(one)
            )
    elif isinstance(value, list):
        for one in value:
            yield from texts(one)


def read_templates(value: Any, uses: Uses) -> None:
    """Note the names in the templates of ``value``; one that is tested or has a default may be left out."""
    environment = jinja2.Environment(autoescape=True)
    for text in texts(value):
        if "{{" not in text and "{%" not in text:
            continue
        tree = environment.parse(re.sub(r"is (not )?(failed|skipped|exists)", "", text))
        for name in tree.find_all(nodes.Name):
            uses.used.add(name.name)
            if name.ctx == "store":
                uses.given.setdefault(name.name, None)
        guarded = [*tree.find_all(nodes.Test), *(one for one in tree.find_all(nodes.Filter) if one.name == "default")]
        uses.optional |= {one.node.name for one in guarded if isinstance(one.node, nodes.Name)}


def read_playbook(path: Path, uses: Uses) -> None:
    """Note what a playbook uses, with the playbooks, task files and roles that it takes in."""
    for play in load(path):
        if "ansible.builtin.import_playbook" in play:
            other = uses_of(path.parent / play["ansible.builtin.import_playbook"])
            uses.imported |= needed(other) - uses.facts
            uses.elsewhere |= other.used | set(other.given)
            continue
        read_part(play, uses)


def read_part(part: Any, uses: Uses) -> None:
    if isinstance(part, list):
        for one in part:
            read_part(one, uses)
    elif isinstance(part, dict):
        for name, value in part.get("vars", {}).items():
            uses.given[name] = value
            if isinstance(value, str) and "undef(" in value:
                uses.undefined.add(name)
        if "register" in part:
            uses.given[part["register"]] = None
        facts = set(part.get("ansible.builtin.set_fact", {})) - {"cacheable"}
        uses.facts |= facts
        uses.given |= dict.fromkeys(facts)
        uses.given.setdefault((part.get("loop_control") or {}).get("loop_var", "item"), None)
        read_templates(
            {name: value for name, value in part.items() if name not in {"tasks", "block", "rescue", "pre_tasks"}}, uses
        )
        for name in ("tasks", "block", "rescue", "pre_tasks"):
            read_part(part.get(name), uses)
        include = part.get("ansible.builtin.include_tasks")
        if isinstance(include, str) and "{{" not in include:
            read_part(load(PLAYBOOKS / include), uses)
        taken = part.get("ansible.builtin.include_role")
        if isinstance(taken, dict):
            tasks = (ROOT / f"roles/{taken['name'].rpartition('.')[2]}/tasks").glob("*.yml")
            names = [
                name for path in tasks for name in re.findall(r"register: (\w+)", path.read_text(encoding="utf-8"))
            ]
            uses.given |= dict.fromkeys(names)
        for role in part.get("roles", []):
            read_role(role["role"].rpartition(".")[2], uses)


def read_role(name: str, uses: Uses) -> None:
    """The inventory has a role's variables; a survey may ask for them."""
    options = load(ROOT / f"roles/{name}/meta/argument_specs.yml")["argument_specs"]["main"].get("options", {})
    uses.used |= set(options)
    uses.optional |= set(options)


@cache
def uses_of(path: Path) -> Uses:
    """Read a playbook."""
    uses = Uses()
    read_playbook(path, uses)
    return uses


#: Ansible's own, without those that begin with its name.
OWN = frozenset({"omit", "lookup", "query", "undef", "playbook_dir", "groups", "inventory_hostname"})


def needed(uses: Uses) -> set[str]:
    """What has to be given: used, neither set nor guarded, and not Ansible's own; and what ``undef`` says is missing."""
    free = {name for name in uses.used - set(uses.given) - uses.optional - OWN if not name.startswith("ansible_")}
    return free | uses.undefined | uses.imported


class Builder(Strict):
    """The parts of ansible-builder's format 3 that are used."""

    version: Literal[3]
    images: dict[Literal["base_image"], Named]
    dependencies: dict[Literal["python_interpreter", "ansible_core", "ansible_runner", "galaxy", "system"], Any]
    additional_build_files: tuple[dict[Literal["src", "dest"], str], ...]
    additional_build_steps: dict[Literal["append_final"], tuple[str, ...]]
