#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Whether anything may be done on behalf of one sponsor."""

from __future__ import annotations

DOCUMENTATION = r"""
module: sponsor
short_description: Disable a sponsor who left, or enable one again
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - A sponsor is the person on whose behalf an agent acts. Workspaces and agents name theirs.
  - Of a disabled one every workspace is quarantined and every delegation revoked. Nothing new is begun, and the person is signed
    out.
  - Enabling brings nothing back by itself. Each workspace is released by an operator.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  name:
    description: The sponsor's name, as workspaces and agents have it. Case does not matter.
    type: str
    required: true
  state:
    description: Whether anything may be done on the sponsor's behalf.
    type: str
    required: true
    choices: [active, disabled]
  reason:
    description: Why, for the audit trail.
    type: str
    default: by playbook
  unknown:
    description:
      - What to do about a name that the broker does not know.
      - V(ignore) lets lists of people go through that come from a directory, in which most have nothing to do with agents.
    type: str
    default: fail
    choices: [fail, ignore]
"""

EXAMPLES = r"""
- name: Stop everything on behalf of somebody who left
  secure_agent.workspace.sponsor:
    name: dana@example.com
    state: disabled
    reason: left the company

- name: The same for everybody whom the directory has locked
  secure_agent.workspace.sponsor:
    name: "{{ item }}"
    state: disabled
    reason: locked in the directory
    unknown: ignore
  loop: "{{ directory_locked }}"
"""

RETURN = r"""
sponsor:
  description: The sponsor as the broker holds it afterwards (in check mode, as far as that is known); empty when there is none.
  type: dict
  returned: success
  sample: {name: dana@example.com, state: disabled, reason: left, workspaces: {quarantined: [ws-demo]}, agents: [agent-7]}
quarantined:
  description: Workspaces that this call cut off, or in check mode would.
  type: list
  elements: str
  returned: success
  sample: [ws-demo]
revoked:
  description: Delegations that ended with this call; in check mode empty.
  type: list
  elements: str
  returned: success
  sample: [dlg-0f3c]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: unknown_sponsor, details: {}, cure: "saw sponsor list shows them"}
"""

from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, found, operator


def result(before: dict[str, Any], after: dict[str, Any], *, changed: bool) -> dict[str, Any]:
    """Return the module's result out of the broker's answer."""
    extra = {name: after.pop(name, []) for name in ("quarantined", "revoked")}
    for name in ("changed", "sign_ins"):
        after.pop(name, None)
    return {"changed": changed, "sponsor": after, **extra, "diff": {"before": before, "after": after}}


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    wanted = module.params
    path = f"/v1/sponsors/{quote(wanted['name'], safe='')}"
    if wanted["unknown"] == "ignore":
        present = found(client, path, "unknown_sponsor")
        if present is None:
            return result({}, {}, changed=False)
    else:
        present = client.request("GET", path)
    if present["state"] == wanted["state"]:
        return result(present, dict(present), changed=False)
    if not module.check_mode:
        step = "disable" if wanted["state"] == "disabled" else "enable"
        after = client.request("POST", f"{path}/{step}", {"reason": wanted["reason"], "version": present["version"]})
        return result(present, after, changed=True)
    after = {**present, "state": wanted["state"], "reason": wanted["reason"]}
    if wanted["state"] == "disabled":
        running = [one for state, ids in present["workspaces"].items() if state != "quarantined" for one in ids]
        held = present["workspaces"].get("quarantined", [])
        after["quarantined"] = sorted(running)
        after["workspaces"] = {"quarantined": sorted([*held, *running])} if held or running else {}
    return result(present, after, changed=True)


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            name={"type": "str", "required": True},
            state={"type": "str", "required": True, "choices": ["active", "disabled"]},
            reason={"type": "str", "default": "by playbook"},
            unknown={"type": "str", "default": "fail", "choices": ["fail", "ignore"]},
        ),
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
