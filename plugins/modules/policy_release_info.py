#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every ring runs, who signed it, and until when it counts."""

from __future__ import annotations

DOCUMENTATION = r"""
module: policy_release_info
short_description: Read what policy is released to which ring
version_added: 0.2.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Asks the broker, or with O(repository) reads a copy of the policy repository and no broker is needed.
  - From a copy, also where the bundle file of each release lies, for comparing and signing.
  - From the broker, also where the rollout of each release stands, and which limits are in force.
extends_documentation_fragment:
  - secure_agent.workspace.broker
  - secure_agent.workspace.broker.attributes
attributes:
  diff_mode:
    support: N/A
    description: Nothing changes.
options:
  ring:
    description: Only this ring.
    type: str
  blueprint:
    description: Only this blueprint.
    type: str
  repository:
    description: Copy of the repository, for example the officers', that is read in place of the broker.
    type: path
"""

EXAMPLES = r"""
- name: Read what the stable ring runs
  secure_agent.workspace.policy_release_info:
    ring: stable
    blueprint: coding
  register: released

- name: Find the bundle file that a new revision is compared with
  secure_agent.workspace.policy_release_info:
    repository: officers
    ring: stable
  register: held
"""

RETURN = r"""
releases:
  description:
    - One entry for each ring and blueprint, sorted; empty where nothing is released. C(history) has the earlier revisions, newest
      first, in the same form.
    - C(signers) are the key ids of those of today's officers whose signature holds. C(released_at) and C(rollout) come from the
      broker alone; C(role), C(bundle) (path of the bundle file) and C(members) (SHA-256 of its files) from a copy alone.
    - C(rollout.rollback) is the state of the rollback in escrow, empty without one; C(rollout.standing) the revision that the
      next release would go back to, 0 for none.
  type: list
  elements: dict
  returned: success
  sample:
    - ring: stable
      blueprint: coding
      revision: 7
      version: 1.0.0
      policy_digest: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
      not_before: "2026-11-24T08:00:00Z"
      not_after: "2026-12-24T08:00:00Z"
      signers: [4e777de0d275f9d28588dd9a1606cc748e548f9e22b6795b7cb3f63f98035fcb]
      reach: {base_digest: 6b86b273ff34, diff_digest: 066ba66d02bb, widening: false}
      history: []
      rollout: {state: running, reason: "", previous_revision: 6, returns_to: null, rollback: kept, standing: 7}
limits:
  description: When the broker halts a rollout, and whether it wants a rollback in escrow first (C(docs/rollout.md)).
  type: dict
  returned: when the broker was asked
  sample: {max_refused: 0, max_silent_s: 300, first_wave: 0, require_rollback: true}
failure:
  description: What failed, for programs.
  type: dict
  returned: failure
  sample: {code: unavailable, details: {}, cure: check that saw-broker runs and the context}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils.broker import broker_options, operator
from ansible_collections.secure_agent.workspace.plugins.module_utils.policy import (
    earlier_bundles,
    released_bundle,
    reporting,
)

try:
    import msgspec
    from saw.policy.tuf_rings import ring_status
except ImportError:  # reporting() tells the person
    ring_status = None


def wanted(status: dict[str, Any], params: dict[str, Any]) -> bool:
    """Whether this ring and blueprint was asked for."""
    return all(params[name] in (None, status[name]) for name in ("ring", "blueprint"))


def told(status: dict[str, Any]) -> dict[str, Any]:
    """One ring's release, flat, with its history."""
    rest = {name: value for name, value in status.items() if name not in ("current", "history") and value != ""}
    return {**rest, **status["current"], "history": list(status["history"])}


def rollout_of(release: dict[str, Any], told_of: dict[str, Any]) -> dict[str, Any]:
    """Where the rollout of a release stands; empty for one from before there were rollouts."""
    key = (release["ring"], release["blueprint"])
    standing = [one["revision"] for one in told_of["standing"] if (one["ring"], one["blueprint"]) == key]
    for one in told_of["rollouts"]:
        if (one["ring"], one["blueprint"], one["revision"]) == (*key, release["revision"]):
            names = ("state", "reason", "previous_revision", "returns_to")
            escrow = one["rollback"]["state"] if one["rollback"] else ""
            return {**{name: one[name] for name in names}, "rollback": escrow, "standing": sum(standing[:1])}
    return {}


def from_copy(directory: str, params: dict[str, Any]) -> list[dict[str, Any]]:
    """The releases of a copy, with the places of their files."""
    found = [told(status) for status in map(msgspec.to_builtins, ring_status(directory)) if wanted(status, params)]
    for release in found:
        place = (directory, release["ring"], release["blueprint"])
        release.update(released_bundle(*place, release["revision"]))
        files = earlier_bundles(*place) if release["history"] else {}
        release["history"] = [{**one, **files[one["policy_digest"]]} for one in release["history"]]
    return found


def main() -> None:
    """Entry point."""
    module = AnsibleModule(
        argument_spec=broker_options(ring={"type": "str"}, blueprint={"type": "str"}, repository={"type": "path"}),
        supports_check_mode=True,
    )
    params = module.params
    with reporting(module):
        if params["repository"]:
            module.exit_json(changed=False, releases=from_copy(params["repository"], params))
        with operator(module) as client:
            rings = client.request("GET", "/v1/policy/rings")["rings"]
            rollouts = client.request("GET", "/v1/policy/rollouts")
        found = [told(status) for status in rings if wanted(status, params)]
        releases = [{**release, "rollout": rollout_of(release, rollouts)} for release in found]
        module.exit_json(changed=False, releases=releases, limits=rollouts["limits"])


if __name__ == "__main__":
    main()
