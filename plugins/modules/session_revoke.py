#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Live sessions are told to end."""

from __future__ import annotations

DOCUMENTATION = r"""
module: session_revoke
short_description: End live sessions through a bastion
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Tells one session, or all live ones of a workspace or a person, to end. Connections drop at once; certificates that nobody
    has used yet open nothing any more.
  - New sessions can be opened afterwards. To prevent that, stop or kill the workspace, or take the role from the person.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  id:
    description: Id of one session.
    type: str
  workspace:
    description: All live sessions with this workspace.
    type: str
  person:
    description: All live sessions of this person, by the name that they signed in with. With O(workspace), those with it.
    type: str
  reason:
    description: Why, at most 256 characters, for the audit trail.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: End whatever somebody has open
  secure_agent.workspace.session_revoke:
    person: ada@example.com
    reason: left the team
"""

RETURN = r"""
revoked:
  description: Ids of the sessions that this call ended (in check mode, would end).
  type: list
  elements: str
  returned: success
  sample: [ses-0f3c]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: unknown_session, details: {}, cure: saw sessions shows them}
"""

from typing import Any
from urllib.parse import quote, urlencode

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator

#: States in which a session has not been told to end yet.
LIVE = ("requested", "open")


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    wanted = module.params
    if wanted["id"] is not None:
        found = [client.request("GET", one(wanted["id"]))]
    else:
        asked = {"workspace_id": wanted["workspace"], "person": wanted["person"], "live": 1}
        query = urlencode({name: value for name, value in asked.items() if value is not None})
        found = client.request("GET", f"/v1/sessions?{query}")["sessions"]
        if not found and wanted["person"] is not None:
            warn_of_nobody(module, client)
    before = [session for session in found if session["state"] in LIVE]
    if module.check_mode:
        return result(before, before, {session["id"]: "ending" for session in before})
    after = [client.request("POST", f"{one(session['id'])}/end", {"reason": wanted["reason"]}) for session in before]
    ended = [session for session in after if session["changed"]]
    return result(before, ended, {session["id"]: session["state"] for session in after})


def warn_of_nobody(module: AnsibleModule, client: Any) -> None:
    """A name that nobody has ends nothing, and nothing else would tell a slip from a person without sessions."""
    person = module.params["person"]
    if not client.request("GET", f"/v1/sessions?{urlencode({'person': person})}")["sessions"]:
        module.warn(f"{person} never had a session here; people have the whole name that they signed in with")


def one(identifier: str) -> str:
    """Return the path of a session."""
    return f"/v1/sessions/{quote(identifier, safe='')}"


def result(before: list[dict[str, Any]], ended: list[dict[str, Any]], after: dict[str, str]) -> dict[str, Any]:
    """Return the module's result; the difference is in the states."""
    return {
        "changed": bool(ended),
        "revoked": [session["id"] for session in ended],
        "diff": {"before": {session["id"]: session["state"] for session in before}, "after": after},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            id={"type": "str"},
            workspace={"type": "str"},
            person={"type": "str"},
            reason={"type": "str", "default": "by playbook"},
        ),
        required_one_of=[("id", "workspace", "person")],
        mutually_exclusive=[("id", "workspace"), ("id", "person")],
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
