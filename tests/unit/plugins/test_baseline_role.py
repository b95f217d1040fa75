"""The role baseline as it is rendered: each switch takes its area and nothing else, and files pass their checkers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.secure_agent.workspace.plugins.modules import component

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles/baseline"
AREAS = yaml.safe_load((ROLE / "defaults/main.yml").read_text())["baseline_areas"]
EVERYTHING = dict.fromkeys(("chrony", "faillock", "logind", "pwquality", "sshd", "sudo", "timesyncd"), True)
NOTHING = dict.fromkeys(EVERYTHING, False)
#: What each area answers for: files, steps of services, and parts of the plan that are empty without it.
BELONGS = {
    "kernel": {"file:/etc/sysctl.d/50-saw-baseline.conf", "part:sysctl"},
    "modules": {"file:/etc/modprobe.d/50-saw-baseline.conf"},
    "mounts": {"service:mounts", "part:mounts"},
    "pam": {
        "file:/usr/share/pam-configs/saw-baseline-notify", "file:/usr/share/pam-configs/saw-baseline-fail",
        "file:/etc/security/pwquality.conf.d/50-saw-baseline.conf", "part:ensured", "part:words_removed",
    },
    "sudo": {"file:/etc/sudoers.d/50-saw-baseline"},
    "sshd": {"ssh:/etc/ssh/sshd_config.d/50-saw-baseline.conf"},
    "umask": {"file:/etc/profile.d/50-saw-baseline.sh", "setting:UMASK"},
    "core_dumps": {
        "file:/etc/security/limits.d/50-saw-baseline.conf", "file:/etc/systemd/coredump.conf.d/50-saw-baseline.conf",
        "file:/etc/systemd/system.conf.d/50-saw-baseline.conf",
    },
    "journald": {"service:journald"},
    "time_sync": {"service:time_sync"},
    "banner": {"file:/etc/issue", "file:/etc/issue.net", "ssh:/etc/ssh/sshd_config.d/51-saw-baseline-banner.conf"},
    "accounts": {"setting:PASS_MAX_DAYS", "setting:PASS_MIN_DAYS", "setting:PASS_WARN_AGE", "setting:INACTIVE", "part:accounts"},
    "files": {"part:permissions"},
}  # fmt: skip


def found(family: str, has: dict[str, bool], **more: Any) -> dict[str, Any]:
    """What host_baseline_info answers."""
    return {
        "system": {"id": "x", "version": "", "family": family},
        "booted": True,
        "ssh_running": True,
        "has": has,
        **more,
    }


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The role's plan by Ansible itself: one case for each area left out, and cases of their own."""
    folder = tmp_path_factory.mktemp("baseline")
    debian = found("debian", {**EVERYTHING, "chrony": False})
    cases: dict[str, dict[str, Any]] = {
        "all": {"baseline_host": debian},
        **{area: {"baseline_host": debian, "baseline_areas": [one for one in AREAS if one != area]} for area in AREAS},
        "control": {"baseline_host": debian},
        "bare": {"baseline_host": found("debian", NOTHING)},
        "redhat": {"baseline_host": found("redhat", {**EVERYTHING, "timesyncd": False}), "baseline_time_servers": ["t.example"]},
        "chosen": {
            "baseline_host": found("debian", {**EVERYTHING, "logind": False}), "baseline_ssh_passwords": True,
            "baseline_ssh_forwarding": "yes", "baseline_ssh_root_login": "no", "baseline_modules_needed": ["sctp"],
            "baseline_sysctl": {"kernel.sysrq": 176, "vm.swappiness": 1}, "baseline_hide_processes": True,
            "baseline_time_servers": ["t.example"], "baseline_areas": [one for one in AREAS if one != "banner"],
        },
        "hidden": {"baseline_host": debian, "baseline_hide_processes": True, "baseline_time_servers": ["t.example"]},
    }  # fmt: skip
    look = {
        "plan": "{{ baseline_plan }}",
        "missing": "{{ baseline_missing }}",
        "sshd": "{{ lookup('ansible.builtin.template', 'sshd.conf.j2') }}",
    }
    tasks = [
        {
            "name": "Render",
            "ansible.builtin.debug": {"msg": f"case {name} {{{{ look | to_json | b64encode }}}} end"},
            "vars": {**values, "look": look},
            "when": f"inventory_hostname == '{'control' if name == 'control' else 'other'}'",
        }
        for name, values in cases.items()
    ]
    role = folder / "roles/rendered"  # the role's variables and templates, with the looks in place of its tasks
    (role / "tasks").mkdir(parents=True)
    for part in ("defaults", "vars", "templates"):
        (role / part).symlink_to(ROLE / part)
    (role / "tasks/main.yml").write_text(yaml.safe_dump(tasks))
    (folder / "hosts").write_text("other\n[control_plane]\ncontrol\n")
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "roles": ["rendered"]}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    done = subprocess.run(
        [program, "-i", str(folder / "hosts"), str(folder / "play.yml"), "-e", f"ansible_python_interpreter={sys.executable}"],
        capture_output=True, text=True, check=False, timeout=300, cwd=folder,
        env={**os.environ, "ANSIBLE_HOME": str(folder / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rendered = {name: json.loads(b64decode(raw)) for name, raw in re.findall(r'"case (\S+) (\S+) end"', done.stdout)}
    assert rendered.keys() == cases.keys()
    return rendered


def contents(plan: dict[str, Any]) -> set[str]:
    """The plan in the words of :data:`BELONGS`."""
    words = {f"file:{file['dest']}" for file in plan["files"]}
    words |= {f"service:{service['area']}" for service in plan["services"]}
    words |= {f"setting:{setting['key']}" for setting in plan["settings"]}
    words |= {f"ssh:{file['dest']}" for file in plan["ssh"]}
    parts = ("sysctl", "mounts", "ensured", "words_removed", "permissions", "accounts")
    return words | {f"part:{name}" for name in parts if plan[name]}


def content(plan: dict[str, Any], dest: str) -> str:
    files = [*plan["files"], *(file for service in plan["services"] for file in service["files"])]
    return next(file["content"] for file in files if file["dest"] == dest)


def test_every_area_has_a_switch_and_a_line_in_the_documentation() -> None:
    options = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]["options"]
    assert options["baseline_areas"]["choices"] == AREAS == list(BELONGS)
    page = (ROOT / "docs/baseline.md").read_text()
    assert [area for area in AREAS if f"| `{area}` |" not in page] == []


@pytest.mark.thorough
def test_all_areas_together_hold_what_is_listed(plans: dict[str, Any]) -> None:
    assert contents(plans["all"]["plan"]) == set().union(*BELONGS.values())
    assert plans["all"]["missing"] == []


@pytest.mark.parametrize("area", AREAS)
def test_an_area_that_is_switched_off_takes_its_own_with_it_and_nothing_else(plans: dict[str, Any], area: str) -> None:
    assert contents(plans["all"]["plan"]) - contents(plans[area]["plan"]) == BELONGS[area]
    assert contents(plans[area]["plan"]) - contents(plans["all"]["plan"]) == set()


def test_a_host_that_has_nothing_is_told_what_it_misses(plans: dict[str, Any]) -> None:
    gone = {"file:/etc/sudoers.d/50-saw-baseline", "service:time_sync", "part:ensured"}
    gone |= {word for area in ("sshd", "banner") for word in BELONGS[area] if word.startswith("ssh:")}
    gone |= {word for word in BELONGS["pam"] if word.startswith("file:")}
    assert contents(plans["all"]["plan"]) - contents(plans["bare"]["plan"]) == gone
    assert [line.split(":")[0] for line in plans["bare"]["missing"]] == [
        "sudo", "SSH server", "locking after wrong passwords", "password strength", "time synchronization",
    ]  # fmt: skip


def test_the_red_hat_family_is_configured_by_its_own_tools(plans: dict[str, Any]) -> None:
    """Rendered alone: no host of that family was ever at hand."""
    plan = plans["redhat"]["plan"]
    assert not any(file["dest"].startswith("/usr/share/pam-configs") for file in plan["files"])
    assert [entry["command"] for entry in plan["ensured"]] == [
        ["authselect", "enable-feature", "with-faillock"], ["authselect", "enable-feature", "without-nullok"],
    ]  # fmt: skip
    assert {("/etc/security/faillock.conf", "deny", "5"), ("/etc/chrony.conf", "confdir", "/etc/chrony.d")} <= {
        (setting["path"], setting["key"], str(setting["value"])) for setting in plan["settings"]
    }
    assert content(plan, "/etc/chrony.d/50-saw-baseline.conf").splitlines()[1:] == ["server t.example iburst"]
    assert plan["services"][-1]["units"] == [{"name": "chronyd.service", "enabled": True}]


def test_what_an_operator_chooses_is_what_is_rendered(plans: dict[str, Any]) -> None:
    plan, sshd = plans["chosen"]["plan"], plans["chosen"]["sshd"].splitlines()
    assert {"PasswordAuthentication yes", "AllowTcpForwarding yes", "PermitRootLogin no"} <= set(sshd)
    assert not any(line.startswith("Banner") for line in sshd), (
        "the banner has a file of its own, which its area answers for"
    )
    banner = next(file for file in plans["all"]["plan"]["ssh"] if file["dest"].endswith("51-saw-baseline-banner.conf"))
    assert banner["content"].splitlines()[1:] == ["Banner /etc/issue.net"]
    assert "AllowTcpForwarding no" in plans["all"]["sshd"].splitlines()
    assert "AllowTcpForwarding local" in plans["control"]["sshd"].splitlines(), "operators could not reach the broker"
    modules = content(plan, "/etc/modprobe.d/50-saw-baseline.conf")
    assert "install dccp /bin/false" in modules
    assert "sctp" not in modules
    assert (plan["sysctl"]["kernel.sysrq"], plan["sysctl"]["vm.swappiness"]) == (176, 1)
    assert "-kernel.sysrq = 176" in content(plan, "/etc/sysctl.d/50-saw-baseline.conf").splitlines()
    assert plan["mounts"][-1] == {"path": "/proc", "options": ["hidepid=invisible"]}
    unit = content(plan, "/etc/systemd/system/saw-baseline-mounts.service")
    assert "ExecStart=-/bin/mount -o remount,hidepid=invisible /proc" in unit
    assert content(plan, "/etc/chrony/sources.d/50-saw-baseline.sources").endswith("server t.example iburst\n")


def test_processes_are_not_hidden_where_logind_would_break(plans: dict[str, Any]) -> None:
    assert "/proc" not in {mount["path"] for mount in plans["hidden"]["plan"]["mounts"]}
    assert plans["hidden"]["missing"] == ["hidden processes: systemd-logind is installed and needs to see them"]
    assert content(plans["hidden"]["plan"], "/etc/systemd/timesyncd.conf.d/50-saw-baseline.conf").endswith(
        "NTP=t.example\n"
    )


def test_neither_forwarding_nor_what_another_role_decides_is_among_the_kernel_values(plans: dict[str, Any]) -> None:
    names = set(plans["all"]["plan"]["sysctl"])
    assert not {name for name in names if "forward" in name}
    ours = plans["all"]["plan"]["sysctl"]
    other = (ROOT / "roles/perimeter/templates/sysctl.conf.j2").read_text()
    for line in other.splitlines():
        name, _, value = line.partition(" = ")
        assert str(ours.get(name, value)) == value, f"{name}: the perimeter wants {value}"


def checked(tmp_path: Path, file: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run the file's own checker, as the module component does."""
    path = tmp_path / Path(file["dest"]).name
    path.write_text(file["content"])
    path.chmod(0o440)
    command = [part.replace("%s", str(path)) for part in file["validate"]]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_the_rules_of_sudo_pass_visudo_and_broken_ones_do_not(plans: dict[str, Any], tmp_path: Path) -> None:
    assert shutil.which("visudo"), "scripts/bootstrap.sh installs it"
    file = next(one for one in plans["all"]["plan"]["files"] if one["dest"] == "/etc/sudoers.d/50-saw-baseline")
    assert (file["mode"], checked(tmp_path, file).returncode) == ("0440", 0)
    broken = {**file, "dest": "/broken", "content": file["content"] + "Defaults no_such_thing\nnobody\n"}
    assert checked(tmp_path, broken).returncode != 0


def strange(file: dict[str, Any]) -> str:
    """The first line of a file that the module component does not let through, or nothing."""
    found = component.other_line(file["content"], file["lines"])
    return found[1] if found else ""


def all_files(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [*plan["files"], *plan["ssh"], *(file for service in plan["services"] for file in service["files"])]


@pytest.mark.control("P0-07")
def test_every_file_is_checked_before_it_is_replaced_but_for_the_banners_free_text(plans: dict[str, Any]) -> None:
    for case in ("all", "chosen", "hidden", "redhat"):
        files = all_files(plans[case]["plan"])
        assert {file["dest"] for file in files if not (file.get("validate") or file.get("lines"))} <= {
            "/etc/issue", "/etc/issue.net",
        }  # fmt: skip
        assert [(file["dest"], strange(file)) for file in files if file.get("lines") and strange(file)] == []


@pytest.mark.parametrize(
    ("case", "dest", "bad"),
    [
        ("all", "50-saw-baseline.conf", "kernel.sysrq=0 0\x01"),
        ("all", "modprobe.d/50-saw-baseline.conf", "install usb-storage /bin/sh -c id"),
        ("all", "pam-configs/saw-baseline-fail", "\tsufficient\tpam_permit.so"),
        ("all", "pam-configs/saw-baseline-notify", "\trequisite\tpam_faillock.so preauth deny=five"),
        ("all", "pwquality.conf.d/50-saw-baseline.conf", "minlen = twelve"),
        ("all", "limits.d/50-saw-baseline.conf", "* hard core unlimited"),
        ("all", "coredump.conf.d/50-saw-baseline.conf", "Storage=external"),
        ("all", "system.conf.d/50-saw-baseline.conf", "DefaultLimitCORE=infinity"),
        ("all", "journald.conf.d/50-saw-baseline.conf", "SystemMaxUse=much"),
        ("hidden", "timesyncd.conf.d/50-saw-baseline.conf", "NTP=t.example;u.example"),
        ("chosen", "50-saw-baseline.sources", "server t.example iburst\ncmdallow all"),
    ],
)
def test_what_has_no_place_in_a_file_has_none_of_its_forms(
    plans: dict[str, Any], case: str, dest: str, bad: str
) -> None:
    file = next(one for one in all_files(plans[case]["plan"]) if one["dest"].endswith(dest) and one.get("lines"))
    assert strange({**file, "content": f"{file['content']}{bad}\n"}) == bad.rsplit("\n", 1)[-1]


@pytest.mark.skipif(os.geteuid() != 0, reason="sshd checks its configuration as root")
def test_the_ssh_configuration_passes_sshd_and_a_broken_one_does_not(plans: dict[str, Any], tmp_path: Path) -> None:
    values = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    check = ["sh", "-ec", values["baseline_sshd_check"], "sh", "%s"]
    for name in ("all", "chosen"):
        good = checked(tmp_path, {"dest": f"/{name}", "content": plans[name]["sshd"], "validate": check})
        assert good.returncode == 0, good.stderr
    bad = checked(tmp_path, {"dest": "/bad", "content": plans["all"]["sshd"] + "Nonsense yes\n", "validate": check})
    assert "Nonsense" in bad.stderr
