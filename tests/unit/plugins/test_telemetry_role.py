"""The files of the role telemetry as they are rendered: systemd takes its unit, and the service takes its configuration."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import msgspec
import pytest
import yaml

from saw.telemetry.config import TelemetryConfig

ROLE = Path(__file__).resolve().parents[3] / "roles/telemetry"
pytestmark = pytest.mark.control("P0-05")
RECEIVER = {"host": "siem.example.com", "port": 20514, "ca_file": "/etc/saw/ca.pem", "key_file": "/etc/saw/client.key"}


def unit(**variables: object) -> list[str]:
    environment = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    given = {
        "telemetry_credentials": [],
        "telemetry_given": {},
        "telemetry_identity_group": "",
        "ansible_managed": "by a test",
    }
    return environment.get_template("saw-telemetry.service.j2").render({**given, **variables}).splitlines()


def test_the_unit_has_an_account_of_its_own_no_capability_and_reads_the_journal_alone():
    lines = unit()
    for line in (
        "User=saw-telemetry",
        "SupplementaryGroups=systemd-journal",
        "CapabilityBoundingSet=",
        "ProtectSystem=strict",
        "ProtectHome=yes",
        "NoNewPrivileges=yes",
        "PrivateDevices=yes",
        "MemoryDenyWriteExecute=yes",
    ):
        assert line in lines
    assert not any(line.startswith(("AmbientCapabilities", "LoadCredential")) for line in lines)
    assert "SupplementaryGroups=systemd-journal saw-egress" in unit(telemetry_identity_group="saw-egress")


def test_keys_are_handed_over_and_not_named_in_the_configuration():
    lines = unit(telemetry_credentials=["ca_file", "key_file"], telemetry_given=RECEIVER)
    assert "LoadCredential=key_file:/etc/saw/client.key" in lines
    values = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    assert "/run/credentials/saw-telemetry.service/" in values["telemetry_seen"]


def test_the_roles_defaults_are_what_the_service_takes_by_itself_but_for_its_lists():
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    names = {name.removeprefix("telemetry_") for name in defaults}
    select = {"sign_ins", "accounts", "services", "kernel", "audit", "audit_keys", "logs"}
    assert select <= names
    values = {name: defaults[f"telemetry_{name}"] for name in select}
    config = msgspec.json.decode(
        json.dumps({"select": values, "first": defaults["telemetry_first"]}), type=TelemetryConfig
    )
    made = TelemetryConfig()
    assert (config.select.sign_ins, config.select.kernel, config.first) == (
        made.select.sign_ins,
        made.select.kernel,
        made.first,
    )
    assert (defaults["telemetry_spool_mib"] * 2**20, defaults["telemetry_max_message_bytes"]) == (
        made.spool_bytes,
        made.max_message_bytes,
    )
    assert config.select.tells_service("saw-policyd.service")
    assert not config.select.tells_service("cron.target")
