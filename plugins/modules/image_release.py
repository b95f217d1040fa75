#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The signed release record of a golden image in the broker's register, and where the image stands."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_release
short_description: Register an image's signed release record, promote, deprecate or revoke the image
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - A workspace attests only on an image whose release record enough officers signed, that has not ended and is not revoked. The
    record holds the boot measurements that its quote is compared with.
  - A registered image is a candidate. Rings other than those for candidates use it once it is promoted.
  - A broker that asks for a search for known vulnerabilities (C(broker_image_require), by default) takes no record without one.
    Where it does not ask, registering such a record is a warning.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
options:
  record:
    description: Signed record (C(saw image sign)) on the machine that the module runs on. Needed to register an image.
    type: path
  name:
    description: Name of a registered image, where O(record) is not given.
    type: str
  state:
    description:
      - V(present) registers it and leaves its state alone.
      - V(stable) promotes it, V(deprecated) closes it to further workspaces, V(revoked) cuts off every workspace that runs it.
    type: str
    default: present
    choices: [present, stable, deprecated, revoked]
  reason:
    description: Why, for the audit trail.
    type: str
    default: by playbook
"""

EXAMPLES = r"""
- name: Register the image and let every ring use it
  secure_agent.workspace.image_release:
    record: build/images/workspace-trixie/release.signed.json
    state: stable

- name: Cut off whatever runs an image
  secure_agent.workspace.image_release:
    name: workspace-trixie
    state: revoked
    reason: vulnerable kernel
"""

RETURN = r"""
image:
  description: Name, digest and state of the image.
  type: dict
  returned: success
  sample:
    name: workspace-trixie
    image_sha256: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
    state: stable
workspaces_cut_off:
  description: Workspaces that lost lease and certificate because the image was revoked.
  type: list
  elements: str
  returned: success
  sample: [ws-demo]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: record_threshold, details: {}, cure: let further officers sign it}
"""

import json
from typing import Any
from urllib.parse import quote

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, fail, operator

try:
    from saw.attest.image_record import PAYLOAD_TYPE
    from saw.errors import SawError
    from saw.policy.envelope import payload_of, read_envelope
except ImportError:
    read_envelope = None  # the module then ends in ``operator``, which names the missing package

OWN = ("state", "state_reason", "signed", "registered_at")
"""What the register adds to a record."""


def read(module: AnsibleModule) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the envelope and the record in it; both are empty without option ``record``."""
    if not module.params["record"]:
        return {}, {}
    try:
        with open(module.params["record"], "rb") as stream:
            raw = stream.read()
        record = json.loads(payload_of(read_envelope(raw, PAYLOAD_TYPE)))
        return json.loads(raw), {"name": record["name"], "image_sha256": record["image_sha256"], **record}
    except (OSError, ValueError, KeyError, TypeError) as error:
        module.fail_json(
            msg=f"{module.params['record']} is no signed release record: {error}",
            failure={"code": "record_unreadable", "details": {}, "cure": "sign it: saw image sign"},
        )
    except SawError as error:
        fail(module, error)


def ensure(module: AnsibleModule, client: Any) -> dict[str, Any]:
    """Do what is asked and return the module's result."""
    envelope, record = read(module)
    name, digest = record.get("name", module.params["name"]), record.get("image_sha256")
    known = [
        entry
        for entry in client.request("GET", "/v1/images")["images"]
        if entry["name"] == name and digest in (None, entry["image_sha256"])
    ]
    before = known[-1] if known else {}
    state, wanted = before.get("state", "candidate"), module.params["state"]
    if not before and not record:
        module.fail_json(
            msg=f"image {name} is not registered and no record is given",
            failure={"code": "unknown_image", "details": {}, "cure": "give its signed record"},
        )
    differs = bool(record) and {key: value for key, value in before.items() if key not in OWN} != record
    changed, cut_off = differs, []
    if differs and not module.check_mode:
        state = client.request("PUT", "/v1/images", envelope)["state"]
    if differs and not record.get("scan"):
        module.warn(
            f"the record of {name} states no passed search for known vulnerabilities: nobody looked at what is open in it"
        )
    if wanted not in ("present", state):
        changed = True
        if not module.check_mode:
            body = {"to": wanted, "reason": module.params["reason"], "image_sha256": digest or before["image_sha256"]}
            cut_off = client.request("POST", f"/v1/images/{quote(name, safe='')}/state", body)["workspaces_cut_off"]
        state = wanted
    after = {**(record or {key: value for key, value in before.items() if key not in OWN}), "state": state}
    return {
        "changed": changed,
        "image": {"name": name, "image_sha256": after["image_sha256"], "state": state},
        "workspaces_cut_off": cut_off,
        "diff": {"before": before, "after": after},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(
            record={"type": "path"},
            name={"type": "str"},
            state={"type": "str", "default": "present", "choices": ["present", "stable", "deprecated", "revoked"]},
            reason={"type": "str", "default": "by playbook"},
        ),
        required_one_of=[("record", "name")],
        mutually_exclusive=[("record", "name")],
        supports_check_mode=True,
    )
    with operator(module) as client:
        module.exit_json(**ensure(module, client))


if __name__ == "__main__":
    main()
