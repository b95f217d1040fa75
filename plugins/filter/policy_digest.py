# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The digest that names a signed bundle."""

from __future__ import annotations

DOCUMENTATION = r"""
name: policy_digest
short_description: Tell the digest of a signed policy bundle
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads a bundle file and returns its policy digest, which names content, revision and window. Workspaces report it as loaded,
    and certificates carry it.
  - A folder has none, since revision and window belong to it. Signatures are not looked at.
extends_documentation_fragment:
  - secure_agent.workspace.policy
options:
  _input:
    description: Bundle file on the controller.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Tell the digest
  ansible.builtin.debug:
    msg: "{{ 'releases/coding-7.bundle.json' | secure_agent.workspace.policy_digest }}"
"""

RETURN = r"""
_value:
  description: Lower-case hexadecimal SHA-256.
  type: str
  sample: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
"""

import os
from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import IMPORT_ERROR, SawError, read_file

try:
    from saw.policy.bundle import describe
except ImportError:
    describe = None


def policy_digest(path: str) -> str:
    """Return the digest of the bundle file at ``path``."""
    if IMPORT_ERROR is not None:
        raise AnsibleFilterError("policy_digest: Ansible's own Python lacks secure-agent-workspace; install it there")
    if os.path.isdir(path):
        raise AnsibleFilterError(
            f"policy_digest: {path} is a folder (sign it first; the digest names the revision too)"
        )
    try:
        return describe(read_file(str(path)))[0]
    except SawError as error:
        raise AnsibleFilterError(f"policy_digest: {path}: {error}") from error


class FilterModule:
    """Ansible's way to the filter."""

    def filters(self) -> dict[str, Any]:
        """Return the filter by name."""
        return {"policy_digest": policy_digest}
