#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Officers' key files."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_key
short_description: Make officers' signing keys and read their public halves
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Makes Ed25519 key files, C(<name>.key) with mode 0600 and C(<name>.pub), for names that have none yet, and tells the public
    half of each.
  - A key that exists is never replaced. Where only the public half lies in the folder, the officer keeps the key elsewhere and
    nothing is made.
extends_documentation_fragment:
  - secure_agent.workspace.policy
  - secure_agent.workspace.policy.attributes
attributes:
  diff_mode:
    support: full
    description: Shows which key files there are before and after.
options:
  directory:
    description: Folder of the key files; made with mode 0700 when a key is made in it.
    type: path
    required: true
  names:
    description:
      - Names of the keys, lower-case letters, digits and dashes. Without any, nothing is made and all public halves in the folder
        are told.
    type: list
    elements: str
    default: []
  passphrase_file:
    description: File whose first line is the passphrase that protects new keys. Without it they are not encrypted.
    type: path
"""

EXAMPLES = r"""
- name: Make the keys of three officers
  secure_agent.workspace.policy_key:
    directory: keys
    names: [ada, ben, cleo]

- name: Read the officers' public keys
  secure_agent.workspace.policy_key:
    directory: keys
  register: officers
"""

RETURN = r"""
public_keys:
  description: The keys; in check mode a key that is yet to be made has no key id and no public key.
  type: list
  elements: dict
  returned: success
  sample:
    - name: ada
      key_id: 4e777de0d275f9d28588dd9a1606cc748e548f9e22b6795b7cb3f63f98035fcb
      kind: ed25519
      public_key: "-----BEGIN PUBLIC KEY-----"
      path: keys/ada.pub
      private_here: true
created:
  description: Names of the keys that were made (or would be).
  type: list
  elements: str
  returned: success
  sample: [ada]
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: key_file, details: {}, cure: put its public half beside it}
"""

import glob
import os
import stat
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import reporting

try:
    from saw.policy.errors import KeyFileError
    from saw.policy.keys import create_key, key_id, key_kind, load_public_key, public_pem, read_passphrase
except ImportError:  # reporting() tells the person
    KeyFileError = None


class KeyFiles:
    """The two files of one key."""

    def __init__(self, directory: str, name: str) -> None:
        self.name = name
        self.private = os.path.join(directory, f"{name}.key")
        self.public = os.path.join(directory, f"{name}.pub")
        if os.path.exists(self.private) and not os.path.exists(self.public):
            reason = f"{self.private} lies there without {self.public}"
            raise KeyFileError(reason, cure="put its public half beside it, or choose another name")

    @property
    def exists(self) -> bool:
        """Whether there is such an officer; the private half may be elsewhere."""
        return os.path.exists(self.public)

    @property
    def exposed(self) -> bool:
        """Whether others than its owner may read the private half."""
        return os.path.exists(self.private) and bool(stat.S_IMODE(os.stat(self.private).st_mode) & 0o077)

    def state(self) -> dict[str, str]:
        """The files and the private one's mode, for ``--diff``."""
        files = {}
        for path in (self.private, self.public):
            if os.path.exists(path):
                files[path] = oct(stat.S_IMODE(os.stat(path).st_mode))
        return files

    def describe(self) -> dict[str, Any]:
        """The public half; empty while there is none."""
        told = {"name": self.name, "path": self.public, "private_here": os.path.exists(self.private)}
        if not self.exists:
            return {**told, "key_id": "", "kind": "ed25519", "public_key": ""}
        key = load_public_key(self.public)
        return {**told, "key_id": key_id(key), "kind": key_kind(key), "public_key": public_pem(key).decode()}


def ensure(module: AnsibleModule) -> dict[str, Any]:
    """Make what is missing and return the module's result."""
    directory, names = module.params["directory"], module.params["names"]
    if not names:
        found = sorted(glob.glob(os.path.join(glob.escape(directory), "*.pub")))
        names = [os.path.splitext(os.path.basename(path))[0] for path in found]
    files = [KeyFiles(directory, name) for name in dict.fromkeys(names)]
    created = [file for file in files if not file.exists]
    exposed = [file for file in files if module.params["names"] and file.exposed]
    before = {path: mode for file in files for path, mode in file.state().items()}
    if not module.check_mode:
        passphrase = read_passphrase(module.params["passphrase_file"]) if created else None
        for file in created:
            create_key(directory, file.name, passphrase)
        for file in exposed:
            os.chmod(file.private, 0o600)
    after = {path: mode for file in files for path, mode in file.state().items()}
    if module.check_mode:
        after.update({path: "0o600" for file in (*created, *exposed) for path in [file.private]})
        after.update({file.public: "0o644" for file in created})
    return {
        "changed": bool(created or exposed),
        "public_keys": [file.describe() for file in files],
        "created": [file.name for file in created],
        "diff": {"before": before, "after": after},
    }


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "default": []},
            "passphrase_file": {"type": "path", "no_log": False},
        },
        supports_check_mode=True,
    )
    with reporting(module):
        module.exit_json(**ensure(module))


if __name__ == "__main__":
    main()
