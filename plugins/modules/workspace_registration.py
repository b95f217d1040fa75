#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One workspace as the broker's register holds it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: workspace_registration
short_description: Register a workspace with the broker and take its lifecycle steps
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Registers a workspace, records the endorsement key of its TPM and takes it to a state of its life.
  - The profile (sponsor, blueprint, ring, image) is fixed at creation. A different one for an existing workspace is refused, and
    so is a second endorsement key.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  id:
    description: Name of the workspace, lower-case letters, digits and dashes.
    type: str
    required: true
  sponsor:
    description: The person on whose behalf agents run there. Needed when the workspace is new.
    type: str
  blueprint:
    description: Blueprint whose policy it runs. Needed when the workspace is new.
    type: str
  ring:
    description: Release ring. Needed when the workspace is new.
    type: str
  image:
    description: Name of a registered image. Needed when the workspace is new.
    type: str
  agent:
    description:
      - Name of a registered agent without a workspace (M(secure_agent.workspace.agent)). It counts when the workspace is new.
      - Without it, an agent is registered along with the workspace.
    type: str
  place:
    description:
      - Whose numbers, and so whose perimeter, it gets (C(broker_numbers) of the role C(broker)). It counts for a new one.
    type: str
  ek_pub_pem:
    description: Public endorsement key of its TPM, PEM. Recorded once, never replaced.
    type: str
  state:
    description:
      - V(present) registers it and leaves the state alone; the others are steps of its life.
      - V(active) is not among them, since a good quote alone leads there.
      - V(quarantined) is the kill switch. V(decommissioned) also holds for a workspace that the broker does not know.
    type: str
    default: present
    choices: [present, provisioning, attesting, stopped, quarantined, decommissioned]
  reason:
    description: Why, for the audit trail.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: Register a workspace
  secure_agent.workspace.workspace_registration:
    id: ws-demo
    sponsor: dana@example.com
    blueprint: coding
    ring: stable
    image: workspace-trixie

- name: Cut it off
  secure_agent.workspace.workspace_registration:
    id: ws-demo
    state: quarantined
    reason: incident 4711
"""

RETURN = r"""
workspace:
  description: The workspace as the broker holds it afterwards (in check mode as far as it is known).
  type: dict
  returned: success
  sample: {id: ws-demo, number: 1, state: provisioning, blueprint: coding, ring: stable, ek_recorded: true}
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: ek_recorded, details: {}, cure: a changed TPM means a new workspace}
"""

from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, found, operator

PROFILE = ("sponsor", "blueprint", "ring", "image")
#: States that a workspace passes on its own once it may attest; asking for "attesting" does not take it back from there.
BEYOND = {"provisioning": {"attesting", "active"}, "attesting": {"active"}}


def create(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Register a new workspace."""
    missing = [name for name in PROFILE if not module.params[name]]
    if missing:
        module.fail_json(
            msg=f"workspace {module.params['id']} does not exist and {', '.join(missing)} is missing",
            failure={"code": "profile_missing", "details": {"missing": missing}, "cure": "give the whole profile"},
        )
    profile = {name: module.params[name] for name in ("id", *PROFILE)}
    agent = unbound_agent(module, client)
    if module.check_mode:
        return {**profile, "state": "requested", "ek_recorded": False}
    more = {name: value for name, value in (("agent", agent), ("place", module.params["place"])) if value}
    made = client.request("POST", "/v1/workspaces", {**profile, **more})
    made.pop("changed", None)
    return made


def unbound_agent(module: AnsibleModule, client: Any) -> str:
    """Return the id of the living agent that is named, empty when none is; the broker says whether it can be bound."""
    name = module.params["agent"]
    if not name:
        return ""
    rows = client.request("GET", f"/v1/agents?name={quote(name, safe='')}")["agents"]
    ids = [row["id"] for row in rows if row["state"] != "retired"]
    # A check run comes before the task that would register it has run.
    if not ids and not module.check_mode:
        module.fail_json(
            msg=f"there is no living agent {name}",
            failure={"code": "unknown_agent", "details": {"name": name}, "cure": "register it with the module agent"},
        )
    return ids[0] if ids else ""


def refuse_other_profile(module: AnsibleModule, present: dict[str, Any]) -> None:
    """The profile is fixed at creation."""
    different = [name for name in PROFILE if module.params[name] and module.params[name] != present[name]]
    if different:
        module.fail_json(
            msg=f"workspace {present['id']} exists with another {', '.join(different)}",
            failure={
                "code": "profile_fixed",
                "details": {name: {"is": present[name], "wanted": module.params[name]} for name in different},
                "cure": "a change of profile means a new workspace",
            },
        )


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    name, state, reason = module.params["id"], module.params["state"], module.params["reason"]
    before = found(client, f"/v1/workspaces/{name}", "unknown_workspace")
    if before is None and state == "decommissioned":
        return {"changed": False, "workspace": {"id": name, "state": state}}
    changed = before is None
    after = before
    if after is None:
        after = create(module, client)
    else:
        refuse_other_profile(module, after)
    if module.params["ek_pub_pem"] and not (module.check_mode and after["ek_recorded"]):
        if module.check_mode:
            changed, after = True, {**after, "ek_recorded": True}
        else:
            after = client.request("PUT", f"/v1/workspaces/{name}/ek", {"ek_pub_pem": module.params["ek_pub_pem"]})
            changed |= after.pop("changed")
    if state not in ("present", after["state"]) and after["state"] not in BEYOND.get(state, set()):
        if module.check_mode:
            changed, after = True, {**after, "state": state}
        else:
            call, body = (
                ("kill", {"reason": reason})
                if state == "quarantined"
                else ("transition", {"to": state, "reason": reason})
            )
            after = client.request("POST", f"/v1/workspaces/{name}/{call}", body)
            changed |= after.pop("changed")
    return {"changed": changed, "workspace": after, "diff": {"before": before or {}, "after": after}}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str", "required": True},
            sponsor={"type": "str"},
            blueprint={"type": "str"},
            ring={"type": "str"},
            image={"type": "str"},
            agent={"type": "str"},
            place={"type": "str"},
            ek_pub_pem={"type": "str"},
            state={
                "type": "str",
                "default": "present",
                "choices": ["present", "provisioning", "attesting", "stopped", "quarantined", "decommissioned"],
            },
            reason={"type": "str", "default": "by playbook"},
        ),
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
