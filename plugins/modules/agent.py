#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One agent as the broker's register holds it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: agent
short_description: Register an agent, change what is said of it, or end it
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Registers an agent under a name that no other living agent has, and makes it the agent of a workspace.
  - A workspace has one agent at a time, an agent one workspace for life. Another one in its place is a successor (O(replace)).
  - A retired agent stays in the register, and its id is never used again. Its name may be.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  name:
    description: Its name, lower-case letters, digits and dashes. Names like V(agent-7) are given by the broker.
    type: str
    required: true
  sponsor:
    description: The person on whose behalf it acts, fixed from then on. Needed when it is new and does not replace another one.
    type: str
  workspace:
    description: The workspace that it is the agent of. Without it, a new agent is bound to none yet.
    type: str
  owner:
    description: The team or person that answers for it. What is left out stays as it is.
    type: str
  purpose:
    description: What it is for.
    type: str
  harness:
    description: The program that it is, as somebody says; nothing proves it.
    type: str
  model:
    description: The model that it asks, as somebody says; nothing proves it.
    type: str
  replace:
    description:
      - Where O(workspace) has another agent, retire that one and register this one as its successor.
      - The successor inherits nothing; hand it its tasks with M(secure_agent.workspace.delegation).
      - Without it, a workspace that has another agent is a failure.
    type: bool
    default: false
  state:
    description: V(retired) ends the living agent of this name for good. Its delegations are revoked and its calls refused.
    type: str
    default: present
    choices: [present, retired]
  reason:
    description: Why it, or the one that it replaces, ends; for the audit trail.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: Register an agent for a workspace that is made next
  secure_agent.workspace.agent:
    name: notes-helper
    sponsor: dana@example.com
    owner: team A
    purpose: keeps the notes of team A in order
    harness: codex 1.2

- name: Put a newer one in its place
  secure_agent.workspace.agent:
    name: notes-helper-2
    workspace: ws-demo
    model: example/large-2
    replace: true
    reason: a newer model

- name: End it
  secure_agent.workspace.agent:
    name: notes-helper-2
    state: retired
    reason: the task is over
"""

RETURN = r"""
agent:
  description: The agent as the broker holds it afterwards (in check mode as far as it is known); empty when there is none.
  type: dict
  returned: success
  sample: {id: agent-7, name: notes-helper, state: active, workspace: ws-demo, version: 3, claims: {harness: codex 1.2}}
retired:
  description: Id of the agent that this call ended, empty when none was.
  type: str
  returned: success
  sample: agent-6
revoked:
  description: Ids of the delegations that ended with it.
  type: list
  elements: str
  returned: success
  sample: [dlg-0f3c]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: workspace_has_agent, details: {}, cure: "set replace: true"}
"""

from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator

SAID = ("owner", "purpose", "harness", "model")
CLAIMS = ("harness", "model")


def living(client: Any, filter_name: str, value: str) -> dict[str, Any] | None:
    """Return the agent that is not retired and has this name or workspace, or None."""
    path = f"/v1/agents?{filter_name}={quote(value, safe='')}"
    rows = [one for one in client.request("GET", path)["agents"] if one["state"] != "retired"]
    return rows[0] if rows else None


def said_of(agent: dict[str, Any]) -> dict[str, str]:
    """Return what is said of an agent, by the names of the options."""
    return {name: (agent["claims"] if name in CLAIMS else agent)[name] for name in SAID}


def with_said(agent: dict[str, Any], said: dict[str, str]) -> dict[str, Any]:
    """Return ``agent`` as it would be once ``said`` is said of it."""
    claims = {**agent["claims"], **{name: said[name] for name in said if name in CLAIMS}}
    return {**agent, **{name: said[name] for name in said if name not in CLAIMS}, "claims": claims}


def refuse(module: AnsibleModule, code: str, msg: str, cure: str, details: dict[str, Any]) -> None:
    """End the module as a refusal of the broker would."""
    module.fail_json(msg=f"{msg}; {cure}", failure={"code": code, "details": details, "cure": cure})


def create(module: AnsibleModule, client: Any, said: dict[str, str]) -> dict[str, Any]:
    """Register a new agent, in the place of another one where that is asked for."""
    wanted = module.params
    here = living(client, "workspace", wanted["workspace"]) if wanted["workspace"] else None
    if here is not None and not wanted["replace"]:
        refuse(
            module,
            "workspace_has_agent",
            f"{wanted['workspace']} has an agent, {here['name']}",
            "set replace: true to retire it",
            {"agent": here["id"], "name": here["name"]},
        )
    if here is not None and wanted["sponsor"] not in (None, here["sponsor"]):
        refuse_sponsor(module, here)
    if here is None and not wanted["sponsor"]:
        refuse(
            module,
            "sponsor_missing",
            f"agent {wanted['name']} does not exist and sponsor is missing",
            "give its sponsor",
            {"missing": ["sponsor"]},
        )
    ended = "" if here is None else here["id"]
    if module.check_mode:
        agent = with_said({"name": wanted["name"], "state": "registered", "claims": dict.fromkeys(CLAIMS, "")}, said)
        agent |= {"workspace": wanted["workspace"], "sponsor": wanted["sponsor"] or here["sponsor"]}
        return result(here or {}, agent, retired=ended)
    if here is None:
        body = {"sponsor": wanted["sponsor"], "name": wanted["name"], "workspace": wanted["workspace"] or "", **said}
        return result({}, client.request("POST", "/v1/agents", body))
    body = {"reason": wanted["reason"], "version": here["version"], "name": wanted["name"], **said}
    return result(here, client.request("POST", f"/v1/agents/{here['id']}/succeed", body), retired=ended)


def refuse_sponsor(module: AnsibleModule, there: dict[str, Any]) -> None:
    """An agent acts on behalf of one person for life."""
    refuse(
        module,
        "sponsor_fixed",
        f"agent {there['name']} has another sponsor",
        "a change of sponsor means a new agent",
        {"sponsor": {"is": there["sponsor"], "wanted": module.params["sponsor"]}},
    )


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    wanted = module.params
    present = living(client, "name", wanted["name"])
    if wanted["state"] == "retired":
        if present is None:
            return result({}, {}, changed=False)
        if module.check_mode:
            return result(present, {**present, "state": "retired"}, retired=present["id"])
        ended = client.request("POST", f"/v1/agents/{present['id']}/retire", {"reason": wanted["reason"]})
        return result(present, ended, retired=present["id"])
    said = {name: wanted[name] for name in SAID if wanted[name] is not None}
    if present is None:
        return create(module, client, said)
    if wanted["sponsor"] not in (None, present["sponsor"]):
        refuse_sponsor(module, present)
    body = {name: value for name, value in said.items() if value != said_of(present)[name]}
    if wanted["workspace"] not in (None, present["workspace"]):
        body["workspace"] = wanted["workspace"]
        if present["workspace"] is not None:
            refuse(
                module,
                "agent_bound",
                f"agent {present['name']} belongs to {present['workspace']}",
                "an agent has one workspace for life: choose another name",
                {"workspace": {"is": present["workspace"], "wanted": wanted["workspace"]}},
            )
        here = living(client, "workspace", wanted["workspace"])
        if here is not None:
            refuse(
                module,
                "workspace_has_agent",
                f"{wanted['workspace']} has an agent, {here['name']}",
                "retire it first, or replace it by one of a new name",
                {"agent": here["id"], "name": here["name"]},
            )
    if not body:
        return result(present, present, changed=False)
    if module.check_mode:
        return result(present, {**with_said(present, body), "workspace": body.get("workspace", present["workspace"])})
    return result(
        present, client.request("PUT", f"/v1/agents/{present['id']}", {"version": present["version"], **body})
    )


def result(before: dict[str, Any], after: dict[str, Any], *, changed: bool = True, retired: str = "") -> dict[str, Any]:
    """Return the module's result out of the broker's answer."""
    agent = {name: value for name, value in after.items() if name not in {"changed", "revoked", "reissued"}}
    return {
        "changed": changed,
        "agent": agent,
        "retired": retired,
        "revoked": after.get("revoked", []),
        "diff": {"before": before, "after": agent},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            name={"type": "str", "required": True},
            sponsor={"type": "str"},
            workspace={"type": "str"},
            owner={"type": "str"},
            purpose={"type": "str"},
            harness={"type": "str"},
            model={"type": "str"},
            replace={"type": "bool", "default": False},
            state={"type": "str", "default": "present", "choices": ["present", "retired"]},
            reason={"type": "str", "default": "by playbook"},
        ),
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
