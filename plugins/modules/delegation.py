#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What the agent of a workspace is handed for one task."""

from __future__ import annotations

DOCUMENTATION = r"""
module: delegation
short_description: Hand a task to the agent of a workspace, or take it back
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Has the broker sign a delegation, a record that binds sponsor, workspace, agent, task, resources, tools, duration and
    approval.
  - The perimeter refuses every call of the workspace that no delegation covers. A delegation never widens what policy allows.
  - One that is made from another (O(parent)) lies within it, or the broker refuses it.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  workspace:
    description: Name of the workspace. Its sponsor and its agent are those of the delegation.
    type: str
    required: true
  task:
    description: What it is for. Together with the workspace it names the delegation for this module.
    type: str
    required: true
  resources:
    description: The calls that the agent may make. Needed when O(state=present).
    type: list
    elements: dict
    suboptions:
      host:
        description: Host name, or a glob as in policies.
        type: str
        required: true
      ports:
        description: TCP ports.
        type: list
        elements: int
        default: [443]
      methods:
        description: HTTP methods in capitals; empty means every method that policy allows.
        type: list
        elements: str
        default: []
      paths:
        description: Globs over the path, as in policies.
        type: list
        elements: str
        default: [/**]
  tools:
    description:
      - The tools of MCP servers that the agent may call, over HTTP and over stdio.
      - Without it the delegation says nothing of tools and the policy alone bounds them; an empty list is no tool at all.
    type: list
    elements: dict
    suboptions:
      server:
        description: Name of the server in the policy (C(mcp.servers)), or a glob.
        type: str
        required: true
      tools:
        description: Globs over the names of its tools.
        type: list
        elements: str
        default: ["*"]
  data_classes:
    description:
      - Classes of data that the work brings. While the delegation counts, every call of a model holds them too.
    type: list
    elements: str
    default: []
  duration:
    description: How long a new one counts, such as V(90m), V(8h) or V(2d).
    type: str
    default: 8h
  renew:
    description: A present one that ends within this time is replaced by a new one; V(0s) keeps it until it has ended.
    type: str
    default: 0s
  approval:
    description:
      - What the agent may do on its own.
      - V(policy) is what the action classes of the policy say, with V(review) every write waits for a person, V(read-only)
        refuses writes.
    type: str
    default: policy
    choices: [policy, review, read-only]
  parent:
    description: Id of the delegation that this one is a part of.
    type: str
    default: ""
  state:
    description: V(absent) revokes the delegations for O(task) in O(workspace), with all that was made from them.
    type: str
    default: present
    choices: [present, absent]
  reason:
    description: Why it is revoked, for the audit trail.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: Hand out a task for a working day
  secure_agent.workspace.delegation:
    workspace: ws-demo
    task: tidy the notes of team A
    duration: 8h
    resources:
      - {host: api.example.com, methods: [GET, POST], paths: [/v1/notes, /v1/items/**]}
      - {host: git.example.com, paths: [/team/notes.git/**]}

- name: Hand out a task with two tools of one MCP server
  secure_agent.workspace.delegation:
    workspace: ws-demo
    task: look through the tickets
    resources:
      - {host: tracker.example.com, paths: [/mcp]}
    tools:
      - {server: tracker, tools: [search, read_*]}

- name: Hand out work on confidential data, which only services for it may see
  secure_agent.workspace.delegation:
    workspace: ws-demo
    task: summarise the contracts
    resources:
      - {host: inference.local, methods: [POST]}
    data_classes: [confidential]

- name: Take it back
  secure_agent.workspace.delegation:
    workspace: ws-demo
    task: tidy the notes of team A
    state: absent
    reason: task done
"""

RETURN = r"""
delegation:
  description: The delegation that counts (in check mode what would be asked for); empty when O(state=absent).
  type: dict
  returned: success
  sample: {id: dlg-0f3c, state: active, workspace: ws-demo, agent: agent-1, expires: "2026-11-23T18:00:00Z"}
revoked:
  description: Ids of the delegations that this call ended.
  type: list
  elements: str
  returned: success
  sample: [dlg-0f3c]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: delegation_wider, details: {problems: [it ends later]}, cure: a delegation only narrows}
"""

from datetime import datetime, timedelta, timezone
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator

try:
    from saw.broker.client import listed_delegations
    from saw.policy.governance import duration
except ImportError:
    duration = listed_delegations = None  # the module then ends in ``operator``, which names the missing package


def seconds(module: AnsibleModule, name: str) -> int:
    """Return the time of option ``name`` in seconds."""
    try:
        return duration(module.params[name])
    except ValueError as error:
        module.fail_json(
            msg=f"{name}: {error}",
            failure={"code": "duration_malformed", "details": {"option": name}, "cure": "write 90m, 8h or 2d"},
        )


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    wanted = module.params
    active = listed_delegations(client, workspace_id=[wanted["workspace"]], state=["active"])
    mine = [found for found in active if found["task"] == wanted["task"]]
    if wanted["state"] == "absent":
        revoked = [] if module.check_mode else revoke(client, mine, wanted["reason"])
        return result(mine, {}, revoked, changed=bool(mine))
    resources = [{key: part[key] for key in ("host", "ports", "methods", "paths")} for part in wanted["resources"]]
    tools = {}
    if wanted["tools"] is not None:
        tools["tools"] = [{key: part[key] for key in ("server", "tools")} for part in wanted["tools"]]
    classes = {"data_classes": wanted["data_classes"]} if wanted["data_classes"] else {}
    until = datetime.now(tz=timezone.utc) + timedelta(seconds=seconds(module, "renew"))
    for found in mine:
        same = [found[name] for name in ("resources", "approval", "parent")]
        if (
            same == [resources, wanted["approval"], wanted["parent"]]
            and found.get("tools") == tools.get("tools")
            and found.get("data_classes", []) == wanted["data_classes"]
            and datetime.fromisoformat(found["expires"]) > until
        ):
            others = [other for other in mine if other is not found]
            revoked = [] if module.check_mode else revoke(client, others, "replaced")
            return result(mine, found, revoked, changed=bool(others))
    body = {
        "workspace_id": wanted["workspace"],
        "task": wanted["task"],
        "resources": resources,
        "duration_s": seconds(module, "duration"),
        "approval": wanted["approval"],
        "parent": wanted["parent"],
        **tools,
        **classes,
    }
    if module.check_mode:
        return result(mine, body, [], changed=True)
    made = client.request("POST", "/v1/delegations", body)
    return result(mine, made, revoke(client, mine, "replaced"), changed=True)


def revoke(client: Any, found: list[dict[str, Any]], reason: str) -> list[str]:
    """Revoke ``found`` and return the ids of all that ended with them."""
    ended: list[str] = []
    for item in found:
        ended += client.request("POST", f"/v1/delegations/{item['id']}/revoke", {"reason": reason})["revoked"]
    return ended


def result(before: list[dict[str, Any]], after: dict[str, Any], revoked: list[str], *, changed: bool) -> dict[str, Any]:
    """Return the module's result; the signed statement stays with the broker."""
    shown = {name: value for name, value in after.items() if name != "statement"}
    return {
        "changed": changed,
        "delegation": shown,
        "revoked": revoked,
        "diff": {"before": {"delegations": before}, "after": {"delegations": [shown] if shown else []}},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            workspace={"type": "str", "required": True},
            task={"type": "str", "required": True},
            resources={
                "type": "list",
                "elements": "dict",
                "options": {
                    "host": {"type": "str", "required": True},
                    "ports": {"type": "list", "elements": "int", "default": [443]},
                    "methods": {"type": "list", "elements": "str", "default": []},
                    "paths": {"type": "list", "elements": "str", "default": ["/**"]},
                },
            },
            tools={
                "type": "list",
                "elements": "dict",
                "options": {
                    "server": {"type": "str", "required": True},
                    "tools": {"type": "list", "elements": "str", "default": ["*"]},
                },
            },
            data_classes={"type": "list", "elements": "str", "default": []},
            duration={"type": "str", "default": "8h"},
            renew={"type": "str", "default": "0s"},
            approval={"type": "str", "default": "policy", "choices": ["policy", "review", "read-only"]},
            parent={"type": "str", "default": ""},
            state={"type": "str", "default": "present", "choices": ["present", "absent"]},
            reason={"type": "str", "default": "by playbook"},
        ),
        required_if=[("state", "present", ["resources"])],
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
