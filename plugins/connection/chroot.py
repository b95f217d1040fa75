# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""Run tasks inside a root tree on the controller: how an image is configured at native speed."""

from __future__ import annotations

DOCUMENTATION = r"""
name: chroot
short_description: Configure a root tree on the controller
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Runs every task inside a root tree. Each command gets a mount namespace of its own with C(/proc) mounted, so that nothing
    stays mounted when a run is cut short.
  - Needs root on the controller. Systemd does not run there, so roles enable units and start nothing.
options:
  remote_addr:
    description: Folder of the root tree.
    type: path
    vars:
      - name: inventory_hostname
      - name: ansible_host
      - name: ansible_chroot_path
"""

import os
import subprocess

from ansible.errors import AnsibleConnectionFailure, AnsibleFileNotFound
from ansible.plugins.connection import ConnectionBase
from ansible.utils.display import Display

display = Display()

ENTER = (
    'mount -t proc proc "$1/proc" && '
    'exec chroot "$1" /usr/bin/env -i "$ENVIRONMENT_PATH" HOME=/root LANG=C.UTF-8 /bin/sh -c "$2"'
)
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Connection(ConnectionBase):
    """Connection to a folder."""

    transport = "secure_agent.workspace.chroot"
    has_pipelining = True
    has_tty = False

    def _connect(self):
        """Check that the folder is a root tree and that we may enter it."""
        root = self.get_option("remote_addr")
        if os.geteuid() != 0:
            raise AnsibleConnectionFailure("only root can enter a root tree: run ansible-playbook as root")
        if not root or not os.path.isabs(root) or not os.path.isdir(os.path.join(root, "usr")):
            raise AnsibleConnectionFailure(
                f"{root!r} is no root tree: set ansible_chroot_path to the absolute path of one"
            )
        if os.path.realpath(root) == "/":
            raise AnsibleConnectionFailure("the root tree is this machine's own: use connection local for that")
        self._connected = True
        return self

    def _run(self, command, data=None):
        """Run one shell command inside and return (code, output, error output)."""
        argv = [
            "unshare",
            "--mount",
            "--propagation",
            "private",
            "sh",
            "-c",
            ENTER,
            "sh",
            self.get_option("remote_addr"),
            command,
        ]
        environment = dict(os.environ, ENVIRONMENT_PATH=PATH)
        stdin = {"stdin": subprocess.DEVNULL} if data is None else {"input": data}
        done = subprocess.run(argv, capture_output=True, check=False, env=environment, **stdin)
        return done.returncode, done.stdout, done.stderr

    def exec_command(self, cmd, in_data=None, sudoable=False):
        """Run a command of Ansible's."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        display.vvv(f"EXEC {cmd}", host=self.get_option("remote_addr"))
        return self._run(cmd, in_data)

    def put_file(self, in_path, out_path):
        """Copy a file in; the path is resolved inside the tree, so that a link there cannot lead out of it."""
        super().put_file(in_path, out_path)
        if not os.path.exists(in_path):
            raise AnsibleFileNotFound(f"{in_path} does not exist")
        with open(in_path, "rb") as stream:
            code, _out, err = self._run(f"cat > {self._shell.quote(out_path)}", stream.read())
        if code != 0:
            raise AnsibleConnectionFailure(
                f"cannot write {out_path} in {self.get_option('remote_addr')}: {err.decode()}"
            )

    def fetch_file(self, in_path, out_path):
        """Copy a file out."""
        super().fetch_file(in_path, out_path)
        code, out, err = self._run(f"cat {self._shell.quote(in_path)}")
        if code != 0:
            raise AnsibleConnectionFailure(f"cannot read {in_path} in {self.get_option('remote_addr')}: {err.decode()}")
        with open(out_path, "wb") as stream:
            stream.write(out)

    def close(self):
        """Nothing stays open."""
        self._connected = False
