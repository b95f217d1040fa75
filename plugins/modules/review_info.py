#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which calls wait for people, and who may decide."""

from __future__ import annotations

DOCUMENTATION = r"""
module: review_info
short_description: Read reviews and reviewers from the broker
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads calls that wait for people, or did, and who may decide on them. Changes to the fleet are of the kind C(gate).
  - The newest 1000 of those that are asked for; C(saw review list --after) reads further.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  id:
    description: Id of one review; it comes with what a reviewer is shown and with every decision.
    type: str
  state:
    description: Only reviews in this state.
    type: str
    choices: [pending, approved, executing, done, failed, unknown, denied, expired, cancelled]
  workspace:
    description: Only reviews of this workspace.
    type: str
  owed:
    description: Only reviews whose glass was broken and which nobody has looked at since.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Which calls of a workspace wait for people
  secure_agent.workspace.review_info:
    workspace: ws-demo
    state: pending
  register: waiting

- name: Nobody has forgotten to look at a broken glass
  secure_agent.workspace.review_info:
    owed: true
  register: owed
  failed_when: owed.reviews | selectattr('after_state', 'eq', 'overdue') | length > 0
"""

RETURN = r"""
reviews:
  description: The reviews, newest first; empty when O(id) does not exist.
  type: list
  elements: dict
  returned: success
  sample: [{id: rv-0f3c, state: pending, workspace_id: ws-demo, method: POST, host: api.example.com, approved_by: []}]
reviewers:
  description: Everybody who may decide, or might once.
  type: list
  elements: dict
  returned: success
  sample: [{name: ben@example.com, state: active, groups: [maintainers]}]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: unknown_workspace, details: {}, cure: saw workspace list shows them}
"""

from urllib.parse import quote, urlencode

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, found, operator

STATES = ["pending", "approved", "executing", "done", "failed", "unknown", "denied", "expired", "cancelled"]


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str"},
            state={"type": "str", "choices": STATES},
            workspace={"type": "str"},
            owed={"type": "bool", "default": False},
        ),
        mutually_exclusive=[("id", "state"), ("id", "workspace")],
        supports_check_mode=True,
    )
    with operator(module) as client:
        if module.params["id"] is not None:
            one = found(client, f"/v1/reviews/{quote(module.params['id'], safe='')}", "unknown_review")
            reviews = [] if one is None else [one]
        else:
            wanted = {"state": module.params["state"], "workspace_id": module.params["workspace"]}
            wanted |= {"owed": "true"} if module.params["owed"] else {}
            query = urlencode({name: value for name, value in wanted.items() if value is not None})
            reviews = client.request("GET", f"/v1/reviews?{query}")["reviews"]
        reviewers = client.request("GET", "/v1/reviewers")["reviewers"]
        module.exit_json(changed=False, reviews=reviews, reviewers=reviewers)


if __name__ == "__main__":
    main()
