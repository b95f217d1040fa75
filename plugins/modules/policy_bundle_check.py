#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bundle folder: everything that is wrong with it, its cases, and what it would let workspaces reach."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_bundle_check
short_description: Check and test a policy bundle folder and compare its reach
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads C(policy.yaml) and C(governance.yaml) of a folder, tells all that is wrong with them at once, and runs the cases of
    C(tests.yaml). Fails unless everything is right.
  - On request tells what the bundle would let workspaces reach that they cannot reach now.
extends_documentation_fragment:
  - secure_agent.workspace.policy
  - secure_agent.workspace.policy.attributes
options:
  path:
    description: The bundle folder.
    type: path
    required: true
  cases:
    description: Whether the cases must be there and come out as expected.
    type: bool
    default: true
  cases_file:
    description: Another file of cases than C(tests.yaml) of the folder.
    type: path
  reach:
    description: Whether the reach is compared with O(base), or with nothing at all where there is no base.
    type: bool
    default: false
  base:
    description: Bundle file or folder that the reach is compared with, usually the release in force.
    type: path
"""

EXAMPLES = r"""
- name: Check a policy and see what it changes
  secure_agent.workspace.policy_bundle_check:
    path: policies/coding
    reach: true
    base: build/policy/releases/coding-6.bundle.json
  delegate_to: localhost
  vars:
    ansible_python_interpreter: "{{ ansible_playbook_python }}"
  register: checked

- name: Show it
  ansible.builtin.debug:
    var: checked.reach.lines
"""

RETURN = r"""
blueprint:
  description: Name of the blueprint.
  type: str
  returned: when the files can be read
  sample: coding
version:
  description: Its version.
  type: str
  returned: when the files can be read
  sample: 1.0.0
members:
  description: SHA-256 of each file of the bundle.
  type: dict
  returned: when the files can be read
  sample: {governance.yaml: 5feceb66ffc8, policy.yaml: 6b86b273ff34}
problems:
  description: Everything that is wrong, with its place (counted from 1), the reason and the cure.
  type: list
  elements: dict
  returned: always
  sample:
    - file: policies/coding/policy.yaml
      line: 12
      column: 9
      field: network_policies.git.endpoints[0].access
      reason: read is not one of read-only, read-write, full
      cure: use one of them
cases:
  description: Every case and how it went; C(fault) is empty when the decision was as expected.
  type: list
  elements: dict
  returned: always
  sample: [{name: an agent may fetch, fault: ""}]
reach:
  description:
    - What is gained and lost. C(lines) is the same for people; C(reach_digest) names exactly this change, for approvals and
      signatures.
  type: dict
  returned: when O(reach=true)
  sample:
    old: coding 1.0.0
    new: coding 1.1.0
    widening: true
    reach_digest: 066ba66d02bb12518e13595cbad024c940ee37395a9841d9e0b8cd196eeada18
    gained: [{subject: call, risk: high, what: "POST https://api.example.com:443/v1/notes", why: was refused}]
    lost: []
    lines: ["GAINED · high", "  + POST https://api.example.com:443/v1/notes"]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: policy_invalid, details: {}, cure: correct the named fields}
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import (
    member_digests,
    reach_between,
    reach_result,
    read_file,
    reporting,
)

try:
    from saw.policy.casefile import load_cases, run_case
    from saw.policy.errors import PolicyError
    from saw.policy.loader import load_bundle_folder
    from saw.policy.matcher import Matcher
except ImportError:  # reporting() tells the person
    PolicyError = None


def refuse(module: AnsibleModule, msg: str, code: str, cure: str, result: dict[str, Any], **details: Any) -> None:
    """End with everything that was found."""
    module.fail_json(msg=msg, failure={"code": code, "details": details, "cure": cure}, **result)


def check(module: AnsibleModule) -> dict[str, Any]:
    """Do the checks and return the module's result."""
    path = module.params["path"]
    result: dict[str, Any] = {"changed": False, "problems": [], "cases": []}
    cases = []
    try:
        bundle = load_bundle_folder(path)
        matcher = Matcher.compile(bundle.policy, bundle.governance)
        if module.params["cases"]:
            file = module.params["cases_file"] or os.path.join(path, "tests.yaml")
            cases = load_cases(read_file(file), file).cases
    except PolicyError as error:
        result["problems"] = error.details["problems"]
        refuse(module, str(error), error.code, error.cure or "correct the named fields", result, **error.details)
    blueprint = bundle.governance.blueprint
    result.update(blueprint=blueprint.name, version=blueprint.version, members=member_digests(bundle.members))
    outcomes = [run_case(case, matcher, bundle.governance) for case in cases]
    result["cases"] = [{"name": outcome.name, "fault": outcome.fault} for outcome in outcomes]
    failed = [case for case in result["cases"] if case["fault"]]
    if failed:
        listing = "\n".join(f"  {case['name']}: {case['fault']}" for case in failed)
        msg = f"{path}: {len(failed)} of {len(outcomes)} cases did not come out as expected\n{listing}"
        refuse(module, msg, "cases_failed", "correct the policy, or the case", result, cases=failed)
    if module.params["reach"]:
        result["reach"] = reach_result(reach_between(module.params["base"], bundle)[0])
    return result


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "cases": {"type": "bool", "default": True},
            "cases_file": {"type": "path"},
            "reach": {"type": "bool", "default": False},
            "base": {"type": "path"},
        },
        supports_check_mode=True,
    )
    with reporting(module):
        module.exit_json(**check(module))


if __name__ == "__main__":
    main()
