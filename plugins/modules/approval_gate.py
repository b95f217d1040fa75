#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A play stops until people have approved this wave of it. All of it is done by the action plugin of this name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: approval_gate
short_description: Stop a play until people have approved this wave of it
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - States what this wave of the play will run, as digests of the project's files, hosts, variables, image and policy, and asks
    the people of the gate at the broker. They decide in the browser with a passkey, or with C(saw review).
  - While it waits it tells the id and where people decide. When they agreed, it states everything again and claims the approval,
    which is possible once and only when nothing has changed.
  - The task runs once for each batch of hosts (C(serial)), so each wave has a question and a claim of its own.
  - A question that nobody decided waits on when the play is stopped. The same play asks for the same id again.
  - Automation cannot approve.
extends_documentation_fragment:
  - secure_agent.workspace.broker
attributes:
  check_mode:
    support: full
    description: Shows what would be asked and asks nobody.
  diff_mode:
    support: full
    description: Shows the difference to the last approved statement of the gate, in check mode.
  idempotent:
    support: partial
    description: The same question is asked once while it waits. A claim is given once, so each run needs an approval of its own.
  action:
    support: full
    description: All of it is done on the controller, which needs the Python package.
  bypass_host_loop:
    support: full
    description: Runs once for each batch of hosts. The strategy C(free) has no batches and is not supported by it.
  action_group:
    support: full
    description: Set O(context) once for a play through the action group.
    membership: [secure_agent.workspace.broker]
options:
  name:
    description:
      - Name of the gate at the broker (role variable C(broker_gates)), which says who decides and how many of them.
      - Required unless O(state) is V(done) or V(failed).
    type: str
  purpose:
    description: What the change is for, one line that people read. Required unless O(state) is V(done) or V(failed).
    type: str
  requested_by:
    description:
      - Name of the person who asks, as the identity provider or the register of reviewers has it. This person may not approve.
      - Without it, the person who launched the job in AWX (C(awx_user_email), else C(awx_user_name)).
    type: str
  state:
    description:
      - V(approved) asks, waits, and claims.
      - V(asked) asks and does not wait. A later task or job claims with O(id).
      - V(done) and V(failed) tell how a wave ended that was claimed.
    type: str
    choices: [approved, asked, done, failed]
    default: approved
  hosts:
    description: Hosts of the wave. Without it, the hosts of the present batch.
    type: list
    elements: str
  paths:
    description: Folders and files on the controller whose content is bound. Without it, the folder of the playbook.
    type: list
    elements: path
  exclude:
    description: Names of files and folders below O(paths) that are not bound, as patterns of a shell. People see the patterns.
    type: list
    elements: str
    default: [.git]
  variables:
    description:
      - Variables whose values are bound, for the first host of the wave. People see the values, so bind none that is secret.
      - Names of secrets (such as C(token)) and values of C(!vault) are refused. A value from a file that is encrypted as a whole,
        or that is computed from a secret, cannot be told apart.
      - Of other variables that were given to the run (C(--extra-vars), a survey), people see the names.
    type: dict
    default: {}
  image:
    description: SHA-256 of the image that is rolled out, if any.
    type: str
    default: ""
  policy:
    description: Digest of the policy that is rolled out, if any.
    type: str
    default: ""
  id:
    description:
      - Id of a question that was asked before, so that this run claims its approval and asks nothing.
      - Required when O(state) is V(done) or V(failed).
    type: str
  claim:
    description: The RV(claim) of the run that tells its end. Required when O(state) is V(done) or V(failed).
    type: str
  detail:
    description: How the wave ended, in one line.
    type: str
    default: ""
  timeout:
    description: How long to wait for people, seconds. The question waits on after that.
    type: int
    default: 3600
  poll:
    description: How often it is told that it waits (with C(-v)), seconds, 1 to 30.
    type: int
    default: 30
"""

EXAMPLES = r"""
- name: Update workspaces in waves
  hosts: workspaces
  serial: [1, 10, "25%"]
  any_errors_fatal: true
  tasks:
    - name: Let people approve this wave
      secure_agent.workspace.approval_gate:
        name: rolling-update
        purpose: kernel of November
        requested_by: ada@example.com
        variables:
          release: "{{ release }}"
      register: gate

    - name: Change the wave, and tell how it ended
      block:
        - name: Update
          ansible.builtin.include_role:
            name: update
        - name: It went well
          secure_agent.workspace.approval_gate:
            state: done
            id: "{{ gate.id }}"
            claim: "{{ gate.claim }}"
      rescue:
        - name: It did not
          secure_agent.workspace.approval_gate:
            state: failed
            id: "{{ gate.id }}"
            claim: "{{ gate.claim }}"
            detail: "{{ ansible_failed_result.msg | default('') }}"
        - name: Stop before the next wave
          ansible.builtin.fail:
            msg: the wave failed
"""

RETURN = r"""
id:
  description: Id of the question.
  type: str
  returned: success, outside of check mode
  sample: rv-0f3c5a7be12d4c68a90b1c2d3e4f5061
gate:
  description: Name of the gate.
  type: str
  returned: success
  sample: rolling-update
state:
  description: State of the question. It is C(executing) once it is claimed.
  type: str
  returned: success, outside of check mode
  sample: executing
statement_digest:
  description: SHA-256 of the statement, which people sign and the receipt names.
  type: str
  returned: success
  sample: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
group:
  description: Who decides.
  type: str
  returned: success
  sample: fleet-approvers
quorum:
  description: How many of them must agree.
  type: int
  returned: success
  sample: 2
approved_by:
  description: Who agreed.
  type: list
  elements: str
  returned: success, outside of check mode
  sample: [ben@example.com]
decisions:
  description: Every decision with its comment.
  type: list
  elements: dict
  returned: success, outside of check mode
  sample: [{approver: ben@example.com, decision: approve, comment: looked at the diff, decided_at: "2026-11-26T08:00:00.000Z"}]
detail:
  description: Why it is in this state.
  type: str
  returned: success, outside of check mode
  sample: claimed
opened_at:
  description: When it was asked.
  type: str
  returned: success, outside of check mode
  sample: "2026-11-26T08:00:00.000Z"
expires_at:
  description: Until when it waits, or its approval can be claimed.
  type: str
  returned: success, outside of check mode
  sample: "2026-11-26T12:00:00.000Z"
claim:
  description: What proves that this run claimed the wave, for the task that tells its end.
  type: str
  returned: when it was claimed
  sample: 47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU
claim_ends_at:
  description: Until when the end must be told. After that the outcome is unknown.
  type: str
  returned: success, outside of check mode
  sample: "2026-11-26T09:00:00.000Z"
url:
  description: Page on which people decide. Empty without single sign-on.
  type: str
  returned: success, outside of check mode
  sample: https://saw.example.com:8445/reviews/rv-0f3c5a7be12d4c68a90b1c2d3e4f5061
rendering:
  description: The text that people would see.
  type: str
  returned: in check mode
  sample: "gate       rolling-update"
statement:
  description: What would be stated.
  type: dict
  returned: in check mode
  sample: {gate: rolling-update, purpose: kernel of November, hosts: [{name: ws-1, address: ""}]}
waiting:
  description: Id of the same question, when it waits already. Null when it does not.
  type: str
  returned: in check mode
  sample: rv-0f3c5a7be12d4c68a90b1c2d3e4f5061
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: review_denied, details: {id: rv-0f3c}, cure: "talk to them, then ask again"}
"""
