#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the broker holds about workspaces, and what others need to trust it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: workspace_info
short_description: Read workspaces and trust material from the broker
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads one workspace, or all, and the public material that a new workspace or perimeter has to be told.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  id:
    description: Name of one workspace. Without it, all are returned.
    type: str
"""

EXAMPLES = r"""
- name: Read one workspace
  secure_agent.workspace.workspace_info:
    id: ws-demo
  register: found
"""

RETURN = r"""
workspaces:
  description:
    - The workspaces; empty when O(id) is not registered.
    - C(version) counts changes of state, image, agent and endorsement key.
  type: list
  elements: dict
  returned: success
  sample: [{id: ws-demo, number: 1, state: active, version: 3}]
trust:
  description: Trust domain, authority certificate, SSH authorities and TUF root.
  type: dict
  returned: success
  sample:
    trust_domain: saw.example
    ca_pem: "-----BEGIN CERTIFICATE-----"
    ssh_user_ca: ssh-ed25519 AAAA
    ssh_host_ca: ssh-ed25519 AAAA
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, found, operator


def main() -> None:
    """Entry point."""
    module = AnsibleModule(argument_spec=broker_options(id={"type": "str"}), supports_check_mode=True)
    with operator(module) as client:
        if module.params["id"] is None:
            workspaces = client.request("GET", "/v1/workspaces")["workspaces"]
        else:
            one = found(client, f"/v1/workspaces/{module.params['id']}", "unknown_workspace")
            workspaces = [] if one is None else [one]
        module.exit_json(changed=False, workspaces=workspaces, trust=client.request("GET", "/v1/trust"))


if __name__ == "__main__":
    main()
