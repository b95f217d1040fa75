# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""What every plugin about policy files documents alike."""

from __future__ import annotations


class ModuleDocFragment:
    """Requirements, signing options and attributes of the plugins that work on policy files."""

    DOCUMENTATION = r"""
options: {}
requirements:
  - The Python package C(secure-agent-workspace) for the interpreter that runs this, on the controller that of Ansible itself
    (C(ansible_playbook_python))
"""

    SIGNING = r"""
options:
  keys:
    description:
      - Who signs. Each is a private key file, or V(exec:) and the absolute path of a program that keeps the key to itself (a
        token, a TPM, a signing service).
      - The keys themselves never appear in a result or a log.
    type: list
    elements: str
    required: true
  passphrase_files:
    description: Files whose first line is the passphrase of a key file; none, one for all keys, or one for each key.
    type: list
    elements: path
    default: []
"""

    ATTRIBUTES = r"""
options: {}
attributes:
  check_mode:
    support: full
    description: Reports what would change and changes nothing.
  diff_mode:
    support: N/A
    description: Nothing changes.
  idempotent:
    support: full
    description: A second call with the same arguments changes nothing.
"""
