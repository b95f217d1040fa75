#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Which images the broker knows, and which one a workspace goes back to."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_release_info
short_description: Read registered images, and the image that a workspace ran before
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Reads the release records of registered images with their state, by name and time of registration.
  - With O(workspace) it also says which image that workspace goes back to, as the playbook C(image_rollback) takes it.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  name:
    description: Only images with this name.
    type: str
  image_sha256:
    description: Only the image with this digest.
    type: str
  states:
    description: Only images in one of these states.
    type: list
    elements: str
    choices: [candidate, stable, deprecated, revoked]
  variant:
    description: Only images of this variant.
    type: str
    choices: [cpu, gpu]
  workspace:
    description: Id of a workspace; RV(way_back) is about it.
    type: str
  further:
    description: Where O(workspace) has just gone back, say to which image it would go from there.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Read which images every ring may use
  secure_agent.workspace.image_release_info:
    states: [stable]
  register: stable

- name: Read which image a workspace ran before
  secure_agent.workspace.image_release_info:
    workspace: ws-demo
  register: before
"""

RETURN = r"""
images:
  description: The images that the filters let through, each with its release record; empty when there is none.
  type: list
  elements: dict
  returned: success
  sample:
    - name: workspace-trixie
      image_sha256: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
      state: stable
      state_reason: canary ran for a week
      signed: true
      registered_at: "2026-11-29T08:00:00.000Z"
way_back:
  description:
    - The newest stable image below the present one that O(workspace) ran, and what was passed over.
    - C(gone_back) is true when the workspace is bound to it already, having left a newer one.
  type: dict
  returned: when O(workspace) is given
  sample:
    workspace: ws-demo
    present: workspace-2
    image:
      name: workspace-1
      image_sha256: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
      state: stable
      refusal: ""
    passed_over: []
    gone_back: false
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: no_earlier_image, details: {}, cure: "name one: playbook workspace_rebuild"}
"""

from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            name={"type": "str"},
            image_sha256={"type": "str"},
            states={"type": "list", "elements": "str", "choices": ["candidate", "stable", "deprecated", "revoked"]},
            variant={"type": "str", "choices": ["cpu", "gpu"]},
            workspace={"type": "str"},
            further={"type": "bool", "default": False},
        ),
        supports_check_mode=True,
    )
    wanted = module.params
    with operator(module) as client:
        images = [
            image
            for image in client.request("GET", "/v1/images")["images"]
            if wanted["name"] in (None, image["name"])
            and wanted["image_sha256"] in (None, image["image_sha256"])
            and (wanted["states"] is None or image["state"] in wanted["states"])
            and wanted["variant"] in (None, image.get("variant", "cpu"))
        ]
        result = {"changed": False, "images": images}
        if wanted["workspace"] is not None:
            path = f"/v1/workspaces/{quote(wanted['workspace'], safe='')}/way-back"
            result["way_back"] = client.request("GET", path + ("?further=1" if wanted["further"] else ""))
        module.exit_json(**result)


if __name__ == "__main__":
    main()
