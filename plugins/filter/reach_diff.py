# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What one bundle lets workspaces reach beyond another."""

from __future__ import annotations

DOCUMENTATION = r"""
name: reach_diff
short_description: Compare what two policy bundles let workspaces reach
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Compares two bundles by what they allow, not by their text, and tells what is gained and lost.
  - Signatures are not looked at; M(secure_agent.workspace.policy_verify) does that.
extends_documentation_fragment:
  - secure_agent.workspace.policy
positional: new
options:
  _input:
    description: Bundle file or folder on the controller that is in force; empty for none, with which everything is gained.
    type: path
    required: true
  new:
    description: Bundle file or folder on the controller that is to follow it.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Refuse a change that lets workspaces reach more
  ansible.builtin.assert:
    that: not change.widening
    fail_msg: "{{ change.lines | join('\n') }}"
  vars:
    change: "{{ 'releases/coding-6.bundle.json' | secure_agent.workspace.reach_diff('policies/coding') }}"
"""

RETURN = r"""
_value:
  description:
    - C(gained) and C(lost), C(widening), C(reach_digest) that names exactly this change, and C(lines) with the same for people.
  type: dict
  sample: {widening: false, reach_digest: 066ba66d02bb12518e13, gained: [], lost: [], lines: []}
"""

from typing import Any

from ansible.errors import AnsibleFilterError
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import (
    IMPORT_ERROR,
    SawError,
    load_any,
    reach_between,
    reach_result,
)


def reach_diff(old: str | None, new: str) -> dict[str, Any]:
    """Compare the bundles at two paths."""
    if IMPORT_ERROR is not None:
        raise AnsibleFilterError("reach_diff: Ansible's own Python lacks secure-agent-workspace; install it there")
    try:
        return reach_result(reach_between(str(old) if old else None, load_any(str(new)))[0])
    except SawError as error:
        raise AnsibleFilterError(f"reach_diff: {error}") from error


class FilterModule:
    """Ansible's way to the filter."""

    def filters(self) -> dict[str, Any]:
        """Return the filter by name."""
        return {"reach_diff": reach_diff}
