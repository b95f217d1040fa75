#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The broker's configuration file: checked by the broker's own loader before it takes the place of the old one."""

from __future__ import annotations

DOCUMENTATION = r"""
module: broker_config
short_description: Write the broker's configuration file, or a part of it
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Writes C(/etc/saw/broker.json) on the control host. The whole new content is read by the installed broker's own loader first.
    What it refuses is an error that names the field, the reason and the cure, and the file stays as it was.
  - The file is replaced atomically, with owner and mode.
  - The running broker is not touched. It reads the file at its start alone, so RV(restart_needed) tells whether to restart it,
    also when an earlier play wrote the file and ended before the restart.
  - The role C(broker) writes the same file whole and restarts the broker in the same step. On its hosts use its variables; use
    this module where the broker was installed in another way.
  - The file holds no secret, only names of files that do; a password in O(settings) is refused and not repeated.
attributes:
  check_mode:
    support: full
    description: Checks the new content and reports what would change.
  diff_mode:
    support: full
    description: Shows the file before and after.
  idempotent:
    support: full
    description: A second call with the same arguments changes nothing.
options:
  settings:
    description:
      - The settings, by the names that they have in the file. V(null) takes one away.
    type: dict
    required: true
  merge:
    description:
      - Whether O(settings) are laid over those that the file has. Mappings are merged, lists are replaced.
      - Without it the file has O(settings) and nothing else.
    type: bool
    default: false
  path:
    description: The file.
    type: path
    default: /etc/saw/broker.json
  owner:
    description: Owning account.
    type: str
    default: root
  group:
    description: Owning group; the broker's own must be able to read the file.
    type: str
    default: saw-broker
  mode:
    description: Permission bits, in octal.
    type: str
    default: "0640"
  saw:
    description: The installed command, whose loader decides.
    type: path
    default: /opt/saw/bin/saw
  unit:
    description: The broker's unit. When it has been running since before the file was last written, it has not read it.
    type: str
    default: saw-broker.service
"""

EXAMPLES = r"""
- name: Keep releases longer in the first wave
  secure_agent.workspace.broker_config:
    merge: true
    settings:
      rollout: {first_wave: 5, soak_s: 3600}
  register: broker_config

- name: Have the broker read it
  ansible.builtin.systemd_service:
    name: saw-broker.service
    state: restarted
  when: broker_config.restart_needed
"""

RETURN = r"""
file:
  description: The file.
  type: str
  returned: success
  sample: /etc/saw/broker.json
changed_settings:
  description: Settings that differ (or would), with dots between the levels.
  type: list
  elements: str
  returned: success
  sample: [rollout.first_wave, rollout.soak_s]
restart_needed:
  description: Whether the broker has yet to read the file as it is (or would be); it reads it at its start alone.
  type: bool
  returned: success
  sample: true
failure:
  description: What was refused, for programs.
  type: dict
  returned: failure
  sample: {code: config_invalid, details: {problems: [rollout.soak_s must be 0 to 2592000]}, cure: correct the named fields}
"""

import json
import os
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.managed_file import (
    ComponentError,
    ManagedFile,
)
from ansible_collections.secure_agent.workspace.plugins.module_utils.systemd_time import started_at


def laid_over(old: Any, new: Any) -> Any:
    """Return ``new`` over ``old``: mappings are merged, null takes a setting away, all else is replaced."""
    if not isinstance(new, dict):
        return new
    found = dict(old) if isinstance(old, dict) else {}
    for name, value in new.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = laid_over(found.get(name), value)
    return found


def differing(old: Any, new: Any, at: str = "") -> list[str]:
    """Return the names of settings that differ, sorted."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted({*old, *new})
        return [
            found
            for name in names
            for found in differing(old.get(name), new.get(name), f"{at}.{name}" if at else str(name))
        ]
    return [] if old == new and type(old) is type(new) else [at]


def settings_of(file: ManagedFile) -> dict[str, Any]:
    """Return what the file has now; raise :class:`ComponentError` for one that is no JSON object."""
    if file.before is None:
        return {}
    try:
        found = json.loads(file.before)
    except ValueError as error:
        raise ComponentError(
            f"{file.dest} is no JSON: {error}",
            "not_json",
            "correct it, or write it whole (merge: false)",
            dest=file.dest,
        ) from error
    if not isinstance(found, dict):
        raise ComponentError(
            f"{file.dest} is no JSON object", "not_json", "correct it, or write it whole (merge: false)", dest=file.dest
        )
    return found


def check(module: AnsibleModule, file: ManagedFile) -> None:
    """Raise :class:`ComponentError` with the loader's words when the broker would not start with the new content."""
    saw = module.params["saw"]
    if not os.path.exists(saw):
        raise ComponentError(
            f"{saw} is missing on this host: nothing can check {file.dest}",
            "needs_missing",
            "install it first (role saw_runtime), or name it with saw",
            missing=[saw],
        )
    with tempfile.TemporaryDirectory(prefix="saw-config-") as folder:
        staged = os.path.join(folder, os.path.basename(file.dest))
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            stream.write(file.content)
        code, out, err = module.run_command([saw, "broker", "check", "--config", staged, "--json"])
        if code == 0:
            return
        try:
            told = json.loads(out)["error"]
        except (ValueError, KeyError, TypeError):
            told = {
                "code": "content_refused",
                "message": (err or out).strip()[-1500:],
                "cure": "read the message",
                "details": {},
            }
        message = str(told["message"]).replace(staged, file.dest)
        raise ComponentError(
            f"{message} ({told['cure']})", told["code"], told["cure"], dest=file.dest, **told["details"]
        )


def unread(module: AnsibleModule, file: ManagedFile) -> bool:
    """Tell whether the unit has been running since before the file was last written; a host without systemd runs none."""
    systemctl = module.get_bin_path("systemctl")
    if systemctl is None or file.before is None:
        return False
    names = "ActiveState,ActiveEnterTimestamp"
    command = [systemctl, "show", "--timestamp=us+utc", f"--property={names}", module.params["unit"]]
    out = module.run_command(command)[1]
    told = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    if told.get("ActiveState") != "active":
        return False
    return os.stat(file.dest).st_mtime > started_at(told.get("ActiveEnterTimestamp", ""))


def ensure(module: AnsibleModule) -> dict[str, Any]:
    """Do it and return the module's result."""
    wanted = module.params
    how = {"dest": wanted["path"], "secret_base64": None, "validate": [], "apply": []}
    how |= {name: wanted[name] for name in ("owner", "group", "mode")}
    file = ManagedFile({**how, "content": ""})
    if wanted["merge"]:
        before = settings_of(file)
        after = laid_over(before, wanted["settings"])
    else:
        after = laid_over({}, wanted["settings"])
        try:
            before = settings_of(file)
        except ComponentError:
            before = {}
    changed = differing(before, after)
    same = file.before is not None and not changed
    # What says the same is left as it is written.
    file.content = file.before if same else (json.dumps(after, indent=4, sort_keys=True) + "\n").encode()
    if file.content_changes:
        check(module, file)
    if file.differs and not module.check_mode:
        file.write(file.content, file.meta)
    return {
        "changed": file.differs,
        "file": file.dest,
        "changed_settings": changed,
        "restart_needed": file.content_changes or unread(module, file),
        "diff": [file.diff()] if file.differs else [],
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "settings": {"type": "dict", "required": True},
            "merge": {"type": "bool", "default": False},
            "path": {"type": "path", "default": "/etc/saw/broker.json"},
            "owner": {"type": "str", "default": "root"},
            "group": {"type": "str", "default": "saw-broker"},
            "mode": {"type": "str", "default": "0640"},
            "saw": {"type": "path", "default": "/opt/saw/bin/saw"},
            "unit": {"type": "str", "default": "saw-broker.service"},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**ensure(module))
    except ComponentError as error:
        module.fail_json(msg=str(error), failure=error.failure)


if __name__ == "__main__":
    main()
