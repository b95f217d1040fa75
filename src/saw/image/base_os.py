"""What depends on the base operating system of an image: one Packer variable file for each (``packer/pkrvars``).

Packer takes the file as it is. This module reads the same file for what is done before Packer runs, so it accepts only what
both read alike: comments, and lines ``name = "text"`` without escapes or interpolation.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from saw.image.disk import ImageError

DEFAULT = "debian-13"
_LINE = re.compile(r'([a-z_]+)\s*=\s*"([^"\\$%]+)"')


class BaseOs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values of one base system: suite, archive keyring on the controller, package list below ``packer``, interpreter."""

    suite: str
    keyring: str
    packages: str
    python_interpreter: str
    family: Literal["debian", "redhat"] = "debian"
    archive: str = "Debian"
    """Label of its archive in apt's Release files; security updates have it too, or a label of their own with ``-Security``."""
    components: str = "main"
    """Components of the archive, with blanks between."""
    runtime_python: str = "3.13"
    """Version of the Python that ``/opt/saw`` is built with there."""


def variable_file(repository: Path, name: str = DEFAULT) -> Path:
    """Return the Packer variable file of the base system ``name``."""
    return repository / f"packer/pkrvars/{name}.pkrvars.hcl"


def base_os(repository: Path, name: str = DEFAULT) -> BaseOs:
    """Read the base system ``name``; raise :class:`ImageError` when it is unknown or has a line that is read in two ways."""
    path = variable_file(repository, name)
    values: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        known = ", ".join(
            sorted(found.name.removesuffix(".pkrvars.hcl") for found in path.parent.glob("*.pkrvars.hcl"))
        )
        raise ImageError(f"there is no base system {name}", cure=f"take one of: {known or 'none'}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found or found[1] in values:
            raise ImageError(f'{path}:{number} is not one new line of the form name = "text"', cure="correct that line")
        values[found[1]] = found[2]
    try:
        return msgspec.convert(values, BaseOs)
    except msgspec.ValidationError as error:
        raise ImageError(f"{path}: {error}", cure="correct that file") from error
