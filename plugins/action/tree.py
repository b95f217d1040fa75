# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The controller's half of tree: computes the folder's digest, ships it only where the host has another."""

from __future__ import annotations

import hashlib
import os

from ansible.errors import AnsibleActionFail
from ansible_collections.secure_agent.workspace.plugins.plugin_utils.ship import ShippingAction


def list_members(root):
    """Return all files, links and folders below ``root`` as (path, name relative to it), sorted."""
    found = []
    for folder, folders, files in os.walk(root):
        found += [os.path.join(folder, name) for name in (*folders, *files)]
    return [(path, os.path.relpath(path, root)) for path in sorted(found)]


def digest_of(members):
    """SHA-256 over names, kinds, executable bits and contents."""
    total = hashlib.sha256()
    for path, name in members:
        if os.path.islink(path):
            kind, content = "link", os.readlink(path).encode()
        elif os.path.isdir(path):
            kind, content = "folder", b""
        else:
            kind = "program" if os.access(path, os.X_OK) else "file"
            with open(path, "rb") as stream:
                content = hashlib.file_digest(stream, "sha256").digest()
        total.update(f"{kind}\0{name}\0{len(content)}\0".encode() + content)
    return total.hexdigest()


class ActionModule(ShippingAction):
    """Two calls of the module at most: ask, then ship and unpack."""

    _VALID_ARGS = frozenset({"src", "dest"})
    _supports_check_mode = True

    def run(self, tmp=None, task_vars=None):
        """Run the action."""
        super().run(tmp, task_vars)
        del tmp
        source = self._task.args.get("src")
        if not source:
            raise AnsibleActionFail("src is missing: give a folder on the controller")
        source = self._loader.path_dwim(os.path.expanduser(source))
        if not os.path.isdir(source):
            raise AnsibleActionFail(f"{source} is no folder on the controller")
        members = list_members(source)
        arguments = {**self._task.args, "src": source, "digest": digest_of(members)}
        return self.ship_when_needed("secure_agent.workspace.tree", arguments, task_vars, members)
