"""Ask apt what is installed, pending and held. Runs under the system's own Python, which has apt's library.

    /usr/bin/python3 -I apt_probe.py BOOT

Prints one JSON object: ``installed`` (packages with their source packages), ``pending`` (every version that a source offers
and that is newer than the installed one; of a package the newest first), ``held`` (names), ``kernels`` (releases of the kernels
in the folder BOOT, oldest first), ``engine`` (what apt's configuration tells unattended-upgrades) and ``unverified`` (settings of
apt that switch its signature check off). Imports no part of ours, for that Python has none of it.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

#: Settings that let unsigned packages through; each is off by default.
UNVERIFIED = (
    "APT::Get::AllowUnauthenticated",
    "Acquire::AllowInsecureRepositories",
    "Acquire::AllowDowngradeToInsecureRepositories",
    "Acquire::AllowWeakRepositories",
)


def main(boot: str) -> None:
    """Print what apt knows."""
    import apt_pkg  # type: ignore[import-not-found,unused-ignore]  # part of python3-apt, of the system's Python alone

    apt_pkg.init()
    cache = apt_pkg.Cache(None)
    apt_pkg.Policy(cache)
    plan = apt_pkg.DepCache(cache)
    records = apt_pkg.PackageRecords(cache)
    installed_packages: list[dict[str, str]] = []
    pending: list[dict[str, Any]] = []
    held: list[str] = []
    for package in cache.packages:
        installed = package.current_ver
        if package.selected_state == apt_pkg.SELSTATE_HOLD:
            held.append(package.get_fullname(True))
        if installed is None:
            continue
        records.lookup(installed.file_list[0])
        about = {
            "package": package.get_fullname(True),
            "source": records.source_pkg or package.name,
            "source_version": records.source_ver or installed.ver_str,
            "installed": installed.ver_str,
        }
        installed_packages.append({**about, "architecture": installed.arch})
        candidate = plan.get_candidate_ver(package)
        for version in package.version_list:
            origins = [_origin(file) for file, _ in version.file_list if not file.not_source]
            if not origins or apt_pkg.version_compare(version.ver_str, installed.ver_str) <= 0:
                continue
            pending.append(
                {
                    **about,
                    "offered": version.ver_str,
                    "candidate": candidate is not None and candidate.ver_str == version.ver_str,
                    "origins": origins,
                }
            )
    kernels = sorted(
        (path.name.removeprefix("vmlinuz-") for path in Path(boot).glob("vmlinuz-*")),
        key=functools.cmp_to_key(apt_pkg.version_compare),
    )
    settings = apt_pkg.config
    answer = {
        "installed": installed_packages,
        "pending": pending,
        "held": sorted(held),
        "kernels": kernels,
        "engine": {
            "patterns": settings.value_list("Unattended-Upgrade::Origins-Pattern"),
            "others": settings.value_list("Unattended-Upgrade::Allowed-Origins"),
            "reboots": settings.find_b("Unattended-Upgrade::Automatic-Reboot", False),
        },
        "unverified": [name for name in UNVERIFIED if settings.find_b(name, False)],
    }
    json.dump(answer, sys.stdout)


def _origin(file: Any) -> dict[str, Any]:
    return {
        "origin": file.origin or "",
        "label": file.label or "",
        "archive": file.archive or "",
        "codename": file.codename or "",
        "component": file.component or "",
        "site": file.site or "",
    }


if __name__ == "__main__":
    main(sys.argv[1])
