"""Units that the workspace itself makes of its signed policy are told apart from others of the same name."""

from __future__ import annotations

from pathlib import Path

import pytest

from saw.edr.policy_units import IN_FORCE, policy_units_of
from saw.runtime.sandbox import load_spec
from saw.runtime.sandbox_units import compile_units

GENERATION = Path(__file__).resolve().parents[3] / "policies/coding"
ACCOUNT = (1000, 1000, "/home/agent")
pytestmark = pytest.mark.control("P0-03")


def test_only_what_is_exactly_the_policys_is_explained(tmp_path: Path) -> None:
    made = compile_units(load_spec(GENERATION, account=ACCOUNT))
    for name, text in made.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in made]

    def explained(*asked: str) -> dict[str, str]:
        return policy_units_of(asked, generation=GENERATION, units=tmp_path, account=ACCOUNT)

    assert explained(*paths) == dict.fromkeys(paths, IN_FORCE)
    shell = tmp_path / "saw-shell.service"
    shell.write_text(shell.read_text() + "ExecStartPost=/bin/door\n")
    assert str(shell) not in explained(*paths)
    door = tmp_path / "saw-mcp-door.service"
    door.write_text(made["saw-shell.service"])
    assert explained(str(door), "/etc/systemd/system/saw-shell.service", str(tmp_path / "absent.service")) == {}


def test_a_host_without_a_policy_explains_nothing(tmp_path: Path) -> None:
    (tmp_path / "saw-shell.service").write_text("x")
    asked = [str(tmp_path / "saw-shell.service")]
    assert policy_units_of(asked, generation=tmp_path / "absent", units=tmp_path) == {}
    (tmp_path / "policy.yaml").write_text("no: policy")
    assert policy_units_of(asked, generation=tmp_path, units=tmp_path) == {}
