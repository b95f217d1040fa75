#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Who has, or had, a session with which workspace."""

from __future__ import annotations

DOCUMENTATION = r"""
module: session_info
short_description: Read sessions through a bastion from the broker
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads one session, or those of a workspace or a person, the newest first. What was recorded is not read.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  id:
    description: Id of one session.
    type: str
  workspace:
    description: Only sessions with this workspace.
    type: str
  person:
    description: Only sessions of this person, by the name that they signed in with.
    type: str
  live:
    description:
      - Only sessions that are open or ending, or may still be opened, however many there are.
      - Otherwise the newest 1000.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Read who is in a workspace now
  secure_agent.workspace.session_info:
    workspace: ws-demo
    live: true
  register: inside
"""

RETURN = r"""
sessions:
  description: The sessions; empty when there is none, or none with O(id).
  type: list
  elements: dict
  returned: success
  sample: [{id: ses-0f3c, state: open, who: "user:ada", workspace: ws-demo, started_at: "2026-11-29T08:00:00.000000Z"}]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: unavailable, details: {}, cure: check that saw-broker runs and the context}
"""

from urllib.parse import quote, urlencode

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, found, operator


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str"},
            workspace={"type": "str"},
            person={"type": "str"},
            live={"type": "bool", "default": False},
        ),
        mutually_exclusive=[("id", "workspace"), ("id", "person")],
        supports_check_mode=True,
    )
    wanted = module.params
    with operator(module) as client:
        if wanted["id"] is not None:
            one = found(client, f"/v1/sessions/{quote(wanted['id'], safe='')}", "unknown_session")
            sessions = [] if one is None else [one]
        else:
            asked = {"workspace_id": wanted["workspace"], "person": wanted["person"], "live": int(wanted["live"])}
            query = urlencode({name: value for name, value in asked.items() if value is not None})
            sessions = client.request("GET", f"/v1/sessions?{query}")["sessions"]
        module.exit_json(changed=False, sessions=sessions)


if __name__ == "__main__":
    main()
