"""What a host must offer before OpenShell can run sandboxes on it: each lack by name, with its cure.

Source: OpenShell's support matrix and its Podman driver (0.1.x): Podman 5 or later without root, cgroup v2, user namespaces,
Landlock.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path

import msgspec

from saw.runtime import landlock

ACCOUNT = "saw-openshell"
"""The account that runs OpenShell's gateway and, without root, its containers."""
PODMAN = 5
"""Least major version of Podman."""
RANGE = 65536
"""Subordinate user and group ids that the account needs."""
PROGRAMS = {
    "usr/bin/openshell-gateway": "OpenShell's gateway; install the package that runtime_openshell_package or _deb names",
    "usr/bin/newuidmap": "the package uidmap",
    "usr/bin/pasta": "the package passt",
}


class Lack(msgspec.Struct, frozen=True):
    """One thing that the host lacks: what it is, why OpenShell cannot run without it, and what cures it."""

    thing: str
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.thing}: {self.reason}; {self.cure}"


def lacks(root: Path = Path("/"), *, abi: int | None = None, sdk: str = "openshell") -> list[Lack]:
    """Return what the host below ``root`` lacks; empty when OpenShell can run.

    ``abi`` is the kernel's Landlock ABI (default: the kernel is asked), ``sdk`` the Python package that the handover needs.
    """
    found = []
    level = landlock.abi() if abi is None else abi
    if level < 1:
        reason = (
            "this kernel offers no Landlock, so that OpenShell would run agents without rules for files or not at all"
        )
        found.append(Lack("landlock", reason, "boot a kernel with lsm=landlock"))
    if importlib.util.find_spec(sdk) is None:
        cure = "make the wheelhouse of saw_runtime with --group openshell"
        found.append(Lack(sdk, "OpenShell's Python SDK is not installed beside saw", cure))
    for path, cure in PROGRAMS.items():
        if not (root / path).is_file():
            found.append(Lack(f"/{path}", "it is not installed", f"install {cure}"))
    found += _podman(root) + _cgroup(root) + _namespaces(root)
    for name in ("subuid", "subgid"):
        if _ids(root / "etc" / name) < RANGE:
            reason = f"{ACCOUNT} has fewer than {RANGE} ids there, and containers without root need them"
            found.append(Lack(f"/etc/{name}", reason, f"give it a line {ACCOUNT}:FIRST:{RANGE}"))
    return found


def _podman(root: Path) -> list[Lack]:
    program = root / "usr/bin/podman"
    if not program.is_file():
        return [Lack("/usr/bin/podman", "there is no container runtime", "install the package podman")]
    try:
        done = subprocess.run([str(program), "--version"], capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [Lack("podman", f"it does not run: {error}", "repair its package")]
    version = re.search(r"version (\d+)\.", done.stdout)
    if done.returncode or version is None:
        return [
            Lack(
                "podman",
                f"it does not tell its version: {(done.stderr or done.stdout).strip()[:200]}",
                "repair its package",
            )
        ]
    if int(version[1]) < PODMAN:
        return [Lack("podman", f"it is version {version[1]}, and OpenShell needs {PODMAN}", "use Debian 13 or later")]
    return []


def _cgroup(root: Path) -> list[Lack]:
    try:
        offered = set((root / "sys/fs/cgroup/cgroup.controllers").read_text().split())
    except OSError:
        reason = "cgroup v2 is not mounted there, so that containers without root have no limits"
        return [Lack("/sys/fs/cgroup", reason, "boot with systemd.unified_cgroup_hierarchy=1")]
    missing = sorted({"memory", "pids"} - offered)
    if missing:
        return [
            Lack("/sys/fs/cgroup", f"the controllers {', '.join(missing)} are not there", "boot a kernel with them")
        ]
    return []


def _namespaces(root: Path) -> list[Lack]:
    for name in ("user/max_user_namespaces", "kernel/unprivileged_userns_clone"):
        path = root / "proc/sys" / name
        if path.is_file() and path.read_text().strip() == "0":
            reason = "user namespaces are off, and containers without root need them"
            return [Lack(name.replace("/", "."), reason, "set it, or stay with our own sandbox, which needs none")]
    return []


def _ids(path: Path) -> int:
    """Return how many subordinate ids the account has, by subuid(5)."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    fields = [line.split(":") for line in lines]
    return sum(int(field[2]) for field in fields if len(field) == 3 and field[0] == ACCOUNT and field[2].isdigit())
