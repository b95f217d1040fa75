#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Where a registered workspace is in its life, and the image that it is rebuilt from."""

from __future__ import annotations

DOCUMENTATION = r"""
module: workspace
short_description: Start, stop, kill, release or end a workspace at the broker
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Takes a registered workspace to a state, and binds one that does not run to another image. The broker withdraws lease,
    identity and sessions with each step.
  - Machines are made, started and destroyed by the playbooks; a workspace is registered by
    M(secure_agent.workspace.workspace_registration).
  - Check mode refuses a step that the broker would refuse.
  - What was read is what is changed. Where somebody changed the workspace in between, the module reads it again and decides anew.
  - A change carries an idempotency key made of itself, so that it is done once however often it arrives. A kill carries none, and
    goes before what others change.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  id:
    description: Name of the workspace.
    type: str
    required: true
  state:
    description:
      - V(running) may attest, and becomes active by a good quote alone. V(stopped) has no lease until it is started.
      - V(quarantined) is the kill switch, V(decommissioned) is final.
      - Without it, the state stays.
    type: str
    choices: [running, stopped, quarantined, decommissioned]
  release:
    description: Allow V(state=stopped) to end a quarantine. Otherwise a killed workspace is left alone, with a refusal.
    type: bool
    default: false
  image:
    description: Name of the registered image that it is rebuilt from. It is changed before the state is, and not while it runs.
    type: str
  reason:
    description: Why, at most 256 characters, for the audit trail.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: Kill it
  secure_agent.workspace.workspace:
    id: ws-demo
    state: quarantined
    reason: incident

- name: End the quarantine
  secure_agent.workspace.workspace:
    id: ws-demo
    state: stopped
    release: true
    reason: incident closed
"""

RETURN = r"""
workspace:
  description: The workspace as the broker has it now; in check mode, as it would be.
  type: dict
  returned: success
  sample: {id: ws-demo, state: quarantined, image: workspace, number: 1, version: 4}
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: transition_refused, details: {state: decommissioned, to: attesting}, cure: "allowed from here: none"}
"""

import hashlib
import json
from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import SawError, broker_options, operator

try:
    from saw.broker.client import forecast_step
except ImportError:
    forecast_step = None  # the module then ends in ``operator``, which names the missing package

#: What is asked for → what the broker is asked for, and the states in which nothing is left to do.
TARGETS = {
    "running": ("attesting", {"attesting", "active"}),
    "stopped": ("stopped", {"stopped"}),
    "quarantined": ("quarantined", {"quarantined"}),
    "decommissioned": ("decommissioned", {"decommissioned"}),
}
REBUILT = ("requested", "provisioning", "stopped")
TRIES = 3


def refuse(module: AnsibleModule, code: str, message: str, cure: str) -> None:
    """End the module."""
    module.fail_json(msg=f"{message} ({cure})", failure={"code": code, "details": {}, "cure": cure})


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    path = f"/v1/workspaces/{quote(module.params['id'], safe='')}"
    before = client.request("GET", path)
    present, tries = before, 1
    while True:
        try:
            after = converge(module, client, path, present)
            break
        except SawError as error:
            if error.code != "version_conflict" or tries == TRIES:
                raise
        present, tries = client.request("GET", path), tries + 1
    return {"changed": after != before, "workspace": after, "diff": {"before": shown(before), "after": shown(after)}}


def converge(module: AnsibleModule, client: Any, path: str, before: dict[str, Any]) -> dict[str, Any]:
    """Change the workspace from what it was seen as to what is wanted; return it as it is then."""
    wanted = module.params
    after = dict(before)
    if wanted["image"] not in (None, before["image"]):
        if not module.check_mode:
            after = client.request("PUT", f"{path}/image", stated(after, {"image": wanted["image"]}))
        elif before["state"] not in REBUILT:
            refuse(
                module,
                "not_stopped",
                f"{wanted['id']} is {before['state']}; its image cannot change now",
                "stop it first",
            )
        else:
            after["image"] = wanted["image"]
    to, done = TARGETS.get(wanted["state"], ("", {before["state"]}))
    if before["state"] not in done:
        if before["state"] == "quarantined" and to == "stopped" and not wanted["release"]:
            refuse(
                module, "quarantined", f"{wanted['id']} was killed: {before['state_reason']}", "set release to end that"
            )
        after = step(module, client, path, after, to)
    after.pop("changed", None)
    return after


def stated(present: dict[str, Any], body: dict[str, Any]) -> dict[str, Any]:
    """Return ``body`` with the version that it changes and a key made of both; a broker that counts no versions gets neither."""
    if "version" not in present:
        return body
    body = {**body, "version": present["version"]}
    words = json.dumps([present["id"], body], sort_keys=True).encode()
    return {**body, "idempotency_key": hashlib.sha256(words).hexdigest()}


def step(module: AnsibleModule, client: Any, path: str, present: dict[str, Any], to: str) -> dict[str, Any]:
    """Take the step, or in check mode find out whether it would be taken; return the workspace as it is then."""
    if module.check_mode:
        forecast_step(present, to)
        return {**present, "state": to}
    reason = module.params["reason"]
    if to == "quarantined":
        return client.request("POST", f"{path}/kill", {"reason": reason})
    return client.request("POST", f"{path}/transition", stated(present, {"to": to, "reason": reason}))


def shown(workspace: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a workspace that this module changes."""
    return {name: workspace[name] for name in ("state", "image")}


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str", "required": True},
            state={"type": "str", "choices": list(TARGETS)},
            release={"type": "bool", "default": False},
            image={"type": "str"},
            reason={"type": "str", "default": "by playbook"},
        ),
        required_one_of=[("state", "image")],
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
