"""The files of the role edr as they are rendered: their own programs take them, and audit's rules are of known forms."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

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
