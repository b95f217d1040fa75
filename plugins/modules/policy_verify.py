#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A bundle file, verified as a workspace would."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_verify
short_description: Verify a signed policy bundle under a trusted root
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Fails unless enough different officers of the root signed exactly this bundle, it counts now, its files are those that were
    signed, and they load.
extends_documentation_fragment:
  - secure_agent.workspace.policy
  - secure_agent.workspace.policy.attributes
options:
  path:
    description: The bundle file.
    type: path
    required: true
  root:
    description: Trusted C(root.json) of the policy repository.
    type: path
    required: true
  min_revision:
    description: Lowest revision that counts.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: Verify a bundle before it is staged
  secure_agent.workspace.policy_verify:
    path: coding-7.bundle.json
    root: officers/metadata/1.root.json
    min_revision: 7
"""

RETURN = r"""
blueprint:
  description: Name of the blueprint.
  type: str
  returned: success
  sample: coding
version:
  description: Its version.
  type: str
  returned: success
  sample: 1.0.0
revision:
  description: Number of the revision.
  type: int
  returned: success
  sample: 7
policy_digest:
  description: Digest that names content, revision and window.
  type: str
  returned: success
  sample: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
not_before:
  description: From when it counts.
  type: str
  returned: success
  sample: "2026-11-24T08:00:00+00:00"
not_after:
  description: Until when it counts.
  type: str
  returned: success
  sample: "2026-12-24T08:00:00+00:00"
signers:
  description: Key ids of the officers whose signature holds.
  type: list
  elements: str
  returned: success
  sample: [4e777de0d275f9d28588dd9a1606cc748e548f9e22b6795b7cb3f63f98035fcb]
threshold:
  description: How many of them the root asks for.
  type: int
  returned: success
  sample: 2
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: threshold, details: {}, cure: let further officers sign it}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import present, read_file, reporting

try:
    from saw.policy.bundle import verify_bundle
    from saw.policy.tuf_repository import trusted_policy_keys
except ImportError:  # reporting() tells the person
    verify_bundle = None


def verify(module: AnsibleModule) -> dict[str, Any]:
    """Verify the bundle and return the module's result."""
    keys, threshold = trusted_policy_keys(read_file(module.params["root"]))
    raw, lowest = read_file(module.params["path"]), module.params["min_revision"]
    good = verify_bundle(raw, keys, threshold, present(), min_revision=lowest)
    return {
        "changed": False,
        "blueprint": good.blueprint,
        "version": good.version,
        "revision": good.revision,
        "policy_digest": good.digest,
        "not_before": good.not_before.isoformat(),
        "not_after": good.not_after.isoformat(),
        "signers": list(good.signers),
        "threshold": threshold,
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "root": {"type": "path", "required": True},
            "min_revision": {"type": "int", "default": 0},
        },
        supports_check_mode=True,
    )
    with reporting(module):
        module.exit_json(**verify(module))


if __name__ == "__main__":
    main()
