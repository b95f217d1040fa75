"""What the main job checks before it touches anything: all that is missing at once, each with its cure."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from saw.addressing import networks
from saw.errors import UnavailableError
from saw.image import secure_boot, verified_root
from saw.image.base import NEED_BYTES as NEED_BASE
from saw.image.base_os import base_os
from saw.image.build import NEED_BYTES as NEED_IMAGE
from saw.image.build import ImageBuild
from saw.image.edr import chosen
from saw.image.package_state import Base
from saw.lab.process import run
from saw.lab.topology import WORKSPACE, Lab

PROGRAMS = {
    "packer": "packer",
    "mmdebstrap": "mmdebstrap",
    "qemu-img": "qemu-utils",
    "systemd-nspawn": "systemd-container",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "mkfs.vfat": "dosfstools",
    "mcopy": "mtools",
    "sfdisk": "fdisk",
    "npm": "npm",
    "lynis": "lynis",
}
MIB = 1024**2
NEED_MIB = {
    "image": NEED_IMAGE // MIB,
    "packages": NEED_BASE // MIB,
    "mcp": 100,
    "wheels": 200,
    "host": 700,
    "machine": 500,
    "run": 512,
}
"""Disk that making each part takes at most, rounded up from what was measured (docs/performance.md, "Disk")."""


def preflight(lab: Lab) -> None:
    """Check what the whole needs, and say all that is missing at once, each with its cure."""
    problems = []
    if os.geteuid() != 0:
        problems.append("root is needed (namespaces, nspawn, taps): run it with sudo")
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        problems.append(f"programs are missing: apt-get install {' '.join(missing)}")
    if not Path("/dev/net/tun").exists():
        problems.append("/dev/net/tun is missing: modprobe tun")
    needed = still_needed(lab)
    free, need = shutil.disk_usage(existing(lab.build)).free // MIB, sum(needed.values())
    if free < need:
        parts = ", ".join(f"{name} {mib} MiB" for name, mib in needed.items())
        problems.append(
            f"{lab.build} has {free} MiB free, {need} MiB are needed for what is still to be made ({parts}): "
            "free disk space, or set SAW_BUILD to a directory on a larger disk"
        )
    problems += taken_addresses(lab)
    if problems:
        raise UnavailableError("this machine is not ready:\n  - " + "\n  - ".join(problems), cure="then run it again")


def existing(path: Path) -> Path:
    """Return ``path``, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def still_needed(lab: Lab) -> dict[str, int]:
    """Return the parts that are still to be made, each with the MiB of disk that making it takes at most (measured).

    What is there already needs nothing; every run writes some logs and grows the machine's disk.
    """
    needed: dict[str, int] = {}
    cache, system = lab.build / "cache", base_os(lab.repository)
    build = ImageBuild(
        lab.repository, lab.build, edr=chosen(), owner=secure_boot.chosen(), root_verity=verified_root.chosen()
    )
    if build.matching() is None:
        needed["golden image"] = NEED_MIB["image"]
        if not build.base.known():
            needed["packages of the image"] = NEED_MIB["packages"]
        if not list(cache.glob("mcp-*")):
            needed["MCP servers"] = NEED_MIB["mcp"]
    if not Base(lab.repository / "packer/packages/host.txt", cache, system).known():
        needed["packages of the hosts"] = NEED_MIB["packages"]
    if not list(cache.glob("wheels-*")):
        needed["Python wheels"] = NEED_MIB["wheels"]
    hosts = lab.directory / "hosts"
    absent = [name for name in lab.host_names if not (hosts / name / "unpacked").exists()]
    if absent:
        needed[f"hosts {', '.join(absent)}"] = NEED_MIB["host"] * len(absent)
    if not list((hosts / "edge/root/var/lib/saw/vms").glob(f"{WORKSPACE}*/data.img")):
        needed["workspace"] = NEED_MIB["machine"]
    needed["logs and growth"] = NEED_MIB["run"]
    return needed


def taken_addresses(lab: Lab) -> list[str]:
    """Return a problem for each network of the lab that something else on this machine already uses."""
    problems: list[str] = []
    if shutil.which("ip") is None:
        return problems
    routes = run("ip", "-4", "route", "show").splitlines()
    workspaces = ".".join(str(networks()[0].network_address).split(".")[:2])
    for prefix in (f"{lab.network.prefix}.", f"{workspaces}."):
        problems += [
            f"network {prefix}0 is already in use here ({route.strip()}): remove that route or interface"
            for route in routes
            if route.startswith(prefix) and lab.network.uplink not in route
        ]
    return problems
