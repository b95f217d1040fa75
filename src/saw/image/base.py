"""Base root trees from the distribution's packages (mmdebstrap), cached by what goes into them."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from saw.files import write_atomic
from saw.image.base_os import BaseOs
from saw.image.disk import ImageError, free_space_needed, run
from saw.image.settle import ENVIRONMENT, EPOCH
from saw.image.variant import CPU, Variant

NEED_BYTES = 1024**3
"""Free space that making one tar takes at most: its tree and the tar itself."""
EXCLUDED = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
FORGET = (
    'cd "$1" && rm -f etc/ssh/ssh_host_* etc/machine-id var/lib/dbus/machine-id etc/hostname var/cache/ldconfig/aux-cache && '
    "rm -f etc/resolv.conf && : > etc/resolv.conf"
)
"""Shell command on a finished tree: no identity, and neither name nor resolver of the machine that made it, which the installer
copies in."""


@dataclass(frozen=True)
class Mirrors:
    """Where this machine's own apt takes Debian and its security updates from."""

    archive: str
    security: str | None


def machine_mirrors() -> Mirrors:
    """Read the mirrors out of this machine's apt configuration; raise :class:`ImageError` when there is none."""
    text = run("apt-get", "indextargets", "--format", "$(CREATED_BY)|$(LABEL)|$(REPO_URI)")
    found: dict[str, str] = {}
    for line in text.splitlines():
        kind, label, uri = line.split("|", 2)
        if kind == "Packages":
            found.setdefault(label, uri.rstrip("/"))
    if "Debian" not in found:
        raise ImageError(
            "apt knows no Debian archive on this machine",
            cure="run apt-get update with a Debian mirror in sources.list",
        )
    return Mirrors(found["Debian"], found.get("Debian-Security"))


def read_packages(listing: Path) -> list[str]:
    """Return the package names of a list file (one a line, # comments)."""
    lines = (line.partition("#")[0].strip() for line in listing.read_text(encoding="utf-8").splitlines())
    return sorted({line for line in lines if line})


def base_packages(listing: Path, variant: Variant = CPU, more: Path | None = None) -> list[str]:
    """Return the packages of ``listing``, of ``variant``, whose list lies below the same ``packer`` folder, and of ``more``."""
    named = read_packages(listing.parents[1] / variant.packages) if variant.packages else []
    return sorted({*read_packages(listing), *named, *(read_packages(more) if more else ())})


def base_path(listing: Path, cache: Path, base: BaseOs, variant: Variant = CPU, more: Path | None = None) -> Path:
    """Return where the tar of ``listing`` lies once it is made; named after its content."""
    own = [*variant.components, variant.setup] if variant.packages else []
    words = [base.suite, str(EPOCH), FORGET, *EXCLUDED, *base_packages(listing, variant, more), *own]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()
    name = listing.stem if variant.name == "cpu" else f"{listing.stem}-{variant.name}"
    return cache / f"base-{name}-{digest[:16]}.tar"


def base_tar(listing: Path, cache: Path, base: BaseOs, variant: Variant = CPU, more: Path | None = None) -> Path:
    """Return the tar of a minimal tree of ``base`` with the packages of ``listing``, ``variant`` and ``more``; made once, cached.

    An interrupted run leaves nothing that looks finished. Takes 25–40 s on two cores with a near mirror.
    """
    packages, suite = base_packages(listing, variant, more), base.suite
    target = base_path(listing, cache, base, variant, more)
    if target.exists():
        return target
    if shutil.which("mmdebstrap") is None:
        raise ImageError("mmdebstrap is not installed", cure="run `make workspace`, which installs it")
    free_space_needed(cache, NEED_BYTES)
    mirrors = machine_mirrors()
    signed, parts = f"[signed-by={base.keyring}]", " ".join(("main", *variant.components))
    sources = [f"deb {signed} {mirrors.archive} {name} {parts}" for name in (suite, f"{suite}-updates")]
    if mirrors.security:
        sources.append(f"deb {signed} {mirrors.security} {suite}-security {parts}")
    temporary = cache / f".{target.name}.partial"
    log = cache / f"{target.name}.log"
    # The tree is laid out below the build directory: there its space is known to be free, and what a killed run leaves is
    # found. The installer's own unprivileged user must get in. What it mounts in the tree goes with its mount namespace.
    scratch = Path(tempfile.mkdtemp(prefix=".mmdebstrap-", dir=cache))
    try:
        scratch.chmod(0o755)
        sources_file = scratch / "sources.list"
        write_atomic(sources_file, "\n".join(sources) + "\n")
        command = [
            "unshare", "--mount", "--propagation", "private", "mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar",
            "--hook-dir=/usr/share/mmdebstrap/hooks/eatmydata", "--dpkgopt=force-unsafe-io",
            '--aptopt=APT::Install-Recommends "false"', *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED),
            *([f"--setup-hook={variant.setup}"] if variant.setup else []),
            f"--customize-hook={FORGET}",
            f"--include={','.join(packages)}", suite, str(temporary), str(sources_file),
        ]  # fmt: skip
        with log.open("wb") as stream:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, check=False,
                env={**os.environ, **ENVIRONMENT, "TMPDIR": str(scratch)},
            )  # fmt: skip
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # what cannot go now is removed by the next run
    if done.returncode:
        temporary.unlink(missing_ok=True)
        tail = log.read_text(encoding="utf-8", errors="replace").strip()[-800:]
        raise ImageError(f"mmdebstrap failed: {tail}", cure=f"read {log}; check the mirror and the free disk space")
    os.replace(temporary, target)
    return target
