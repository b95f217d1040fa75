# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What a policy decides on a call, and why."""

from __future__ import annotations

DOCUMENTATION = r"""
name: policy_rule
short_description: Explain what a policy bundle decides on a call
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Decides one call for each URL exactly as both rings would, and tells which rule decided and what would have allowed it.
extends_documentation_fragment:
  - secure_agent.workspace.policy
options:
  _terms:
    description: URLs of the calls, absolute, C(https) or C(http).
    required: true
  policy:
    description: Bundle folder or bundle file on the controller.
    type: path
    required: true
  method:
    description: HTTP method.
    type: str
    default: GET
  binary:
    description: Resolved path of the calling program.
    type: path
  headers:
    description: Headers of the call.
    type: dict
    default: {}
  body:
    description: Body of the call.
    type: str
"""

EXAMPLES = r"""
- name: Refuse a policy that lets agents merge
  ansible.builtin.assert:
    that: decision.verdict == 'deny'
    fail_msg: "{{ decision.rule }} allows it"
  vars:
    decision: >-
      {{ lookup('secure_agent.workspace.policy_rule', 'https://git.example.com/api/merge', policy='policies/coding',
                method='POST', binary='/usr/bin/git') }}
"""

RETURN = r"""
_raw:
  description:
    - One decision for each URL. C(verdict) is V(allow) or V(deny); C(rule) decided; C(rule_missing) and C(next_steps) tell what
      would have allowed it.
  type: list
  elements: dict
  sample:
    - verdict: deny
      reason: host_not_allowed
      detail: no endpoint is example.com:443
      policy: ""
      rule: ""
      action_class: auto
      credential: null
      inference: null
      canonical_path: /
      rule_missing: {host: example.com, port: 443}
      next_steps: []
"""

from typing import Any

from ansible.errors import AnsibleLookupError
from ansible.plugins.lookup import LookupBase
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import IMPORT_ERROR, SawError, load_any

try:
    import msgspec
    from saw.policy.casefile import Call, as_request
    from saw.policy.matcher import Matcher
except ImportError:
    msgspec = None


class LookupModule(LookupBase):
    """Ansible's way to the decision."""

    def run(self, terms: list[str], variables: Any = None, **kwargs: Any) -> list[dict[str, Any]]:
        """Return one decision for each URL."""
        if IMPORT_ERROR is not None:
            raise AnsibleLookupError("policy_rule: Ansible's own Python lacks secure-agent-workspace; install it there")
        self.set_options(var_options=variables, direct=kwargs)
        # Ansible's strings carry their origin with them; a decision is made of plain ones.
        given = {name: self.get_option(name) for name in ("method", "binary", "body")}
        call = {name: None if value is None else str(value) for name, value in given.items()}
        call["headers"] = {str(name): str(value) for name, value in self.get_option("headers").items()}
        try:
            bundle = load_any(str(self.get_option("policy")))
            matcher = Matcher.compile(bundle.policy, bundle.governance)
            return [msgspec.to_builtins(matcher.decide(as_request(Call(url=str(url), **call)))) for url in terms]
        except SawError as error:
            raise AnsibleLookupError(f"policy_rule: {error}") from error
        except ValueError as error:
            raise AnsibleLookupError(f"policy_rule: {error} (give absolute URLs)") from error
