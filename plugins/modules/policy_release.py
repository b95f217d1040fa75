#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""A signed publication, released to its rings."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_release
short_description: Publish signed policy bundles to their rings
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Hands a publication that officers have signed (C(saw policy stage)) to the broker, which verifies it again.
  - A change of reach that the officers did not sign is refused (C(unsigned_widening)).
  - A publication whose bundles are what their rings run already changes nothing. Going back is a new revision with old content.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: full
    description: Shows what the broker holds before and after and, with O(repository), what is newly reached and no longer.
options:
  publication:
    description: Folder of the publication, with C(metadata/) and C(targets/).
    type: path
    required: true
  repository:
    description: Officers' copy of the repository, from which the change of reach is told; brought up to date after publishing.
    type: path
"""

EXAMPLES = r"""
- name: Release to the canary ring
  secure_agent.workspace.policy_release:
    publication: build/policy/releases/coding-7-canary
    repository: build/policy/repository
"""

RETURN = r"""
releases:
  description: What every ring runs afterwards (in check mode, before).
  type: list
  elements: dict
  returned: success
  sample:
    - ring: canary
      blueprint: coding
      revision: 7
      policy_digest: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
reach:
  description: What each changed release lets workspaces reach beyond the one in force and no longer, by target path.
  type: dict
  returned: when O(repository) holds the releases in force
  sample:
    rings/canary/coding.bundle.json: {widening: false, reach_digest: 066ba66d02bb12518e13, gained: [], lost: [], lines: []}
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: threshold, details: {}, cure: have another officer sign}
"""

import base64
import os
import traceback
from typing import Any

from ansible.module_utils.basic import AnsibleModule, missing_required_lib
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import reach_lines, reach_result

try:
    from saw.policy.bundle import describe, read_content
    from saw.policy.tuf_reach import bundle_diff, check_statement, compare, statement
    from saw.policy.tuf_repository import Publication, adopt_publication
    from saw.policy.tuf_statements import released, statements

    POLICY_ERROR = None
except ImportError:
    POLICY_ERROR = traceback.format_exc()


def read_files(folder: str, suffix: str) -> dict[str, bytes]:
    """Files below ``folder`` by their path relative to it."""
    found = {}
    for parent, _folders, names in os.walk(folder):
        for name in sorted(names):
            path = os.path.join(parent, name)
            if name.endswith(suffix) and not os.path.islink(path):
                with open(path, "rb") as stream:
                    found[os.path.relpath(path, folder)] = stream.read()
    return found


def wanted_releases(targets: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What the publication releases, by target path."""
    wanted = {}
    for path, raw in targets.items():
        digest, manifest, _signers = describe(raw)
        wanted[path] = {"policy_digest": digest, "revision": manifest.revision}
    return wanted


def by_target(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The broker's releases by target path."""
    return {
        f"rings/{one['ring']}/{one['blueprint']}.bundle.json": {
            "policy_digest": one["policy_digest"],
            "revision": one["revision"],
        }
        for one in state["releases"]
    }


def changes_of_reach(
    repository: str, before: dict[str, Any], metadata: dict[str, bytes], targets: dict[str, bytes]
) -> dict[str, Any]:
    """The diff of reach of each target whose release in force the officers' copy holds, by target path.

    A change that was not signed is refused here already, and so in check mode; the broker refuses it in any case.
    """
    found = {}
    for path, raw in targets.items():
        base = released(repository, path)
        held = describe(base)[0] if base is not None else ""
        in_force = before[path]["policy_digest"] if before[path] is not None else ""
        if (
            held != in_force or held == describe(raw)[0]
        ):  # a copy that lags tells nothing; the broker decides without it
            continue
        report = compare(base, read_content(raw), bundle_diff())
        check_statement(path, statement(base, report), statements(metadata, path, raw))
        found[path] = report
    return found


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(publication={"type": "path", "required": True}, repository={"type": "path"}),
        supports_check_mode=True,
    )
    if POLICY_ERROR is not None:
        module.fail_json(msg=missing_required_lib("secure-agent-workspace"), exception=POLICY_ERROR)
    folder = module.params["publication"]
    metadata = read_files(os.path.join(folder, "metadata"), ".json")
    targets = read_files(os.path.join(folder, "targets"), ".bundle.json")
    if "targets.json" not in metadata:
        if module.check_mode and not os.path.isdir(folder):
            module.exit_json(changed=True, releases=[])
        module.fail_json(
            msg=f"{folder} holds no publication",
            failure={"code": "publication_missing", "details": {}, "cure": "make one with saw policy stage"},
        )
    with operator(module) as client:
        state = client.request("GET", "/v1/policy/state")
        wanted = wanted_releases(targets)
        present = by_target(state)
        before = {path: present.get(path) for path in wanted}
        changed = before != wanted
        repository = module.params["repository"]
        reach = changes_of_reach(repository, before, metadata, targets) if repository and changed else {}
        if changed and not module.check_mode:
            body = {
                "metadata": {name: base64.b64encode(raw).decode() for name, raw in metadata.items()},
                "targets": {name: base64.b64encode(raw).decode() for name, raw in targets.items()},
            }
            state = client.request("POST", "/v1/policy/publish", body)
            if repository:
                adopt_publication(repository, Publication(metadata, targets))
        diff = {"before": before, "after": wanted}
        if reach:
            lines = [line for path, one in reach.items() for line in (path, *reach_lines(one))]
            diff["prepared"] = "\n".join(lines) + "\n"
        told = {path: reach_result(one) for path, one in reach.items()}
        module.exit_json(changed=changed, releases=state["releases"], reach=told, diff=diff)


if __name__ == "__main__":
    main()
