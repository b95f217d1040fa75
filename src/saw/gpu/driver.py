"""The whole driver in one root: modules, firmware, no display stack, nouveau blocked.

Nothing here needs a GPU: an image is looked at where it is built.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from saw.gpu.modules import Certificate, Module, ask, driver_version, look

DISPLAY = re.compile(
    r"(xserver-|xorg|xwayland|x11-|libx11|libxcb|libwayland|weston|mesa-|libgbm|libegl|libgles|libopengl|libgl1|libglx)"
    r"|nvidia-(settings|xconfig|driver|egl|vulkan|vdpau)"
)
"""Beginnings of the names of packages that belong to a display stack. The ``glx-alternative`` packages only hold links."""


class Driver(msgspec.Struct, frozen=True):
    """What a root has: version of the driver, modules, firmware files, and every way in which it is not as it must be."""

    version: str
    modules: tuple[Module, ...]
    firmware: tuple[str, ...]
    problems: tuple[str, ...]


def driver_of(certificate: Certificate, *, packages: bool = True, root: Path = Path("/")) -> Driver:
    """Look at the driver below ``root``; with ``packages`` at dpkg's database and modprobe's configuration too.

    Raises :class:`GpuError` when there is no driver at all.
    """
    modules, problems = look(certificate, root)
    version = driver_version(root)
    folder = root / "usr/lib/firmware/nvidia" / version
    firmware = tuple(sorted(path.name for path in folder.glob("gsp_*.bin")))
    if not firmware:
        problems.append(f"there is no firmware in {folder} (package firmware-nvidia-gsp of the driver's version)")
    if packages:
        shown = display_packages(installed_packages(root))
        problems += [f"{name} belongs to a display stack" for name in shown]
        problems += nouveau(modprobe_configuration(root))
    return Driver(version, tuple(modules), firmware, tuple(problems))


def display_packages(names: list[str]) -> list[str]:
    """Return which of the packages ``names`` belong to a display stack."""
    return sorted(name for name in names if DISPLAY.match(name))


def installed_packages(root: Path = Path("/")) -> list[str]:
    """Return the names of the packages installed below ``root``; raise :class:`GpuError` without dpkg."""
    text = ask("dpkg-query", f"--admindir={root / 'var/lib/dpkg'}", "-W", "-f", "${db:Status-Abbrev} ${Package}\n")
    return [line.split()[1] for line in text.splitlines() if line.startswith("ii ")]


def modprobe_configuration(root: Path = Path("/")) -> str:
    """Return what the host's own files of modprobe's configuration say (``/etc/modprobe.d/*.conf``, modprobe.d(5))."""
    files = sorted((root / "etc/modprobe.d").glob("*.conf"))
    return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def nouveau(configuration: str) -> list[str]:
    """Return a problem unless modprobe's configuration keeps nouveau from loading by alias and by name."""
    lines = {" ".join(line.split()) for line in configuration.splitlines()}
    if {"blacklist nouveau", "install nouveau /bin/false"} <= lines:
        return []
    return ["nouveau is not blocked: modprobe's configuration has no blacklist and no install line for it"]
