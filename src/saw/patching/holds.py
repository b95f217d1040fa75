"""Held packages: apt holds what the configuration names, each with an owner, a reason and an end, and nothing else is held."""

from __future__ import annotations

import subprocess
from datetime import date
from typing import Literal

import msgspec

from saw.edr.store import Store
from saw.errors import ConfigError
from saw.patching.apt import AptState, PatchError
from saw.patching.config import PatchConfig

_COMMAND_S = 120
_AREA = "holds"


class Held(msgspec.Struct, frozen=True):
    """A held package.

    ``state`` is ``held``, ``expired`` (its end passed; it stays held), ``not_held`` (apt does not hold it), ``absent`` (not
    installed) or ``unexplained`` (held, and not in the configuration).
    """

    package: str
    state: Literal["held", "expired", "not_held", "absent", "unexplained"]
    owner: str = ""
    reason: str = ""
    until: str = ""


def held_of(config: PatchConfig, apt: AptState, today: date) -> tuple[Held, ...]:
    """Return every hold, of the configuration and of apt."""
    installed = {bare(one.package) for one in apt.installed}
    held = {bare(name) for name in apt.held}
    found: list[Held] = []
    for hold in config.holds:
        state: Literal["held", "expired", "not_held", "absent"] = "held"
        if hold.over(today):
            state = "expired"
        elif hold.package not in installed:
            state = "absent"
        elif hold.package not in held:
            state = "not_held"
        found.append(Held(hold.package, state, hold.owner, hold.reason, hold.until.isoformat()))
    known = {hold.package for hold in config.holds}
    found += [Held(name, "unexplained") for name in sorted(held - known)]
    return tuple(found)


def refuse_expired(config: PatchConfig, today: date) -> None:
    """Raise :class:`ConfigError` when a hold is past its end."""
    for hold in config.holds:
        if hold.over(today):
            raise ConfigError(
                f"the hold of {hold.package} ({hold.owner}: {hold.reason}) ran out on {hold.until}",
                cure="upgrade the package and take the hold out, or let its owner set a new end",
            )


def apply_holds(config: PatchConfig, apt: AptState, store: Store, *, dry: bool = False) -> list[str]:
    """Make apt hold what the configuration names, and let go of what it named before; return what changes, in words.

    Holds of others are left alone. One past its end stays held: nothing is upgraded by surprise, and ``saw patch status`` is red.
    """
    installed = {bare(one.package) for one in apt.installed}
    held = {bare(name) for name in apt.held}
    wanted = {hold.package for hold in config.holds}
    ours = set(store.known(_AREA))
    hold = sorted((wanted & installed) - held)
    release = sorted((ours - wanted) & held)
    if not dry:
        for verb, names in (("hold", hold), ("unhold", release)):
            if names:
                _mark(verb, names)
        marks: dict[str, str | None] = dict.fromkeys(ours - wanted)
        marks |= dict.fromkeys(wanted, "ours")
        if set(store.known(_AREA)) != wanted:
            store.keep({_AREA: marks})
    return [f"hold {name}" for name in hold] + [f"release {name}" for name in release]


def bare(name: str) -> str:
    """Return the name of a package without its architecture."""
    return name.partition(":")[0]


def _mark(verb: str, names: list[str]) -> None:
    try:
        done = subprocess.run(
            ["apt-mark", verb, *names], capture_output=True, text=True, timeout=_COMMAND_S, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PatchError(f"apt-mark {verb}: {error}", cure="look at /var/lib/dpkg and its locks") from error
    if done.returncode != 0:
        words = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise PatchError(f"apt-mark {verb} {' '.join(names)} failed: {words}", cure="look at `apt-get check`")


__all__ = ["Held", "apply_holds", "bare", "held_of", "refuse_expired"]
