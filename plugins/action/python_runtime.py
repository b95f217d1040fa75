# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's half of python_runtime: reads the lock, ships the wheelhouse only where the host lacks it."""

from __future__ import annotations

import os

from ansible.errors import AnsibleActionFail
from ansible_collections.secure_agent.workspace.plugins.plugin_utils.ship import ShippingAction


def read_lock(wheelhouse):
    """Return the lock's text; every requirement in it must be pinned by hash."""
    path = os.path.join(wheelhouse, "requirements.txt")
    try:
        with open(path, encoding="utf-8") as stream:
            lock = stream.read()
    except OSError as error:
        raise AnsibleActionFail(f"cannot read {path}: {error.strerror} (build the wheelhouse first)") from error
    statements = [
        line for line in lock.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    unlocked = [line.split()[0] for line in statements if "--hash=sha256:" not in line]
    if unlocked or not statements:
        named = ", ".join(unlocked) or "nothing"
        raise AnsibleActionFail(f"{path} does not pin every requirement by hash: {named} (build the wheelhouse again)")
    return lock


class ActionModule(ShippingAction):
    """Two calls of the module at most: ask, then ship and install."""

    _VALID_ARGS = frozenset({"wheelhouse", "path", "python", "links", "verify"})
    _supports_check_mode = True

    def run(self, tmp=None, task_vars=None):
        """Run the action."""
        super().run(tmp, task_vars)
        del tmp
        wheelhouse = self._task.args.get("wheelhouse")
        if not wheelhouse:
            raise AnsibleActionFail("wheelhouse is missing: give the folder with requirements.txt and the wheels")
        wheelhouse = self._loader.path_dwim(os.path.expanduser(wheelhouse))
        arguments = {**self._task.args, "wheelhouse": wheelhouse, "lock": read_lock(wheelhouse)}
        names = [name for name in sorted(os.listdir(wheelhouse)) if name == "requirements.txt" or name.endswith(".whl")]
        members = [(os.path.join(wheelhouse, name), name) for name in names]
        return self.ship_when_needed("secure_agent.workspace.python_runtime", arguments, task_vars, members)
