"""What roles take from a host's system: variables resolve for each family, and what cannot work is refused with the reason.

Ubuntu and the family of RHEL are read here and nowhere run (docs/images.md).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
ROLES = sorted(path.parent.parent.name for path in ROOT.glob("roles/*/tasks/system.yml"))
#: Distribution and family, as Ansible's facts name them.
SYSTEMS = {
    "debian": ("Debian", "Debian"), "ubuntu": ("Ubuntu", "Debian"), "rocky": ("Rocky", "RedHat"), "suse": ("SLES", "Suse"),
}  # fmt: skip
#: Roles that cannot work on a system, with a word of the reason.
REFUSED = {
    "ubuntu": {"gpu_driver": "Debian's contrib and non-free"},
    "rocky": {
        "data_disk": "Debian's packages",
        "edr": "Debian's packages", "gpu_driver": "Debian's contrib and non-free", "hypervisor": "Debian's names",
        "image_hygiene": "Debian's packages", "patching": "apt", "runtime_openshell": "Debian's names", "sandbox": "Landlock",
    },
    "suse": dict.fromkeys(ROLES, "knows Debian, Ubuntu and the family of RHEL"),
}  # fmt: skip
LOOKS = {
    "ssh_access": {
        "sshd": "{{ lookup('ansible.builtin.template', 'sshd.conf.j2') }}",
        "reload": "{{ lookup('ansible.builtin.template', 'saw-ssh-reload.service.j2') }}",
    },
    "image_hygiene": {"files": "{{ (image_hygiene_files + image_hygiene_keygen_files) | map(attribute='dest') }}"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """By system and role what the role's own tasks/system.yml leaves in its variable, and LOOKS; or the words of its refusal."""
    folder = tmp_path_factory.mktemp("systems")
    tasks: list[dict[str, Any]] = [
        {
            "name": "Facts",
            "ansible.builtin.set_fact": {"distribution": "{{ is[0] }}", "os_family": "{{ is[1] }}", "cacheable": True},
        }
    ]
    for role in ROLES:
        copy = folder / "roles" / role  # the role without tasks of its own but those
        copy.mkdir(parents=True)
        for part in ("defaults", "vars", "templates", "files"):
            if (ROOT / "roles" / role / part).is_dir():
                (copy / part).symlink_to(ROOT / "roles" / role / part)
        (copy / "tasks").mkdir()
        (copy / "tasks/system.yml").symlink_to(ROOT / "roles" / role / "tasks/system.yml")
        looks = {"system": f"{{{{ {role}_system }}}}", **LOOKS.get(role, {})}
        told = {
            "name": "Tell",
            "ansible.builtin.debug": {"msg": _told(role, "look | to_json")},
            "vars": {"look": looks},
        }
        refused = {"name": "Tell", "ansible.builtin.debug": {"msg": _told(role, "ansible_failed_result.msg | to_json")}}
        (copy / "tasks/main.yml").write_text(
            yaml.safe_dump(
                [
                    {
                        "name": "Look",
                        "block": [{"name": "System", "ansible.builtin.import_tasks": "system.yml"}, told],
                        "rescue": [refused],
                    }
                ]
            )
        )
        tasks.append({"name": "Role", "ansible.builtin.include_role": {"name": role}})
    hosts = "".join(f"{name} is='{json.dumps(system)}'\n" for name, system in SYSTEMS.items())
    (folder / "hosts").write_text(hosts)
    play = {"hosts": "all", "connection": "local", "gather_facts": False, "tasks": tasks}
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    program = str(Path(sys.executable).with_name("ansible-playbook"))
    done = subprocess.run(
        [program, "-i", str(folder / "hosts"), str(folder / "play.yml"), "-e", f"ansible_python_interpreter={sys.executable}"],
        capture_output=True, text=True, check=False, timeout=600, cwd=folder,
        env={**os.environ, "ANSIBLE_HOME": str(folder / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    cases = re.findall(r'"case (\S+) (\S+) (\S+) end"', done.stdout)
    return {(host, role): json.loads(b64decode(raw)) for host, role, raw in cases}


def _told(role: str, expression: str) -> str:
    return f"case {{{{ inventory_hostname }}}} {role} {{{{ {expression} | b64encode }}}} end"


def test_the_roles_are_those_that_are_meant() -> None:
    assert set(REFUSED["rocky"]) < set(ROLES)
    assert {"saw_runtime", "ssh_access"} < set(ROLES)
    for role in ROLES:
        names = {path.name for path in (ROOT / "roles" / role / "vars").glob("*.yml")} - {"main.yml"}
        assert names - {"Ubuntu.yml"} == {"Debian.yml", "RedHat.yml", "other.yml"}, role
        main = (ROOT / "roles" / role / "tasks/main.yml").read_text()
        assert yaml.safe_load(main)[0]["ansible.builtin.import_tasks"] == "system.yml", (
            f"{role} changes something first"
        )


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_role_works_on_a_system_or_says_why_not(found: dict[tuple[str, str], Any], system: str, role: str) -> None:
    answer = found[system, role]
    word = REFUSED.get(system, {}).get(role)
    if word:
        assert word in answer
        assert answer.startswith(f"{system} runs {SYSTEMS[system][0]}: ")
        return
    values = answer["system"]
    assert values.pop("refused") == ""
    assert all(value or value is False for value in values.values()), (
        "an empty list of packages, or a service without a name"
    )
    debian = found["debian", role]["system"]
    assert values.keys() == debian.keys() - {"refused"}, "what the role reads is there for each system"


def test_packages_and_interpreter_of_the_runtime(found: dict[tuple[str, str], Any]) -> None:
    rocky = found["rocky", "saw_runtime"]["system"]
    assert (rocky["installer"], rocky["packages"], rocky["python"]) == ("dnf", ["python3.12"], "/usr/bin/python3.12")
    for system in ("debian", "ubuntu"):
        values = found[system, "saw_runtime"]["system"]
        assert (values["installer"], values["packages"]) == ("apt", ["python3", "python3-venv"])


def test_packages_of_the_encrypted_data_disk(found: dict[tuple[str, str], Any]) -> None:
    wanted = {
        "debian": ["cryptsetup-bin", "e2fsprogs", "systemd-cryptsetup"],
        "ubuntu": ["cryptsetup-bin", "e2fsprogs", "systemd"],
    }
    listed = {"debian": "workspace.txt", "ubuntu": "workspace-ubuntu.txt"}
    for system, packages in wanted.items():
        assert found[system, "data_disk"]["system"]["packages"] == packages
        assert set(packages) <= set((ROOT / "packer/packages" / listed[system]).read_text().split()), (
            "an image has them already"
        )


@pytest.mark.parametrize(
    ("system", "unit"), [("debian", "ssh.service"), ("ubuntu", "ssh.service"), ("rocky", "sshd.service")]
)
def test_the_ssh_server_gets_what_it_knows(found: dict[tuple[str, str], Any], system: str, unit: str) -> None:
    look = found[system, "ssh_access"]
    assert f"ExecStart=systemctl reload-or-restart {unit}\n" in look["reload"]
    assert ("PerSourcePenalties no\n" in look["sshd"]) is (system == "debian"), "OpenSSH before 9.8 refuses that line"
    assert look["sshd"].count("\nDisableForwarding yes\n") == 1


def test_an_image_of_ubuntu_keeps_its_initrd_and_makes_its_host_key(found: dict[tuple[str, str], Any]) -> None:
    debian, ubuntu = (found[system, "image_hygiene"] for system in ("debian", "ubuntu"))
    assert (debian["system"]["keep_initrd"], ubuntu["system"]["keep_initrd"]) == (False, True)
    assert (debian["system"]["keygen_own"], ubuntu["system"]["keygen_own"]) == (False, True)
    assert "/etc/systemd/system/sshd-keygen.service" in ubuntu["files"]


def test_a_workspace_is_refused_before_anything_is_changed() -> None:
    play = yaml.safe_load((ROOT / "playbooks/workspace_converge.yml").read_text())[0]
    asked = next(task for task in play["pre_tasks"] if "ansible.builtin.include_role" in task)
    named = {one["name"] for one in asked["loop"]}
    own = {entry["role"].rpartition(".")[2] for entry in play["roles"]}
    assert own & set(REFUSED["rocky"]) == named
