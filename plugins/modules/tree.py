#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A folder of the controller on a host, as one archive."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tree
short_description: Put a folder of the controller on a host as a whole
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Ships a folder with many files as one archive and replaces the folder on the host as a whole, owned by root.
  - A digest over names and contents in C(.tree-digest) marks what is installed, so that an unchanged folder costs one short call.
attributes:
  check_mode:
    support: full
    description: Reports whether the folder would be replaced.
  diff_mode:
    support: full
    description: Shows the two digests.
  idempotent:
    support: full
    description: The same folder is shipped once.
  action:
    support: full
    description: The folder is read on the controller.
options:
  src:
    description: Folder on the controller.
    type: path
    required: true
  dest:
    description: Folder on the host.
    type: path
    required: true
  digest:
    description: Digest of the folder; filled in by the controller.
    type: str
  archive:
    description: The shipped archive on the host; filled in by the controller.
    type: path
"""

EXAMPLES = r"""
- name: Install the MCP servers
  secure_agent.workspace.tree:
    src: build/cache/mcp
    dest: /opt/saw-mcp
"""

RETURN = r"""
digest:
  description: SHA-256 over the folder's names and contents.
  type: str
  returned: success
  sample: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
"""

import os
import shutil
import tarfile

from ansible.module_utils.basic import AnsibleModule

MARK = ".tree-digest"


def installed(dest: str) -> str:
    """Digest of what is installed, empty when nothing is."""
    try:
        with open(os.path.join(dest, MARK), encoding="ascii") as stream:
            return stream.read().strip()
    except FileNotFoundError:
        return ""


def owned_by_root(member: tarfile.TarInfo, path: str) -> tarfile.TarInfo | None:
    """Keep what the standard filter for data keeps, owned by root and not writable by others."""
    kept = tarfile.data_filter(member, path)
    return kept.replace(uid=0, gid=0, uname="root", gname="root", deep=False)


def replace(archive: str, dest: str, digest: str) -> None:
    """Unpack beside the folder, then exchange the two."""
    fresh, old = f"{dest}.new", f"{dest}.old"
    for path in (fresh, old):
        shutil.rmtree(path, ignore_errors=True)
    os.makedirs(fresh, mode=0o755)
    with tarfile.open(archive) as source:
        source.extractall(fresh, filter=owned_by_root)  # noqa: S202 - the filter keeps the standard one's refusals
    with open(os.path.join(fresh, MARK), "w", encoding="ascii") as stream:
        stream.write(digest + "\n")
    if os.path.exists(dest):
        os.rename(dest, old)
    os.rename(fresh, dest)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    """Entry point."""
    os.umask(0o022)  # services read what is made here, whatever the umask of the play's own session
    module = AnsibleModule(
        argument_spec={
            "src": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "digest": {"type": "str"},
            "archive": {"type": "path"},
        },
        supports_check_mode=True,
    )
    digest, dest = module.params["digest"], module.params["dest"]
    if digest is None:
        module.fail_json(msg="tree needs its action plugin, which reads the folder on the controller")
    before = installed(dest)
    result = {"changed": before != digest, "digest": digest, "diff": {"before": f"{before}\n", "after": f"{digest}\n"}}
    if result["changed"] and not module.check_mode:
        if module.params["archive"] is None:
            module.exit_json(needs_archive=True, **result)
        try:
            replace(module.params["archive"], dest, digest)
        except (OSError, tarfile.TarError) as error:
            module.fail_json(
                msg=f"{dest} was not replaced: {error}",
                failure={
                    "code": "tree_failed",
                    "details": {"dest": dest},
                    "cure": "make room on the host, then run again",
                },
            )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
