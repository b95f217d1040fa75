#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Automation denies a call that waits for people; approving is for people alone."""

from __future__ import annotations

DOCUMENTATION = r"""
module: review_decision
short_description: Deny a call that waits for review
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Signs a denial with the key of a reviewer and hands it to the broker. A denial ends the review.
  - Approving is for people, who look at the call with C(saw review approve); there is no such choice here.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  id:
    description: Id of the review.
    type: str
    required: true
  decision:
    description: What is decided.
    type: str
    required: true
    choices: [deny]
  key:
    description: Private key file of a reviewer of the group that decides, or V(exec:/path/to/program) that signs.
    type: str
    required: true
  passphrase_file:
    description: File with the passphrase of the key.
    type: path
  comment:
    description: Why, at most 256 characters. It is signed and kept.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: Deny whatever waits outside of working hours
  secure_agent.workspace.review_decision:
    id: "{{ item.id }}"
    decision: deny
    key: /etc/saw/keys/night-watch.key
    comment: nobody looks at it before tomorrow
  loop: "{{ waiting.reviews }}"
"""

RETURN = r"""
review:
  description: The review as it is now; in check mode, as it is before the denial.
  type: dict
  returned: success
  sample: {id: rv-0f3c, state: denied, workspace_id: ws-demo, detail: denied by night-watch}
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: review_not_open, details: {}, cure: it is decided no longer}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator

try:
    from saw.policy.keys import read_passphrase
    from saw.policy.signers import open_signer
    from saw.review.decide import decide, look, review_path, reviewer_of
except ImportError:
    look = None  # the module then ends in ``operator``, which names the missing package


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    wanted = module.params
    before = client.request("GET", review_path(wanted["id"]))
    if before["state"] == "denied":
        return result(before, before)
    signer = open_signer(wanted["key"], read_passphrase(wanted["passphrase_file"]))
    if module.check_mode:
        reviewer_of(client, signer)
        can = before["state"] in {"pending", "approved"}
        return {**result(before, before), "changed": can}
    after = decide(client, look(client, wanted["id"]), signer, wanted["decision"], wanted["comment"])
    return result(before, after)


def result(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Return the module's result, without the call itself."""
    shown = [
        {name: value for name, value in one.items() if name not in {"rendering", "decisions", "changed"}}
        for one in (before, after)
    ]
    return {
        "changed": before["state"] != after["state"],
        "review": shown[1],
        "diff": {"before": {"state": before["state"]}, "after": {"state": after["state"]}},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str", "required": True},
            decision={"type": "str", "required": True, "choices": ["deny"]},
            key={"type": "str", "required": True, "no_log": False},
            passphrase_file={"type": "path", "no_log": False},
            comment={"type": "str", "default": "by playbook"},
        ),
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
