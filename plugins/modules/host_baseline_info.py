#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the role baseline has to know of a host before it touches anything."""

from __future__ import annotations

DOCUMENTATION = r"""
module: host_baseline_info
short_description: Look at what a host has, and whether hardening SSH would lock people out
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Tells the operating system, which programs and PAM modules are there, and who could still log in by SSH when passwords, or
    root, are no longer taken. Changes nothing and works on a host that is only half configured.
  - Needs nothing but Python's standard library on the host.
attributes:
  check_mode:
    support: full
    description: Only looks.
  diff_mode:
    support: none
    description: Only looks.
  idempotent:
    support: full
    description: Only looks.
options:
  passwords:
    description: Whether SSH is going to take passwords.
    type: bool
    default: false
  root_login:
    description: The coming value of PermitRootLogin.
    type: str
    choices: ['no', prohibit-password, forced-commands-only, 'yes']
    default: prohibit-password
"""

EXAMPLES = r"""
- name: Look at the host
  secure_agent.workspace.host_baseline_info:
    passwords: false
  register: found
"""

RETURN = r"""
system:
  description: Operating system as C(/etc/os-release) names it, and the family that decides how PAM is configured.
  returned: success
  type: dict
  sample: {id: debian, version: "13", family: debian}
booted:
  description: Whether systemd runs here; false in the tree of an image.
  returned: success
  type: bool
  sample: true
container:
  description: Whether this is a container, where most of the kernel's parameters belong to the machine outside.
  returned: success
  type: bool
  sample: false
has:
  description: What is installed. C(logind) also counts only when it is not masked.
  returned: success
  type: dict
  sample: {chrony: false, faillock: true, logind: false, pwquality: false, sshd: true, sudo: true, timesyncd: false}
ssh_running:
  description: Whether the SSH server, or its socket, is active.
  returned: success
  type: bool
  sample: true
ways_in:
  description:
    - Who can log in by SSH without a password. C(certificates) and C(keys command) stand for a configured authority or command.
  returned: success
  type: list
  elements: str
  sample: [root]
refusal:
  description: Why the wanted values would lock people out; empty when they would not.
  returned: success
  type: str
  sample: ""
"""

import fnmatch
import glob
import os
import pwd
from typing import Any

from ansible.module_utils.basic import AnsibleModule

BOOTED = "/run/systemd/system"
OS_RELEASE = "/etc/os-release"
CONTAINER_MARKS = ("/run/systemd/container", "/run/.containerenv", "/.dockerenv")
PAM_FOLDERS = ("/usr/lib/*/security", "/lib/*/security", "/usr/lib64/security", "/lib64/security")
UNIT_FOLDERS = ("/usr/lib/systemd/system", "/lib/systemd/system")
MASKS = "/etc/systemd/system"
SSHD = "/usr/sbin/sshd"
#: Shells of accounts that nobody logs in to.
NO_SHELLS = {"nologin", "false", "sync", "shutdown", "halt"}
FAMILIES = {"debian": "debian", "ubuntu": "debian", "rhel": "redhat", "fedora": "redhat", "centos": "redhat"}


def system() -> dict[str, str]:
    """Read os-release(5)."""
    values: dict[str, str] = {}
    try:
        with open(OS_RELEASE, encoding="utf-8") as stream:
            for line in stream:
                name, mark, value = line.strip().partition("=")
                if mark:
                    values[name] = value.strip("\"'")
    except OSError:
        pass
    known = [values.get("ID", ""), *values.get("ID_LIKE", "").split()]
    family = next((FAMILIES[name] for name in known if name in FAMILIES), "unknown")
    return {"id": values.get("ID", "unknown"), "version": values.get("VERSION_ID", ""), "family": family}


def pam_module(name: str) -> bool:
    """Whether a PAM module is installed."""
    return any(glob.glob(os.path.join(folder, f"{name}.so")) for folder in PAM_FOLDERS)


def unit(name: str) -> bool:
    """Whether a unit is installed and not masked."""
    mask = os.path.join(MASKS, name)
    masked = os.path.islink(mask) and os.readlink(mask) == "/dev/null"
    return not masked and any(os.path.exists(os.path.join(folder, name)) for folder in UNIT_FOLDERS)


class Ssh:
    """The SSH server as it is configured now."""

    def __init__(self, module: AnsibleModule, booted: bool) -> None:
        self.running = False
        self.settings: dict[str, str] | None = None
        if booted:
            units = ["ssh.service", "ssh.socket", "sshd.service", "sshd.socket"]
            answers = module.run_command(["systemctl", "is-active", *units])[1].split()
            self.running = "active" in answers
        if self.running and os.path.exists(SSHD):
            code, out = module.run_command([SSHD, "-T"])[:2]
            if code == 0:
                self.settings = {}
                for line in out.splitlines():  # lists, such as AllowUsers, come as several lines
                    name, value = line.partition(" ")[::2]
                    self.settings[name] = f"{self.settings[name]} {value}" if name in self.settings else value

    def value(self, name: str) -> str:
        """One effective setting; empty when it has none."""
        found = (self.settings or {}).get(name, "")
        return "" if found == "none" else found

    def admits(self, user: str) -> bool:
        """Whether AllowUsers and DenyUsers let this account in, as far as the name alone decides."""

        def named(setting: str) -> bool:
            return any(fnmatch.fnmatchcase(user, entry.split("@")[0]) for entry in self.value(setting).split())

        return not named("denyusers") and (not self.value("allowusers") or named("allowusers"))

    def ways(self, root_login: str) -> list[str]:
        """Who gets in without a password once the wanted values hold."""
        if self.settings is None or self.value("pubkeyauthentication") == "no":
            return []
        found = []
        authority = self.value("trustedusercakeys")
        if authority and filled(authority):
            found.append("certificates")
        if self.value("authorizedkeyscommand"):
            found.append("keys command")
        patterns = self.value("authorizedkeysfile").split()
        for account in pwd.getpwall():
            closed = os.path.basename(account.pw_shell) in NO_SHELLS
            if closed or (account.pw_uid == 0 and root_login == "no") or not self.admits(account.pw_name):
                continue
            if any(filled(expand(pattern, account)) for pattern in patterns):
                found.append(account.pw_name)
        return found

    @property
    def takes_passwords(self) -> bool:
        """Whether a password opens a session now."""
        return "yes" in {self.value("passwordauthentication"), self.value("kbdinteractiveauthentication")}


def filled(path: str) -> bool:
    """Whether a file of keys has any line that is no comment."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return any(line.strip() and not line.lstrip().startswith("#") for line in stream)
    except OSError:
        return False


def expand(pattern: str, account: pwd.struct_passwd) -> str:
    """AuthorizedKeysFile for one account, see sshd_config(5)."""
    for token, value in (("%h", account.pw_dir), ("%u", account.pw_name), ("%%", "%")):
        pattern = pattern.replace(token, value)
    return os.path.join(account.pw_dir, pattern)


def refusal(ssh: Ssh, ways: list[str], passwords: bool, root_login: str) -> str:
    """Say whom the wanted values would lock out, or nothing."""
    if not ssh.running:
        return ""
    if ssh.settings is None:
        return "the SSH server runs, but `sshd -T` fails, so nobody can tell who would be locked out: correct its settings first"
    if not passwords and ssh.takes_passwords and not ways:
        return (
            "no account could log in any more: the SSH server takes passwords, and there is neither an authorized key nor a user"
            " certificate authority. Install a key first, or set baseline_ssh_passwords: true"
        )
    came_as_root = "SSH_CONNECTION" in os.environ and os.geteuid() == 0 and "SUDO_USER" not in os.environ
    if root_login == "no" and came_as_root:
        return (
            "this play came in as root over SSH and would lock itself out: use another account with become, or set"
            " baseline_ssh_root_login: prohibit-password"
        )
    return ""


def look(module: AnsibleModule) -> dict[str, Any]:
    """Look at everything."""
    booted = os.path.isdir(BOOTED)
    ssh = Ssh(module, booted)
    wanted = module.params["root_login"]
    ways = ssh.ways(wanted)
    return {
        "system": system(),
        "booted": booted,
        "container": any(os.path.exists(mark) for mark in CONTAINER_MARKS),
        "has": {
            "sudo": os.path.exists("/usr/sbin/visudo"),
            "sshd": os.path.exists(SSHD),
            "faillock": pam_module("pam_faillock"),
            "pwquality": pam_module("pam_pwquality"),
            "timesyncd": unit("systemd-timesyncd.service"),
            "chrony": unit("chrony.service") or unit("chronyd.service"),
            "logind": unit("systemd-logind.service"),
        },
        "ssh_running": ssh.running,
        "ways_in": ways,
        "refusal": refusal(ssh, ways, module.params["passwords"], wanted),
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "passwords": {"type": "bool", "default": False},
            "root_login": {
                "type": "str",
                "default": "prohibit-password",
                "choices": ["no", "prohibit-password", "forced-commands-only", "yes"],
            },
        },
        supports_check_mode=True,
    )
    found = look(module)
    if found["refusal"]:
        module.warn(found["refusal"])
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
