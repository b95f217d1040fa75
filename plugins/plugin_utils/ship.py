# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""For actions that ship a folder of the controller: ask the host's module first, send one archive only when it is needed."""

from __future__ import annotations

import tarfile
import tempfile

from ansible.plugins.action import ActionBase


class ShippingAction(ActionBase):
    """Base of actions whose module answers ``needs_archive`` when the host lacks what the controller holds."""

    def ship_when_needed(self, module_name, arguments, task_vars, members):
        """Run the module; when it asks for it, run it again with ``archive`` set to the shipped file.

        ``members`` are pairs of a local path and its name in the archive. Returns the module's result.
        """
        result = self._execute_module(module_name=module_name, module_args=arguments, task_vars=task_vars)
        if not result.pop("needs_archive", False):
            return result
        shell = self._connection._shell  # noqa: SLF001 - how actions reach the host's paths
        remote = shell.join_path(self._make_tmp_path(), "shipped.tar")
        try:
            with tempfile.NamedTemporaryFile(suffix=".tar") as local:
                with tarfile.open(local.name, "w") as archive:
                    for path, name in members:
                        archive.add(path, arcname=name, recursive=False)
                self._transfer_file(local.name, remote)
            arguments = {**arguments, "archive": remote}
            return self._execute_module(module_name=module_name, module_args=arguments, task_vars=task_vars)
        finally:
            self._remove_tmp_path(shell.tmpdir)
