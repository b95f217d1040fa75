#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernel modules of a GPU on one host: built for its kernels and signed with the owner's key."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gpu_modules
short_description: Build and sign the kernel modules of NVIDIA's driver
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Looks whether every kernel of the host or image tree has NVIDIA's open kernel modules, of the version of the installed
    source and signed with the owner's key, and builds them with DKMS where it has not.
  - The kernel that happens to run is never asked for.
  - Calls C(/opt/saw/bin/saw gpu) on the host. The key goes there as standard input and lies in memory alone.
attributes:
  check_mode:
    support: full
    description: Reports what is missing or wrong; builds nothing.
  diff_mode:
    support: full
    description: Shows what is wrong with the modules, one line each.
  idempotent:
    support: full
    description: Modules that are right are left alone.
options:
  certificate:
    description: Certificate (PEM or DER) of the key, on the host.
    type: path
    required: true
  key:
    description: The private key itself (PEM, without a password).
    type: str
    required: true
  program:
    description: The C(saw) of the host.
    type: path
    default: /opt/saw/bin/saw
"""

EXAMPLES = r"""
- name: Build and sign the modules
  secure_agent.workspace.gpu_modules:
    certificate: /usr/local/share/saw/gpu-modules.crt
    key: "{{ lookup('ansible.builtin.file', '/etc/keys/modules.key') }}"
"""

RETURN = r"""
problems:
  description: What was wrong with the modules before, one line each.
  type: list
  elements: str
  returned: success
  sample: ["kernel 6.12.118+deb13-cloud-amd64: nvidia is missing"]
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule


def ask(module: AnsibleModule, *words: str, data: str | None = None) -> dict[str, object]:
    """Run ``saw gpu`` and return its answer; an answer that is no JSON ends the module."""
    code, output, errors = module.run_command([module.params["program"], "gpu", *words, "--json"], data=data)
    try:
        return json.loads(output)
    except ValueError:
        module.fail_json(msg=f"saw gpu {words[0]} ended with {code}: {(errors or output).strip()[-600:]}")


def refuse(module: AnsibleModule, answer: dict[str, object]) -> None:
    """End the module with the error that ``saw`` told."""
    error = answer.get("error") or {}
    words = f"{error.get('message', 'saw gpu failed')} ({error.get('cure', '')})"
    module.fail_json(msg=words, failure={name: error.get(name) for name in ("code", "details", "cure")})


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "certificate": {"type": "path", "required": True},
            "key": {"type": "str", "required": True, "no_log": True},
            "program": {"type": "path", "default": "/opt/saw/bin/saw"},
        },
        supports_check_mode=True,
    )
    certificate = module.params["certificate"]
    if module.check_mode and not os.path.exists(module.params["program"]):
        problems = [f"{module.params['program']} is not there yet"]
    else:
        before = ask(module, "driver", "--certificate", certificate)
        problems = list(before.get("problems") or [(before.get("error") or {}).get("message", "")])
        if before.get("ok"):
            module.exit_json(changed=False, problems=[])
    if not module.check_mode:
        done = ask(module, "build", "--certificate", certificate, data=module.params["key"].rstrip("\n"))
        if not done.get("ok"):
            refuse(module, done)
    lines = "".join(f"{problem}\n" for problem in problems)
    module.exit_json(changed=True, problems=problems, diff={"before": lines, "after": ""})


if __name__ == "__main__":
    main()
