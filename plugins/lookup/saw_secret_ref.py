# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The name of a credential that the perimeter adds to calls; the value is never here."""

from __future__ import annotations

DOCUMENTATION = r"""
name: saw_secret_ref
short_description: Refer to a credential of a policy by its name
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Returns the placeholder for a credential that the policy's C(governance.yaml) names. Put it where a tool wants a key or a
    token; the gatekeeper puts the value into the calls that the policy grants it to, outside the workspace.
  - It reads the policy alone. There is no way from here to the value, on whatever machine it runs.
  - A name that the policy does not have is refused.
extends_documentation_fragment:
  - secure_agent.workspace.policy
options:
  _terms:
    description: Ids of credentials.
    required: true
  policy:
    description: Bundle folder or bundle file on the controller.
    type: path
    required: true
  host:
    description: Service as C(host:port) that must be one of those that receive the credential.
    type: str
"""

EXAMPLES = r"""
- name: Give a tool its placeholder
  ansible.builtin.copy:
    dest: /home/agent/.config/tool.ini
    content: |
      token = {{ lookup('secure_agent.workspace.saw_secret_ref', 'git-token', policy='policies/coding') }}
    mode: "0600"
"""

RETURN = r"""
_raw:
  description: One placeholder for each name.
  type: list
  elements: str
  sample: ["openshell:resolve:env:GIT_TOKEN"]
"""

from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import IMPORT_ERROR, SawError, load_any

try:
    from saw.runtime.sandbox import placeholder
except ImportError:
    placeholder = None


class LookupModule(LookupBase):
    """Ansible's way to the names."""

    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[str]:
        """Return one placeholder for each name."""
        if IMPORT_ERROR is not None:
            raise AnsibleLookupError(
                "saw_secret_ref: Ansible's own Python lacks secure-agent-workspace; install it there"
            )
        self.set_options(var_options=variables, direct=kwargs)
        policy, host = str(self.get_option("policy")), self.get_option("host")
        try:
            credentials = {found.id: found for found in load_any(policy).governance.credentials}
        except SawError as error:
            raise AnsibleLookupError(f"saw_secret_ref: {error}") from error
        for name in map(str, terms):
            if name not in credentials:
                there = ", ".join(sorted(credentials)) or "none"
                raise AnsibleLookupError(f"saw_secret_ref: {policy} has no credential {name!r} (it has: {there})")
            if host is not None and str(host) not in credentials[name].hosts:
                receivers = ", ".join(credentials[name].hosts) or "no host, only an inference route"
                raise AnsibleLookupError(f"saw_secret_ref: {name} is not for {host} (it is for: {receivers})")
        return [placeholder(str(name)) for name in terms]
