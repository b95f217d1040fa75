"""The role broker: what it writes is a configuration that the broker reads, limits of rollouts included."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from saw.broker.config import BrokerConfig, RolloutSettings, load_config
from saw.errors import ConfigError

ROLE = Path(__file__).resolve().parents[3] / "roles/broker"


def rendered(base: Path, **values: object) -> BrokerConfig:
    """The configuration that Ansible's own templating makes of the role's defaults and ``values``, as the broker reads it."""
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    template, place = ROLE / "templates/broker.json.j2", base / "broker.json"
    command = [Path(sys.executable).parent / "ansible", "localhost", "-i", "localhost,", "-c", "local"]
    command += ["-m", "ansible.builtin.template", "-a", f"src={template} dest={place}"]
    told = {"ansible_python_interpreter": sys.executable, "broker_trust_domain": "saw.example", **defaults, **values}
    done = subprocess.run([*command, "-e", json.dumps(told)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_config(place)


def test_the_defaults_of_the_role_are_those_of_the_broker(tmp_path: Path) -> None:
    assert rendered(tmp_path).rollout == RolloutSettings()


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
