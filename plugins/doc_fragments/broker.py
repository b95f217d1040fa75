# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every module that talks to the broker documents alike."""

from __future__ import annotations


class ModuleDocFragment:
    """Options and attributes of the group ``broker``."""

    DOCUMENTATION = r"""
options:
  context:
    description:
      - Context file that says where the broker's operator socket is.
      - Without it, the environment variable E(SAW_CONTEXT) names the file; without either, the socket of the machine that the
        module runs on is used.
    type: path
requirements:
  - The Python package C(secure-agent-workspace) for the interpreter that runs the module (on our hosts C(/opt/saw/bin/python))
"""

    ATTRIBUTES = r"""
options: {}
attributes:
  check_mode:
    support: full
    description: Reports what would change and changes nothing.
  diff_mode:
    support: full
    description: Shows what the broker holds before and after.
  idempotent:
    support: full
    description: A second call with the same arguments changes nothing.
  action_group:
    support: full
    description: Set O(context) once for a play through the action group.
    membership: [secure_agent.workspace.broker]
"""
