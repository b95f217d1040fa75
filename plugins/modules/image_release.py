#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The release record of a golden image, in the broker's register."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_release
short_description: Register an image's release record with the broker
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - A workspace boots only from an image whose release record is registered; the record holds the boot measurements that its
    quote is compared with.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  record:
    description: File C(<image>.release.json) on the machine that the module runs on.
    type: path
    required: true
"""

EXAMPLES = r"""
- name: Register the image
  secure_agent.workspace.image_release:
    record: build/images/workspace-trixie.release.json
"""

RETURN = r"""
image:
  description: Name and digest of the registered image.
  type: dict
  returned: success
  sample: {name: workspace-trixie, image_sha256: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9}
"""

import json

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(record={"type": "path", "required": True}), supports_check_mode=True
    )
    try:
        with open(module.params["record"], encoding="utf-8") as stream:
            record = json.load(stream)
        name, digest = record["name"], record["image_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        module.fail_json(
            msg=f"{module.params['record']} is no release record: {error}",
            failure={
                "code": "record_unreadable",
                "details": {},
                "cure": "build the image; the build writes its record",
            },
        )
    with operator(module) as client:
        known = [
            {k: v for k, v in entry.items() if k != "registered_at"}
            for entry in client.request("GET", "/v1/images")["images"]
        ]
        before = next(
            (entry for entry in known if (entry.get("name"), entry.get("image_sha256")) == (name, digest)), {}
        )
        changed = before != record
        if not module.check_mode:
            changed = client.request("PUT", "/v1/images", record)["changed"]
        image = {"name": name, "image_sha256": digest}
        module.exit_json(changed=changed, image=image, diff={"before": before, "after": record})


if __name__ == "__main__":
    main()
