#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A signed bundle file: made from a folder, or with further officers' signatures."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_sign
short_description: Sign a policy bundle
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Signs a bundle folder as a new revision, or adds signatures to a bundle file.
  - What the revision lets workspaces reach beyond the release in force is computed and its digest is signed with the bundle. An
    officer who adds a signature computes it again, and signs only a bundle that states the same.
  - When O(dest) holds the same content as the same revision already, only missing signatures are added; when all are there,
    nothing changes. The same revision with other content is refused, since a revision means one content.
extends_documentation_fragment:
  - secure_agent.workspace.policy
  - secure_agent.workspace.policy.signing
  - secure_agent.workspace.policy.attributes
attributes:
  diff_mode:
    support: full
    description: Shows what the bundle lets workspaces reach beyond the release in force and no longer, not a diff of texts.
options:
  path:
    description: Bundle folder, or a bundle file that further officers sign.
    type: path
    required: true
  dest:
    description: Bundle file to write; may be the same as O(path).
    type: path
    required: true
  revision:
    description: Number of the revision, one more than the last. Needed for a folder; a bundle file has one.
    type: int
  valid_for:
    description: How long the revision counts from now, as a whole number with C(s), C(m), C(h) or C(d).
    type: str
    default: 30d
  base:
    description:
      - Bundle file of the release in force.
      - Needed unless nothing is in force, which is so for revision 1, with O(first), and for a bundle file that states so.
    type: path
  first:
    description: The ring has no release of this blueprint yet, so its whole reach is new.
    type: bool
    default: false
"""

EXAMPLES = r"""
- name: Sign as two officers
  secure_agent.workspace.policy_sign:
    path: policies/coding
    revision: 7
    base: build/policy/releases/coding-6.bundle.json
    keys: [keys/ada.key, "exec:/usr/local/bin/sign-with-token"]
    passphrase_files: [keys/ada.passphrase, /dev/null]
    dest: build/policy/releases/coding-7.bundle.json

- name: Add the signature of another officer
  secure_agent.workspace.policy_sign:
    path: coding-7.bundle.json
    dest: coding-7.bundle.json
    base: coding-6.bundle.json
    keys: [keys/cleo.key]
"""

RETURN = r"""
blueprint:
  description: Name of the blueprint.
  type: str
  returned: success
  sample: coding
revision:
  description: Number of the revision.
  type: int
  returned: success
  sample: 7
policy_digest:
  description: Digest that names content, revision and window; empty in check mode when the bundle is yet to be made.
  type: str
  returned: success
  sample: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
not_after:
  description: Until when it counts; empty in check mode when the bundle is yet to be made.
  type: str
  returned: success
  sample: "2026-12-24T08:00:00Z"
signers:
  description: Key ids of all signatures in the file (in check mode those that are there or would be).
  type: list
  elements: str
  returned: success
  sample: [4e777de0d275f9d28588dd9a1606cc748e548f9e22b6795b7cb3f63f98035fcb]
reach:
  description: What is gained and lost, as M(secure_agent.workspace.policy_bundle_check) returns it.
  type: dict
  returned: success
  sample: {widening: false, reach_digest: 066ba66d02bb12518e13, gained: [], lost: [], lines: []}
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: revision_taken, details: {}, cure: sign it as the next revision}
"""

import os
from datetime import timedelta
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import (
    SIGNING,
    held_revision,
    load_any,
    open_signers,
    prepared,
    present,
    reach_between,
    reach_result,
    read_file,
    reporting,
    unsigned_by,
    write_file,
)

try:
    from saw.errors import ConfigError
    from saw.policy.bundle import add_signatures, build_manifest, describe, sign, window
    from saw.policy.governance import duration
    from saw.policy.keys import key_id
    from saw.policy.matcher import Matcher
    from saw.policy.tuf_statements import check_stated, states_first
except ImportError:  # reporting() tells the person
    ConfigError = None


def ensure(module: AnsibleModule) -> dict[str, Any]:
    """Sign what is not signed yet and return the module's result."""
    path, dest, base, revision = (module.params[name] for name in ("path", "dest", "base", "revision"))
    folder = os.path.isdir(path)
    if folder and revision is None:
        raise ConfigError("a new bundle needs a revision", cure="give revision, one more than the last")
    try:
        validity = timedelta(seconds=duration(module.params["valid_for"]))
    except ValueError as error:
        raise ConfigError(f"valid_for: {error}", cure="write it in that form") from error
    signers = open_signers(module)
    bundle = load_any(path)
    Matcher.compile(bundle.policy, bundle.governance)
    offered = None if folder else read_file(path)
    if offered is not None:
        revision = describe(offered)[1].revision
    held = held_revision(dest, bundle, revision, offered, validity)
    if base and module.params["first"]:
        raise ConfigError("base and first exclude each other", cure="give base alone where something is in force")
    _check_base(base, module.params["first"] or revision == 1 or (held is not None and states_first(held)))
    diff, stated = reach_between(base, bundle)
    if held is not None:
        check_stated(held, stated)
    missing = signers if held is None else unsigned_by(held, signers)
    changed = bool(missing) or not os.path.exists(dest) or read_file(dest) != held
    written = held
    if missing and not module.check_mode:
        if held is None:
            times = window(present(), validity)
            held = sign(build_manifest(bundle, revision, *times, reach=stated), bundle.members, [])
        written = add_signatures(held, missing)
    if changed and not module.check_mode:
        write_file(dest, written)
    result = {"changed": changed, "blueprint": bundle.governance.blueprint.name, "revision": revision}
    result.update(policy_digest="", not_after="", signers=sorted(key_id(one.public_key()) for one in missing))
    if written is not None:
        digest, manifest, signed_by = describe(written)
        signed_by = sorted({*signed_by, *result["signers"]})
        result.update(policy_digest=digest, not_after=manifest.not_after, signers=signed_by)
    result["reach"] = reach_result(diff)
    return {**result, "diff": prepared(diff) if changed else {}}


def _check_base(base: str | None, first: bool) -> None:
    """Raise unless it is clear which release the bundle follows."""
    if base is None and not first:
        reason = "it follows another release, and who signs sees what changes"
        raise ConfigError(
            reason, cure="give base, the bundle file of the release in force; first where the ring has none yet"
        )
    if base is not None and os.path.isdir(base):
        raise ConfigError(f"base {base} is a folder", cure="give the signed bundle file of the release in force")


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "dest": {"type": "path", "required": True},
            "revision": {"type": "int"},
            "valid_for": {"type": "str", "default": "30d"},
            "base": {"type": "path"},
            "first": {"type": "bool", "default": False},
            **SIGNING,
        },
        supports_check_mode=True,
    )
    with reporting(module):
        module.exit_json(**ensure(module))


if __name__ == "__main__":
    main()
