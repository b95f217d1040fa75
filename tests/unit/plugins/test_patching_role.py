"""The files of the role patching as they are rendered: their own programs take them and read in them what is meant."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import jinja2
import pytest
import yaml

ROLE = Path(__file__).resolve().parents[3] / "roles/patching"
PACKAGED = Path("/etc/apt/apt.conf.d/50unattended-upgrades")
pytestmark = pytest.mark.control("P0-02")


def render(name: str, **variables: object) -> str:
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    environment = jinja2.Environment(  # noqa: S701 - configuration files, no HTML
        loader=jinja2.FileSystemLoader(ROLE / "templates"), trim_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template(name).render({**defaults, "ansible_managed": "by a test", **variables})


def apt_reads(tmp_path: Path, text: str) -> dict[str, list[str]]:
    """What apt reads in it after the file of the engine's package, by name."""
    parts = tmp_path / "parts"
    parts.mkdir()
    (parts / "50unattended-upgrades").write_text(PACKAGED.read_text())
    (parts / "60saw-patching").write_text(text)
    main = tmp_path / "main.conf"
    main.write_text(f'Dir::Etc::parts "{parts}";\nDir::Etc::main "/nonexistent";\n')
    done = subprocess.run(
        ["apt-config", "dump"],
        capture_output=True,
        text=True,
        check=True,
        env={"APT_CONFIG": str(main), "PATH": "/usr/bin"},
    )
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition(" ")
        if value != '"";':
            found.setdefault(name.removesuffix("::"), []).append(value.strip('";'))
    return found


def test_apt_reads_the_listed_sources_and_none_of_the_engines_own(tmp_path):
    held = [{"package": "libstdc++6", "owner": "ann", "reason": "why", "until": "2099-01-01"}]
    read = apt_reads(tmp_path, render("apt.conf.j2", patching_holds=held))
    assert read["Unattended-Upgrade::Origins-Pattern"] == [
        "origin=Debian,label=Debian-Security,codename=${distro_codename}-security",
        "origin=Ubuntu,archive=${distro_codename}-security",
    ]
    assert "Unattended-Upgrade::Allowed-Origins" not in read
    (pattern,) = read["Unattended-Upgrade::Package-Blacklist"]
    assert re.match(pattern, "libstdc++6")
    assert not re.match(pattern, "libstdc++6-dbg")
    assert read["Unattended-Upgrade::Automatic-Reboot"] == ["false"]
    assert read["APT::Periodic::Unattended-Upgrade"] == ["0"]


def test_a_host_that_only_reports_is_told_no_source(tmp_path):
    read = apt_reads(tmp_path, render("apt.conf.j2", patching_updates=False))
    assert "Unattended-Upgrade::Origins-Pattern" not in read


def test_perl_takes_needrestarts_configuration_and_the_agents_sandbox_is_never_restarted(tmp_path):
    path = tmp_path / "saw.conf"
    path.write_text(render("needrestart.conf.j2"))
    ask = (
        f'our %nrconf; do "{path}"; die $@ if $@; '
        'for my $unit (@ARGV) { print((grep { $unit =~ $_ } keys %{$nrconf{override_rc}}) ? "no " : "yes ") }'
    )
    units = ["saw-shell", "saw-vm@ws-1", "saw-patching", "saw-broker", "my-saw-shell"]
    asked = ["perl", "-e", ask, *(f"{unit}.service" for unit in units)]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no", "no", "no", "yes", "yes"]
    assert "$nrconf{restart} = 'a';" in path.read_text()


@pytest.mark.parametrize(
    ("schedule", "taken"), [("*-*-* 03:00:00 UTC", True), ("Sun 02:30", True), ("every day", False)]
)
def test_systemd_takes_the_schedule(tmp_path, schedule, taken):
    timer = tmp_path / "saw-patching.timer"
    timer.write_text(render("saw-patching.timer.j2", patching_schedule=schedule))
    (tmp_path / "saw-patching.service").write_text("[Service]\nType=oneshot\nExecStart=/bin/true\n")
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(timer)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) is taken, done.stderr


@pytest.mark.parametrize(
    ("variables", "enabled"),
    [
        ({}, {"saw-patching.timer", "saw-patching-report.timer"}),
        ({"patching_updates": False}, {"saw-patching-report.timer"}),
        (
            {"patching_reboot_window": {"days": ["sun"], "start": "02:00", "minutes": 60}},
            {"saw-patching.timer", "saw-patching-report.timer", "saw-patching-reboot.timer"},
        ),
    ],
)
def test_the_first_boot_of_an_image_enables_what_the_role_did_and_no_other_schedule(tmp_path, variables, enabled):
    units = tmp_path / "etc/systemd/system"
    presets = tmp_path / "etc/systemd/system-preset"
    units.mkdir(parents=True)
    presets.mkdir()
    (presets / "10-saw-patching.preset").write_text(render("saw-patching.preset.j2", **variables))
    names = ["apt-daily.timer", "apt-daily-upgrade.timer", "unattended-upgrades.service"]
    names += ["saw-patching.timer", "saw-patching-report.timer", "saw-patching-reboot.timer"]
    for name in names:
        (units / name).write_text("[Timer]\nOnCalendar=daily\n[Service]\n[Install]\nWantedBy=timers.target\n")
    subprocess.run(["systemctl", f"--root={tmp_path}", "preset", *names], capture_output=True, check=True)
    assert {path.name for path in (units / "timers.target.wants").iterdir()} == enabled


def test_a_stop_of_the_schedule_waits_for_dpkg():
    lines = dict(line.split("=", 1) for line in render("saw-patching.service.j2").splitlines() if "=" in line)
    assert (lines["KillMode"], lines["TimeoutStartSec"]) == ("process", "infinity")
