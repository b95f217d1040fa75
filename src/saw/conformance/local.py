"""The project's own sandbox on this machine without a VM: its network, its launcher, and the unit's namespaces by ``unshare``.

The rules are those of a compiled policy; ring 1 is not part of it (a recorder stands at the proxy's address). The unit's empty
root is made from the unit's own properties. What only systemd has, the cgroup and its system call list, is tried on a workspace.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from saw.conformance.outside import Ground
from saw.conformance.recorder import Plan
from saw.errors import UnavailableError
from saw.policy.loader import load_governance, load_policy
from saw.runtime.landlock import require
from saw.runtime.sandbox import (
    BASE_READ_WRITE,
    PROXY_ADDRESS,
    PROXY_PORT,
    RuntimePaths,
    SandboxSpec,
    compile_spec,
    encode_launch,
)
from saw.runtime.sandbox_home import protect_home
from saw.runtime.sandbox_units import view_properties

UID = 2000
HOME = "/run/home/agent"
ROOT = "/run/saw-view"
PYTHON = "/usr/bin/python3"
POLICY = f"""
version: 1
filesystem_policy: {{include_workdir: true, read_only: [/usr, /etc/ssl], read_write: [/tmp, {HOME}, /dev/null]}}
landlock: {{compatibility: hard_requirement}}
process: {{run_as_user: agent, run_as_group: agent}}
"""
GOVERNANCE = """
schema: 1
blueprint: {name: conformance, version: 1.0.0, owner: conformance}
landlock: {minimum_abi: 6, allow_best_effort: false}
credentials:
  - {id: git-token, ref: "local:git", hosts: ["git.example.com:443"], inject: {header: Authorization, format: "Bearer {secret}"}}
"""


def _write(ground: Ground, path: str, content: bytes) -> None:
    script = 'mkdir -p "${1%/*}" && cat >"$1" && chmod 644 "$1"'
    done = subprocess.run(
        [*ground.prefix(), "sh", "-c", script, "sh", path], input=content, capture_output=True, check=False, timeout=20
    )
    if done.returncode:
        raise UnavailableError(f"{path} could not be written: {done.stderr.decode(errors='replace').strip()}")


def _in_ground(ground: Ground, *words: str) -> None:
    done = ground.run(*words)
    if done.returncode:
        raise UnavailableError(f"{words[0]} failed: {(done.stderr or done.stdout).strip()[-400:]}")


def sandbox_spec() -> SandboxSpec:
    """Return the sandbox that the policy of this module compiles to."""
    return compile_spec(
        load_policy(POLICY.encode()), load_governance(GOVERNANCE.encode()),
        paths=RuntimePaths(PYTHON, str(Path(__file__).parents[1] / "runtime")), account=(UID, UID, HOME),
    )  # fmt: skip


def view_script(spec: SandboxSpec) -> str:
    """Return the shell script that makes the unit's view in a private mount namespace, and runs its arguments there.

    It does what systemd does with the same properties: an empty root, the listed paths in it, private temporary directories,
    ``/proc`` of the own PID namespace and a ``/dev`` without the machine's devices.
    """
    read_only = (*spec.base_read_only, *spec.read_only)
    properties = view_properties(read_only, (*BASE_READ_WRITE, *spec.read_write), spec.protected)
    binds = [(name == "BindPaths", value) for name, value in properties if name in {"BindPaths", "BindReadOnlyPaths"}]
    lines = [
        f"root={ROOT}; mkdir -p $root; mount -t tmpfs -o mode=0755 none $root",
        "at() {",
        "[ -e $1 ] || return 0",
        "if [ -d $1 ]; then mkdir -p $root$1; else mkdir -p $root${1%/*}; : >>$root$1; fi",
        "mount --bind $1 $root$1; [ $2 = rw ] || mount -o remount,bind,ro $root$1",
        "}",
        "mkdir -p $root/tmp $root/var/tmp $root/proc $root/dev/shm $root/dev/pts",
        f"for place in /tmp /var/tmp; do mount -t tmpfs -o {spec.limits.tmpfs(spec.limits.tmp_max)} none $root$place; done",
        f"mount -t tmpfs -o {spec.limits.tmpfs(spec.limits.shm_max)} none $root/dev/shm",
        "mount -t proc -o hidepid=invisible proc $root/proc",
        "mount -t devpts -o newinstance,ptmxmode=0666,mode=0620 none $root/dev/pts; ln -s pts/ptmx $root/dev/ptmx",
        *(f"at /dev/{name} rw" for name in ("null", "zero", "full", "random", "urandom", "tty")),
    ]
    done: list[str] = []
    for writable, value in binds:
        path = value.removeprefix("-")
        if writable or path in spec.protected or not any(Path(path).is_relative_to(one) for one in done):
            lines.append(f"at {path} {'rw' if writable else 'ro'}")
            done += [] if writable else [path]
    # As systemd does it: the old root is gone, and programs have the names that a policy means.
    return "\n".join([*lines, "cd $root; pivot_root . .; umount -l .; cd /", 'exec "$@"'])


def open_local(ground: Ground, python: str) -> tuple[Plan, list[str]]:
    """Set the sandbox up in ``ground``; return what the recorder listens on, and the command line for the probe."""
    require(6)
    spec = sandbox_spec()
    _in_ground(ground, sys.executable, "-m", "saw.cli.main", "sandbox", "net-up", "--json")
    owner = ("-o", str(UID), "-g", str(UID))
    _in_ground(ground, "install", "-d", *owner, "/run/home", HOME, f"{HOME}/project", "/run/saw/shell")
    _in_ground(ground, sys.executable, "-m", "saw.conformance.local")
    _write(ground, "/run/saw/sandbox/shell.json", encode_launch(spec.shell_launch()))
    _write(ground, "/run/saw/sandbox/ca-bundle.pem", b"public\n")
    for secret in ("/run/saw/ring1-ca/ca.key", "/run/saw/svid/sds.json"):
        _write(ground, secret, b"a secret of the workspace\n")
    proxy = tuple((PROXY_ADDRESS, port) for port in (PROXY_PORT, 9901, 22))
    drop = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    command = [
        *ground.prefix(), "ip", "netns", "exec", "saw-sandbox", "unshare", "--mount", "--ipc", "--pid", "--uts", "--fork",
        "--kill-child", "--propagation", "private", "sh", "-ec", view_script(spec), "sh", *drop, "env", "-i",
        f"PYTHONPATH={Path(__file__).parents[2]}", "PYTHONDONTWRITEBYTECODE=1",
        PYTHON, "-m", "saw.runtime.launcher", "--launch", "/run/saw/sandbox/shell.json", "--", python, "-I", "-u", "-",
    ]  # fmt: skip
    return ground.plan(more=proxy, knock=("10.200.0.2",)), command


if __name__ == "__main__":  # in the ground, where the home directory is
    protect_home(sandbox_spec())
