"""The offline wheelhouse of ``/opt/saw``: every wheel that a host needs, locked by hash, our own included."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from saw.files import write_atomic
from saw.image.disk import ImageError, digest_of, run
from saw.image.settle import ENVIRONMENT

PYTHON = "3.13"
_MARKER = re.compile(r" ; python_(?:full_)?version (<|>=) '(\d+\.\d+)'(?= *\\?$)")
PLATFORMS = ("2_34", "2_31", "2_28", "2_17")


def uv() -> str:
    """Return the ``uv`` program next to this interpreter, or the one on PATH."""
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise ImageError("uv is not installed", cure="run `make workspace`, which installs it into the environment")
    return found


def third_party(repository: Path, cache: Path, group: str | None = None, python: str = PYTHON) -> Path:
    """Download the locked runtime dependencies for ``python`` once per lock content; return their directory.

    ``group`` is a dependency group that is wanted besides, such as ``controller`` with what runs playbooks.
    """
    more = [] if group is None else ["--group", group]
    requirements = run(
        uv(), "export", "--quiet", "--frozen", "--no-dev", "--no-emit-project", "--no-header", "--no-annotate",
        "--directory", str(repository), *more,
    )  # fmt: skip
    requirements = for_python(requirements, python)
    told = requirements if python == PYTHON else f"{python}\n{requirements}"
    digest = hashlib.sha256(told.encode()).hexdigest()
    target = cache / f"wheels-{digest[:16]}"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(prefix=".wheels-", dir=cache) as scratch:
        work = Path(scratch, "wheels")
        work.mkdir()
        listing = work / "requirements.txt"
        listing.write_text(requirements, encoding="utf-8")
        platforms = [option for name in PLATFORMS for option in ("--platform", f"manylinux_{name}_x86_64")]
        run(
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--require-hashes", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
            *platforms, "-d", str(work), "-r", str(listing),
        )  # fmt: skip
        os.replace(work, target)
    return target


def for_python(requirements: str, python: str = PYTHON) -> str:
    """Return the requirements without those of other Python versions, and without the marker of those that stay.

    pip judges markers (PEP 508) by the Python that it runs with, and that is not the hosts' one when it downloads.
    """
    kept, keep = [], True
    for line in requirements.splitlines(keepends=True):
        marker = _MARKER.search(line)
        if not line.startswith((" ", "\t")):
            mine, other = (tuple(map(int, text.split("."))) for text in (python, marker[2] if marker else python))
            keep = marker is None or (mine < other if marker[1] == "<" else mine >= other)
        if keep:
            kept.append(_MARKER.sub("", line))
    return "".join(kept)


def wheelhouse(repository: Path, cache: Path, group: str | None = None, python: str = PYTHON) -> Path:
    """Return a directory with all wheels and a ``requirements.txt`` that names each by hash; named after its content.

    The hosts' interpreter is ``python``.
    """
    cache.mkdir(parents=True, exist_ok=True)
    source = third_party(repository, cache, group, python)
    with tempfile.TemporaryDirectory(prefix=".own-", dir=cache) as scratch:
        run(uv(), "build", "--quiet", "--wheel", "--out-dir", scratch, str(repository), env=ENVIRONMENT)
        wheel = next(Path(scratch).glob("*.whl"))
        own = digest_of(wheel)
        listing = (source / "requirements.txt").read_text(encoding="utf-8")
        name, version = wheel.name.split("-")[:2]
        listing += f"{name.replace('_', '-')}=={version} --hash=sha256:{own}\n"
        told = listing if python == PYTHON else f"{python}\n{listing}"
        target = cache / f"wheelhouse-{hashlib.sha256(told.encode()).hexdigest()[:16]}"
        if target.exists():
            return target
        work = Path(scratch, "wheelhouse")
        work.mkdir()
        for path in source.glob("*.whl"):
            os.link(path, work / path.name)
        shutil.copyfile(wheel, work / wheel.name)
        write_atomic(work / "requirements.txt", listing)
        os.replace(work, target)
    for old in sorted(cache.glob("wheelhouse-*"), key=lambda path: path.stat().st_mtime)[:-3]:
        shutil.rmtree(old, ignore_errors=True)
    return target
