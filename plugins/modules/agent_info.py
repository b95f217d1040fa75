#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the broker holds about agents."""

from __future__ import annotations

DOCUMENTATION = r"""
module: agent_info
short_description: Read agents from the broker
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads one agent, or those that filters choose; retired ones too.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  id:
    description: Id of one agent.
    type: str
  name:
    description: Only agents with this name; a retired one may have had it too.
    type: str
  workspace:
    description: Only agents that are, or were, of this workspace.
    type: str
  sponsor:
    description: Only agents of this sponsor.
    type: str
  state:
    description: Only agents in this state.
    type: str
    choices: [registered, active, suspended, retired]
"""

EXAMPLES = r"""
- name: Read the agent of a workspace, and those before it
  secure_agent.workspace.agent_info:
    workspace: ws-demo
  register: found
"""

RETURN = r"""
agents:
  description: The agents, in the order in which they were registered; empty when there is none.
  type: list
  elements: dict
  returned: success
  sample: [{id: agent-7, name: notes-helper, state: active, workspace: ws-demo, version: 3}]
"""

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, found, operator

try:
    from saw.broker.client import listed_agents
except ImportError:
    listed_agents = None  # the module then ends in ``operator``, which names the missing package

FILTERS = ("name", "workspace", "sponsor", "state")


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str"},
            name={"type": "str"},
            workspace={"type": "str"},
            sponsor={"type": "str"},
            state={"type": "str", "choices": ["registered", "active", "suspended", "retired"]},
        ),
        mutually_exclusive=[("id", name) for name in FILTERS],
        supports_check_mode=True,
    )
    with operator(module) as client:
        if module.params["id"] is None:
            filters = {name: [module.params[name]] for name in FILTERS if module.params[name] is not None}
            agents = listed_agents(client, **filters)
        else:
            one = found(client, f"/v1/agents/{module.params['id']}", "unknown_agent")
            agents = [] if one is None else [one]
        module.exit_json(changed=False, agents=agents)


if __name__ == "__main__":
    main()
