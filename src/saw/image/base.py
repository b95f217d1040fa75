"""Base root trees from the distribution's packages (mmdebstrap), cached by what goes into them."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from saw.files import write_atomic
from saw.image.base_os import BaseOs
from saw.image.disk import ImageError, free_space_needed, run
from saw.image.packages import Archive, PackageSet, ask, compare, installed, pins, read_set, words, write_set
from saw.image.settle import ENVIRONMENT, EPOCH
from saw.image.variant import CPU, Variant

NEED_BYTES = 1024**3
"""Free space that making one tar takes at most: its tree and the tar itself."""
HELPERS = ("eatmydata", "libeatmydata1")
"""Packages that the installer fetches for its own use and that no tree has in the end."""
KEPT = 2
"""How many trees of one kind stay in the cache: the newest, and the one before it."""
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


def machine_mirrors(label: str = "Debian") -> Mirrors:
    """Read the mirrors out of this machine's apt configuration; raise :class:`ImageError` when there is none.

    ``label`` is that of the archive. Debian's security updates have an archive of their own; Ubuntu's lie in this one, too.
    """
    text = run("apt-get", "indextargets", "--format", "$(CREATED_BY)|$(LABEL)|$(REPO_URI)")
    found: dict[str, str] = {}
    for line in text.splitlines():
        kind, archive, uri = line.split("|", 2)
        if kind == "Packages":
            found.setdefault(archive, uri.rstrip("/"))
    if label not in found:
        raise ImageError(
            f"apt knows no {label} archive on this machine",
            cure=f"run apt-get update with a {label} mirror in sources.list",
        )
    return Mirrors(found[label], found.get(f"{label}-Security") if label == "Debian" else found[label])


def read_packages(listing: Path) -> list[str]:
    """Return the package names of a list file (one a line, # comments)."""
    lines = (line.partition("#")[0].strip() for line in listing.read_text(encoding="utf-8").splitlines())
    return sorted({line for line in lines if line})


def base_packages(listing: Path, variant: Variant = CPU, more: Path | None = None) -> list[str]:
    """Return the packages of ``listing``, of ``variant``, whose list lies below the same ``packer`` folder, and of ``more``."""
    named = read_packages(listing.parents[1] / variant.packages) if variant.packages else []
    return sorted({*read_packages(listing), *named, *(read_packages(more) if more else ())})


def base_kind(listing: Path, base: BaseOs, variant: Variant = CPU, more: Path | None = None) -> str:
    """Return what the names of all tars of ``listing`` begin with: they differ in the versions of packages alone."""
    own = [*variant.components, variant.setup] if variant.packages else []
    asked = [base.suite, str(EPOCH), FORGET, *EXCLUDED, *base_packages(listing, variant, more), *own]
    digest = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    name = listing.stem if variant.name == "cpu" else f"{listing.stem}-{variant.name}"
    return f"base-{name}-{digest[:16]}-"


def base_path(
    listing: Path, cache: Path, base: BaseOs, packages: PackageSet, variant: Variant = CPU, *, more: Path | None = None
) -> Path:
    """Return where the tar of ``listing`` with just these ``packages`` lies once it is made; named after its content."""
    return cache / f"{base_kind(listing, base, variant, more)}{packages.digest[:16]}.tar"


def known_bases(
    listing: Path, cache: Path, base: BaseOs, variant: Variant = CPU, more: Path | None = None
) -> list[PackageSet]:
    """Return the package sets of the tars of ``listing`` that are there, the newest first."""
    tars = sorted(
        cache.glob(f"{base_kind(listing, base, variant, more)}*.tar"), key=lambda tar: tar.stat().st_mtime, reverse=True
    )
    found = []
    for tar in tars:
        try:
            found.append(read_set(set_of(tar)))
        except ImageError:
            continue  # a tar without it was never finished
    return found


def set_of(tar: Path) -> Path:
    """Return where the package set of a tar lies."""
    return tar.with_suffix(".packages.json")


def archive_of(base: BaseOs, variant: Variant = CPU) -> Archive:
    """Return the sources of a base tree: those of this machine's mirrors, of the suite of ``base``."""
    if base.family != "debian":
        raise ImageError(
            f"no base tree of the family {base.family} is made here: its packages are not Debian's",
            cure="take another system (docs/images.md), or apply the roles to a host of it",
        )
    mirrors, suite = machine_mirrors(base.archive), base.suite
    signed, parts = f"[signed-by={base.keyring}]", " ".join((base.components, *variant.components))
    sources = [f"deb {signed} {mirrors.archive} {name} {parts}" for name in (suite, f"{suite}-updates")]
    if mirrors.security:
        sources.append(f"deb {signed} {mirrors.security} {suite}-security {parts}")
    return Archive(tuple(sources), suite)


def ask_base(
    listing: Path, cache: Path, base: BaseOs, variant: Variant = CPU, more: Path | None = None, **limits: float
) -> PackageSet:
    """Ask the archive what a tree of ``listing`` would have now; see :func:`saw.image.packages.ask`."""
    return ask(archive_of(base, variant), base, base_packages(listing, variant, more), cache, **limits)


def base_tar(
    listing: Path, cache: Path, base: BaseOs, packages: PackageSet, variant: Variant = CPU, *, more: Path | None = None
) -> Path:
    """Return the tar of a minimal tree of ``base`` with ``packages``, those of ``listing``, ``variant`` and ``more``; cached.

    The installer is held to the versions of ``packages``, and what it installed is compared with them. An interrupted run
    leaves nothing that looks finished. Takes 25–40 s on two cores with a near mirror.
    """
    names, suite = base_packages(listing, variant, more), base.suite
    target = base_path(listing, cache, base, packages, variant, more=more)
    if target.exists():
        return target
    if shutil.which("mmdebstrap") is None:
        raise ImageError("mmdebstrap is not installed", cure="run `make workspace`, which installs it")
    free_space_needed(cache, NEED_BYTES)
    sources = archive_of(base, variant).sources
    temporary = cache / f".{target.name}.partial"
    temporary.unlink(missing_ok=True)
    log = cache / f"{target.name}.log"
    # The tree is laid out below the build directory: there its space is known to be free, and what a killed run leaves is
    # found. The installer's own unprivileged user must get in. What it mounts in the tree goes with its mount namespace.
    scratch = Path(tempfile.mkdtemp(prefix=".mmdebstrap-", dir=cache))
    try:
        scratch.chmod(0o755)
        sources_file, pins_file = scratch / "sources.list", scratch / "pins"
        write_atomic(sources_file, "\n".join(sources) + "\n")
        write_atomic(pins_file, pins(packages, HELPERS))
        held = '"$1"/etc/apt/preferences.d/saw-image'
        command = [
            "unshare", "--mount", "--propagation", "private", "mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar",
            "--hook-dir=/usr/share/mmdebstrap/hooks/eatmydata", "--dpkgopt=force-unsafe-io",
            '--aptopt=APT::Install-Recommends "false"', *(f"--dpkgopt=path-exclude={path}" for path in EXCLUDED),
            f'--setup-hook=mkdir -p "$1"/etc/apt/preferences.d && cp {shlex.quote(str(pins_file))} {held}',
            *([f"--setup-hook={variant.setup}"] if variant.setup else []),
            f"--customize-hook=rm {held}",
            f"--customize-hook={FORGET}",
            f"--include={','.join(names)}", suite, str(temporary), str(sources_file),
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
        raise ImageError(
            f"mmdebstrap failed: {tail}",
            cure=f"read {log}; check the mirror and the free disk space; if it has other versions by now: FRESH=1",
        )
    differs = compare(packages, PackageSet(suite, packages.asked, packages.index, packages_in(temporary)))
    if differs:
        temporary.unlink(missing_ok=True)
        raise ImageError(f"{target.name} has other packages than it should: {words(differs)}", cure=f"read {log}")
    write_set(set_of(target), packages)
    os.replace(temporary, target)
    _forget(target, target.name.removesuffix(f"{packages.digest[:16]}.tar"))
    return target


def packages_in(tar: Path) -> dict[str, str]:
    """Return what the dpkg database in ``tar`` says is installed; raises :class:`ImageError` when there is none."""
    try:
        with tarfile.open(tar) as stream:
            for member in stream:
                if member.name.removeprefix("./") == "var/lib/dpkg/status":
                    content = stream.extractfile(member)
                    found = installed(content.read().decode()) if content else {}
                    if found:
                        return found
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise ImageError(f"{tar} cannot be read: {error}", cure="look at the disk, then run it again") from error
    raise ImageError(f"{tar} has no package in a dpkg database", cure="look at the disk, then run it again")


def _forget(target: Path, kind: str) -> None:
    """Remove all but the newest tars of a kind from the cache; one can be made again while the archive has its packages."""
    others = [tar for tar in target.parent.glob(f"{kind}*.tar") if tar != target]
    for tar in sorted(others, key=lambda one: one.stat().st_mtime, reverse=True)[KEPT - 1 :]:
        for path in (tar, set_of(tar), tar.with_name(f"{tar.name}.log")):
            path.unlink(missing_ok=True)
