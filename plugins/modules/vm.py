#!/usr/bin/python
# Copyright: Secure Agent Workspace contributors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Bring a workspace VM to a state with the qemu driver of its hypervisor."""

from __future__ import annotations

DOCUMENTATION = r"""
module: vm
short_description: Bring a workspace VM to a state
version_added: "0.1.0"
description:
  - Runs on a hypervisor and calls C(/opt/saw/bin/saw vm), the qemu driver.
  - Creation is idempotent. A different O(image_sha256) rebuilds the root disk and keeps the data disk and the virtual TPM.
author:
  - Secure Agent Workspace contributors (@secure-agent)
options:
  id:
    description: Name of the workspace.
    type: str
    required: true
  state:
    description:
      - V(created) makes every missing part, V(started) also runs it; without O(image) it runs the VM as it was made.
      - V(stopped) asks the guest to power off.
      - V(killed) ends it at once, V(absent) removes disks, virtual TPM and network.
    type: str
    choices: [created, started, stopped, killed, absent]
    default: started
  number:
    description: Number that the broker assigned; needed to create, together with O(image) and O(image_sha256).
    type: int
  image:
    description: Path of the golden image on the hypervisor; needed to create.
    type: path
  image_sha256:
    description: SHA-256 of the image; needed to create.
    type: str
  memory_mib:
    description: Memory in MiB.
    type: int
    default: 1536
  cpus:
    description: Number of virtual CPUs.
    type: int
    default: 2
  data_disk_mib:
    description: Size of the data disk in MiB.
    type: int
    default: 2048
  data_disk_recovery_key:
    description:
      - Public key (PEM) of the operator. Where there is one, the data disk is handed over blank, and the guest encrypts it and
        seals its key to the virtual TPM; the recovery key is sealed for this public key. The image needs the role C(data_disk).
      - A disk with data does not change from plain to encrypted, or back.
    type: str
    default: ""
  data_disk_secure_boot:
    description: The encrypted data disk is made and opened under secure boot alone, so the image needs its owner's keys.
    type: bool
    default: true
  credentials:
    description: systemd credentials for the guest; public data only. A mapping is handed over as JSON.
    type: dict
    default: {}
  accel:
    description: Accelerator of the VM.
    type: str
    choices: [auto, kvm, tcg]
    default: auto
  devices:
    description:
      - PCI addresses on the hypervisor, bound to vfio-pci there, that the VM gets for itself, such as a GPU. Needs O(wipe).
    type: list
    elements: str
    default: []
  wipe:
    description: Nothing of the VM is released before the signed record of a wipe lies beside it (C(saw gpu wipe)).
    type: bool
    default: false
  handed:
    description:
      - What the broker hands to hypervisors so that they judge images themselves (C(saw image hand-over NAME), as a mapping).
      - For V(created) and V(started). It is verified there and kept before anything else is done.
    type: dict
    default: {}
attributes:
  check_mode:
    description: Reports what would change without changing it.
    support: full
  diff_mode:
    description: Shows the state before and after.
    support: full
  idempotent:
    description: A second run with the same options changes nothing.
    support: full
"""

EXAMPLES = r"""
- name: A running workspace
  secure_agent.workspace.vm:
    id: ws-demo
    number: 1
    image: /var/lib/saw/images/workspace-0a1b2c3d4e5f/image.qcow2
    image_sha256: "{{ release.image_sha256 }}"
    credentials:
      saw.workspace: "{{ workspace_credential }}"

- name: Run it as it was made, with a release record that was signed anew meanwhile
  secure_agent.workspace.vm:
    id: ws-demo
    handed: "{{ hand_over.stdout | from_json }}"

- name: End it at once
  secure_agent.workspace.vm:
    id: ws-demo
    state: killed
"""

RETURN = r"""
id:
  description: Name of the workspace.
  returned: success
  type: str
  sample: ws-demo
state:
  description: State that was asked for.
  returned: success
  type: str
  sample: started
ek_pub_pem:
  description: Public endorsement key of the virtual TPM (RSA-2048, PEM).
  returned: when created, or started with O(image)
  type: str
  sample: "-----BEGIN PUBLIC KEY-----\n…"
active:
  description: Whether the VM runs now (what it was, in check mode).
  returned: success
  type: bool
  sample: true
erased:
  description:
    - Evidence that the key slots of the encrypted data disk were overwritten before it was removed; kept on the hypervisor below
      C(/var/lib/saw/erased). The kind C(luks2-unreadable) says that no header was found and the place of the key slots went.
  returned: when O(state=absent) removed an encrypted data disk
  type: dict
  sample: {format: saw-erasure/1, workspace: ws-demo, host: edge, at: "2026-01-01T00:00:00Z", state: erased,
           erased: {kind: luks2-header}}
failure:
  description: Machine-readable error of the driver.
  returned: failure
  type: dict
  sample: {code: vm_failed, message: "image … is not on this hypervisor", cure: run the image_build playbook, details: {}}
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule

SAW = "/opt/saw/bin/saw"
STATE = "/var/lib/saw/vms"


def call(module, *arguments, **options):
    """Run ``saw vm`` and return its answer; end the module with the driver's own error."""
    rc, out, err = 127, "", "%s is not installed here" % SAW
    if os.access(SAW, os.X_OK):
        rc, out, err = module.run_command([SAW, "vm", *arguments, "--json"], data=options.get("data"))
    try:
        answer = json.loads(out.strip().splitlines()[-1])
    except (IndexError, ValueError):
        answer = {}
    if rc != 0:
        failure = answer.get("error") or {
            "code": "vm_failed",
            "message": (err or out).strip(),
            "cure": "apply the saw_runtime and hypervisor roles to this host",
            "details": {},
        }
        module.fail_json(msg="%s (%s)" % (failure["message"], failure["cure"]), failure=failure)
    return answer


def specification(params):
    """Return the driver's specification as a mapping."""
    credentials = {
        name: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for name, value in params["credentials"].items()
    }
    return {
        "id": params["id"],
        "number": params["number"],
        "image": params["image"],
        "image_sha256": params["image_sha256"],
        "memory_mib": params["memory_mib"],
        "cpus": params["cpus"],
        "data_disk_mib": params["data_disk_mib"],
        "credentials": credentials,
        "accel": params["accel"],
        "devices": params["devices"],
        "wipe": params["wipe"],
        "data_disk_recovery_key": params["data_disk_recovery_key"],
        "data_disk_secure_boot": params["data_disk_secure_boot"],
    }


def stored_specification(vm_id):
    """Return what the driver has stored for this VM, or None."""
    try:
        with open(os.path.join(STATE, vm_id, "spec.json"), "rb") as stream:
            return json.load(stream)
    except (OSError, ValueError):
        return None


def differs(stored, wanted):
    """Tell whether the stored specification is not the wanted one."""
    # Specifications of older versions say nothing of these.
    unsaid = {"devices": [], "wipe": False, "data_disk_recovery_key": "", "data_disk_secure_boot": True}
    return stored is None or any(stored.get(key, unsaid.get(key)) != value for key, value in wanted.items())


def main():
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "id": {"type": "str", "required": True},
            "state": {
                "type": "str",
                "choices": ["created", "started", "stopped", "killed", "absent"],
                "default": "started",
            },
            "number": {"type": "int"},
            "image": {"type": "path"},
            "image_sha256": {"type": "str"},
            "memory_mib": {"type": "int", "default": 1536},
            "cpus": {"type": "int", "default": 2},
            "data_disk_mib": {"type": "int", "default": 2048},
            "credentials": {"type": "dict", "default": {}},
            "accel": {"type": "str", "choices": ["auto", "kvm", "tcg"], "default": "auto"},
            "devices": {"type": "list", "elements": "str", "default": []},
            "wipe": {"type": "bool", "default": False},
            "data_disk_recovery_key": {"type": "str", "default": "", "no_log": False},
            "data_disk_secure_boot": {"type": "bool", "default": True},
            "handed": {"type": "dict", "default": {}},
        },
        required_if=[("state", "created", ("number", "image", "image_sha256"))],
        required_together=[("number", "image", "image_sha256")],
        supports_check_mode=True,
    )
    params = module.params
    vm_id, state = params["id"], params["state"]
    stored = stored_specification(vm_id)
    active = bool(stored) and call(module, "status", vm_id)["active"]
    before = "absent" if stored is None else ("started" if active else "stopped")
    wanted = specification(params)
    described = wanted["image"] is not None
    create = state in ("created", "started") and described and differs(stored, wanted)
    verb = None
    if state == "started" and (not active or create):
        verb = "start"
    elif state in ("stopped", "killed") and active:
        verb = "stop" if state == "stopped" else "poweroff"
    elif state == "absent" and stored is not None:
        verb = "destroy"
    result = {"id": vm_id, "state": state, "active": active, "changed": bool(create or verb)}
    if params["handed"] and state in ("created", "started") and (described or verb):
        words = ["accept"] + (["--dry-run"] if module.check_mode else [])
        taken = call(module, *words, data=json.dumps(params["handed"]))
        result["changed"] = result["changed"] or taken["changed"]
    replaced = create and active and stored.get("image_sha256") != wanted["image_sha256"]
    kept = before if stored and not replaced else "stopped"
    after = {"created": kept, "killed": "stopped"}.get(state, state)
    result["diff"] = {
        "before": {"state": before, "image_sha256": (stored or {}).get("image_sha256")},
        "after": {"state": after, "image_sha256": wanted["image_sha256"] or (stored or {}).get("image_sha256")},
    }
    if module.check_mode:
        module.exit_json(**result)
    if state in ("created", "started") and described:
        if replaced:
            call(module, "stop", vm_id)
        answer = call(module, "create", "--spec", "-", data=json.dumps(wanted))
        result["ek_pub_pem"] = answer["ek_pub_pem"]
        result["changed"] = result["changed"] or answer["changed"]
    if verb:
        answer = call(module, verb, vm_id)
        if answer.get("erased"):
            result["erased"] = answer["erased"]
    result["active"] = (
        state != "absent" and stored_specification(vm_id) is not None and call(module, "status", vm_id)["active"]
    )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
