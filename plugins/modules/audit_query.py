#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the audit trail says, and whether it is whole."""

from __future__ import annotations

DOCUMENTATION = r"""
module: audit_query
short_description: Search the broker's audit trail
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads events over all chains in the order in which they arrived, by the filters of C(saw audit search); all of those that
    are given must hold.
  - With O(verify) the broker first proves every chain complete; a trail that is not ends the task.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  since:
    description: Only events from this time on, ISO 8601 or how long ago (V(30m), V(2h), V(7d)).
    type: str
  until:
    description: Only events before this time, in the same forms.
    type: str
  source:
    description: Only this chain, V(broker) or a perimeter host.
    type: str
  workspace:
    description: Only events about this workspace.
    type: str
  agent:
    description: Only events about this agent.
    type: str
  principal:
    description: Only what this principal did, as in V(operator:root).
    type: str
  class:
    description: Only this OCSF class, by number or name.
    type: str
  activity:
    description: Only this activity, by name.
    type: str
  verdict:
    description: Only what became of it.
    type: str
    choices: [allowed, refused]
  text:
    description: Occurs anywhere in the event.
    type: str
  after:
    description: Start behind this position.
    type: int
    default: 0
  limit:
    description: At most this many events, 1 to 10000.
    type: int
    default: 100
  verify:
    description: Prove the trail complete first.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Read what was refused to a workspace today
  secure_agent.workspace.audit_query:
    workspace: ws-demo
    verdict: refused
    since: 24h
    verify: true
  register: trail
"""

RETURN = r"""
events:
  description: The events, oldest first. C(event) is OCSF.
  type: list
  elements: dict
  returned: success
  sample:
    - position: 12
      source: broker
      seq: 12
      prev: 64 hexadecimal digits
      hash: 64 hexadecimal digits
      event: {class_name: API Activity, message: incident}
next:
  description: Position behind the last event that was looked at, for O(after) of the next call.
  type: int
  returned: success
  sample: 12
trail:
  description: What the proof says of each chain; empty unless O(verify).
  type: dict
  returned: success
  sample: {complete: true, events: 12, chains: [{source: broker, complete: true, events: 12}], findings: []}
failure:
  description: What failed, for programs. With the code V(trail_incomplete) the details hold the findings.
  type: dict
  returned: failure
  sample: {code: trail_incomplete, details: {findings: [{kind: gap}]}, cure: compare with a copy of the trail}
"""

from argparse import Namespace
from datetime import datetime, timezone
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator

try:
    from saw.cli.audit_search import filters, pages
except ImportError:
    pages = None  # the module then ends in ``operator``, which names the missing package

WHOLE = ("source", "workspace", "agent", "principal", "class", "activity", "verdict", "text")
MOST = 10_000


def read(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Return the module's result."""
    wanted = module.params
    if not (1 <= wanted["limit"] <= MOST and wanted["after"] >= 0):
        refuse(module, "range", f"limit is 1 to {MOST}, after is not negative", {}, "correct them")
    trail: dict[str, Any] = {}
    if wanted["verify"]:
        trail = client.request("GET", "/v1/audit/verify")
        if not trail["complete"]:
            cure = "compare with a copy of the trail (docs/audit.md)"
            refuse(module, "trail_incomplete", "the audit trail is not complete", {"findings": trail["findings"]}, cure)
    told = {f"only_{name}": wanted[name] for name in WHOLE}
    query = filters(Namespace(since=wanted["since"], until=wanted["until"], **told), datetime.now(tz=timezone.utc))
    events: list[dict[str, Any]] = []
    last = wanted["after"]
    for page in pages(client, query, wanted["after"], wanted["limit"]):
        events += page["events"]
        last = page["next"]
    return {"changed": False, "events": events, "next": last, "trail": trail}


def refuse(module: AnsibleModule, code: str, message: str, details: dict[str, Any], cure: str) -> None:
    """End the module."""
    module.fail_json(msg=f"{message} ({cure})", failure={"code": code, "details": details, "cure": cure})


def main() -> None:
    """Entry point."""
    texts: dict[str, dict[str, Any]] = {name: {"type": "str"} for name in ("since", "until", *WHOLE)}
    texts["verdict"]["choices"] = ["allowed", "refused"]
    module = AnsibleModule(
        argument_spec=broker_options(
            **texts,
            after={"type": "int", "default": 0},
            limit={"type": "int", "default": 100},
            verify={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**read(module, client))


if __name__ == "__main__":
    main()
