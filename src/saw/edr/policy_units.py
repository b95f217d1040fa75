"""Units that a workspace makes of its policy: an explanation for a new one and no proof; root can write a generation too."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from saw.errors import SawError

GENERATION = Path("/run/saw/generations/current")
UNITS = Path("/run/systemd/system")
IN_FORCE = "saw (policy in force)"
"""What stands in a finding where the name of a package would."""


def policy_units_of(
    paths: Iterable[str], *, generation: Path = GENERATION, units: Path = UNITS, **account: object
) -> dict[str, str]:
    """Return path → :data:`IN_FORCE` for those of ``paths`` that are exactly what the loaded generation makes of them.

    On a host that is no workspace, or while no generation is loaded, that is none. ``account`` goes to
    :func:`saw.runtime.sandbox.load_spec`.
    """
    placed = [Path(path) for path in paths if Path(path).parent == units]
    if not placed or not generation.exists():
        return {}
    # They bring the policy's loader, which other hosts do not need.
    from saw.runtime.sandbox import load_spec
    from saw.runtime.sandbox_units import compile_units

    try:
        wanted = compile_units(load_spec(generation, **account))
    except SawError:
        return {}
    found: dict[str, str] = {}
    for path in placed:
        try:
            same = path.name in wanted and path.read_bytes() == wanted[path.name].encode()
        except OSError:
            continue
        if same:
            found[str(path)] = IN_FORCE
    return found


__all__ = ["IN_FORCE", "policy_units_of"]
