"""Download the Debian packages that a host lacks, with all that they need, for hosts without a way to the archive.

python packages.py SUITE KEYRING STATUS FOLDER NAME…      STATUS is the host's /var/lib/dpkg/status
Prints the names of the files in FOLDER. The archive is this machine's own, verified with KEYRING.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from saw.image.base import machine_mirrors


def main(suite: str, keyring: str, status: str, folder: str, *names: str) -> None:
    """Download into ``folder``."""
    place = Path(folder)
    for name in ("lists/partial", "archives/partial", "empty"):
        (place / name).mkdir(parents=True, exist_ok=True)
    mirrors = machine_mirrors()
    lines = [f"deb [signed-by={keyring}] {mirrors.archive} {suite} main"]
    if mirrors.security:
        lines.append(f"deb [signed-by={keyring}] {mirrors.security} {suite}-security main")
    (place / "sources.list").write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = {
        "Dir::Etc::SourceList": place / "sources.list",
        "Dir::Etc::SourceParts": place / "empty",
        "Dir::Etc::PreferencesParts": place / "empty",
        "Dir::State::Lists": place / "lists",
        "Dir::State::status": status,
        "Dir::Cache::archives": place / "archives",
        "Dir::Cache::pkgcache": "",
        "Dir::Cache::srcpkgcache": "",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "root",
        "Debug::NoLocking": "true",
    }
    apt = ["apt-get", "--quiet", "--yes", *(f"--option={name}={value}" for name, value in options.items())]
    subprocess.run([*apt, "update"], check=True, stdout=sys.stderr)
    subprocess.run([*apt, "install", "--download-only", *names], check=True, stdout=sys.stderr)
    print("\n".join(path.name for path in sorted((place / "archives").glob("*.deb"))))


if __name__ == "__main__":
    main(*sys.argv[1:])
