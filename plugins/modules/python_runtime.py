#!/usr/bin/python
# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""The product's own Python runtime on a host, from a hash-locked wheelhouse and nothing else."""

from __future__ import annotations

DOCUMENTATION = r"""
module: python_runtime
short_description: Install the product's Python runtime from a hash-locked wheelhouse
version_added: 0.1.0
author: Secure Agent Workspace maintainers (!UNKNOWN)
description:
  - Ships a wheelhouse folder of the controller as one archive, makes a virtual environment and installs the locked wheels into it
    offline; pip refuses every file whose hash is not in the lock.
  - The lock itself is kept in the environment as the mark of what is installed, written last. An interrupted installation is
    therefore done again, and a failed one leaves the previous environment in place.
attributes:
  check_mode:
    support: full
    description: Reports whether the runtime would be replaced.
  diff_mode:
    support: full
    description: Shows the difference between the two locks.
  idempotent:
    support: full
    description: The same lock is installed once.
  action:
    support: full
    description: The wheelhouse is read on the controller.
options:
  wheelhouse:
    description: Folder on the controller with C(requirements.txt) (every line with C(--hash)) and the wheels.
    type: path
    required: true
  path:
    description: The environment.
    type: path
    default: /opt/saw
  python:
    description: Interpreter on the host to build the environment with.
    type: path
    default: /usr/bin/python3
  links:
    description: Links to make when the environment is in place, link to target. A target may hold one shell-style pattern.
    type: dict
    default: {}
  verify:
    description: Command that must succeed in the new environment, before it counts as installed.
    type: list
    elements: str
    default: []
  lock:
    description: Content of the wheelhouse's lock; filled in by the controller.
    type: str
  archive:
    description: The shipped wheelhouse on the host; filled in by the controller.
    type: path
"""

EXAMPLES = r"""
- name: Install the runtime
  secure_agent.workspace.python_runtime:
    wheelhouse: build/wheelhouse
    links:
      /usr/local/bin/saw: /opt/saw/bin/saw
    verify: [/opt/saw/bin/saw, --version]
"""

RETURN = r"""
digest:
  description: SHA-256 over the installed lock.
  type: str
  returned: success
  sample: 5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9
verified:
  description: What the O(verify) command printed.
  type: str
  returned: when something was installed
  sample: saw 0.1.0
"""

import fcntl
import glob
import hashlib
import os
import shutil
import tarfile
import tempfile
import time
from contextlib import contextmanager
from typing import Any, Iterator

from ansible.module_utils.basic import AnsibleModule

MARK = "requirements.txt"


def read(path: str) -> str:
    """Content of a text file, empty where there is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except FileNotFoundError:
        return ""


def pip_wheel(module: AnsibleModule) -> str:
    """The distribution's own copy of pip, which runs straight from its wheel; the environment itself stays without pip."""
    found = glob.glob("/usr/share/python-wheels/pip-*.whl") + glob.glob(
        "/usr/lib/python3*/ensurepip/_bundled/pip-*.whl"
    )
    if not found:
        module.fail_json(
            msg="no pip wheel on this host",
            failure={"code": "package_missing", "details": {}, "cure": "install the package python3-venv"},
        )
    return sorted(found)[-1]


def command(module: AnsibleModule, argv: list[str], what: str, **environment: str) -> str:
    """Run one step of the installation."""
    code, out, err = module.run_command(argv, environ_update=environment)
    if code != 0:
        raise RuntimeError(f"{what} failed: {(err or out).strip()[-2000:]}")
    return str(out).strip()


def build(module: AnsibleModule, folder: str) -> str:
    """Make the environment at its final path from the unpacked wheelhouse in ``folder``."""
    path = module.params["path"]
    command(module, [module.params["python"], "-m", "venv", "--without-pip", path], "making the environment")
    command(
        module,
        [
            os.path.join(path, "bin/python"), "-m", "pip", "install", "--no-index", "--no-cache-dir", "--require-hashes",
            "--only-binary=:all:", "--disable-pip-version-check", "--root-user-action=ignore", "--quiet",
            f"--find-links={folder}", f"--requirement={os.path.join(folder, MARK)}",
        ],
        "installing the wheels",
        PYTHONPATH=pip_wheel(module),
        PIP_CONFIG_FILE=os.devnull,
    )  # fmt: skip
    link(module.params["links"])
    verified = command(module, module.params["verify"], "checking the new runtime") if module.params["verify"] else ""
    with open(os.path.join(path, MARK), "w", encoding="utf-8") as stream:
        stream.write(module.params["lock"])
    return verified


def link(links: dict[str, str]) -> None:
    """Make the links."""
    for name, pattern in links.items():
        targets = sorted(glob.glob(pattern))
        if not targets:
            raise RuntimeError(f"{name} cannot be linked: nothing lies at {pattern}")
        os.makedirs(os.path.dirname(name), exist_ok=True)
        temporary = f"{name}.new"
        if os.path.lexists(temporary):
            os.unlink(temporary)
        os.symlink(targets[-1], temporary)
        os.replace(temporary, name)


@contextmanager
def alone(module: AnsibleModule) -> Iterator[None]:
    """Hold the environment's lock: the module of a killed run may still be at work on this host, and must end first."""
    path = module.params["path"]
    name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    with open(f"/run/saw-runtime-{name}.lock", "w", encoding="ascii") as lock:
        end = time.monotonic() + 600
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    module.fail_json(
                        msg=f"another run has been installing {path} for ten minutes",
                        failure={"code": "busy", "details": {"path": path}, "cure": "end it, then run this again"},
                    )
                time.sleep(0.2)
        yield


def install(module: AnsibleModule) -> str:
    """Replace the environment, or leave the previous one as it was."""
    with alone(module):
        return replace(module)


def replace(module: AnsibleModule) -> str:
    """Make the environment anew beside the previous one."""
    path = module.params["path"]
    previous = f"{path}.previous"
    if os.path.isdir(path):
        shutil.rmtree(previous, ignore_errors=True)
        os.rename(path, previous)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="saw-wheelhouse-", dir=os.path.dirname(path)) as folder:
            with tarfile.open(module.params["archive"]) as archive:
                archive.extractall(folder, filter="data")
            return build(module, folder)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        if os.path.isdir(previous):
            os.rename(previous, path)
        raise
    finally:
        shutil.rmtree(previous, ignore_errors=True)


def main() -> None:
    """Entry point."""
    os.umask(0o022)  # services read what is made here, whatever the umask of the play's own session
    module = AnsibleModule(
        argument_spec={
            "wheelhouse": {"type": "path", "required": True},
            "path": {"type": "path", "default": "/opt/saw"},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "links": {"type": "dict", "default": {}},
            "verify": {"type": "list", "elements": "str", "default": []},
            "lock": {"type": "str"},
            "archive": {"type": "path"},
        },
        supports_check_mode=True,
    )
    lock = module.params["lock"]
    if lock is None:
        module.fail_json(msg="python_runtime needs its action plugin, which reads the wheelhouse on the controller")
    installed = read(os.path.join(module.params["path"], MARK))
    result: dict[str, Any] = {
        "changed": installed != lock,
        "digest": hashlib.sha256(lock.encode()).hexdigest(),
        "diff": {
            "before": installed,
            "after": lock,
            "before_header": "installed lock",
            "after_header": "wheelhouse lock",
        },
    }
    if result["changed"] and not module.check_mode:
        if module.params["archive"] is None:
            module.exit_json(needs_archive=True, **result)
        try:
            result["verified"] = install(module)
        except (RuntimeError, OSError, tarfile.TarError) as error:
            module.fail_json(
                msg=f"the runtime was not replaced: {error}",
                failure={
                    "code": "runtime_failed",
                    "details": {},
                    "cure": "build the wheelhouse for this host's Python, then run again",
                },
            )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
