"""The roles' argument specifications are the one description of their variables: defaults and docs/roles.md follow them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.common.arg_spec import ArgumentSpecValidator

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path.parent.parent for path in ROOT.glob("roles/*/meta/argument_specs.yml"))


def test_every_role_has_a_specification():
    assert [path.name for path in ROLES] == sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir())


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_defaults_are_what_the_specification_says(role):
    options = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"].get(
        "options", {}
    )
    defaults = yaml.safe_load((role / "defaults/main.yml").read_text()) or {}
    assert set(defaults) <= set(options), "a variable without description"
    described = {name: option["default"] for name, option in options.items() if "default" in option}
    assert {name: described.get(name, value) for name, value in defaults.items()} == defaults
    assert all(name.startswith(f"{role.name}_") for name in options)


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_defaults_are_taken_by_the_specification(role):
    """As Ansible itself looks at them before a role runs, parts of a dictionary included."""
    options = yaml.safe_load((role / "meta/argument_specs.yml").read_text())["argument_specs"]["main"].get(
        "options", {}
    )
    plain = {name: value for name, value in _defaults(role).items() if "{{" not in str(value)}
    checked = ArgumentSpecValidator({name: options[name] for name in plain}).validate(plain)
    assert checked.error_messages == []


def _defaults(role):
    return yaml.safe_load((role / "defaults/main.yml").read_text()) or {}


def test_no_step_is_left_to_the_end_of_a_play():
    """A handler that a killed play did not reach is never run again; the module ``component`` decides by state instead."""
    assert not list(ROOT.glob("roles/*/handlers"))
    files = [*ROOT.glob("roles/*/tasks/*.yml"), *ROOT.glob("playbooks/**/*.yml")]
    assert files
    assert [
        path.name for path in files if re.search(r"^\s*(- )?(notify|handlers):", path.read_text(), re.MULTILINE)
    ] == []


def test_the_page_of_roles_is_current():
    done = subprocess.run([sys.executable, ROOT / "scripts/role_docs.py", "--check"], check=False)
    assert done.returncode == 0, "run `python scripts/role_docs.py`"
