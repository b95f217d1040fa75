"""One run: fetch the lists, let unattended-upgrades install what the list of sources offers, and look what came of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import datetime

import msgspec

from saw.edr.store import Store, iso
from saw.patching.apt import PatchError, probe, unlisted_sources, unsigned_sources
from saw.patching.config import PatchConfig
from saw.patching.holds import apply_holds
from saw.patching.status import FAILED, FETCHED, SUCCEEDED, Pending, pending_of, remember

#: Fetching fails as a whole when one source fails: half the lists say nothing of what is pending.
_UPDATE = ("apt-get", "--quiet=2", "--option=APT::Update::Error-Mode=any", "--option=DPkg::Lock::Timeout=300", "update")
_UPGRADE = ("unattended-upgrade",)
_LAST_WORDS = 300


class RunRefused(PatchError):
    """Nothing is installed, since it could come from the wrong place."""

    code = "patching_refused"


class RunFailed(PatchError):
    """A step of the run failed."""

    code = "patching_run_failed"


class Done(msgspec.Struct, frozen=True):
    """What a run did: ``installed`` are the updates, ``left`` those of listed sources that are neither installed nor held."""

    installed: tuple[Pending, ...]
    held: tuple[Pending, ...]
    left: tuple[Pending, ...]


def run(config: PatchConfig, store: Store, now: Callable[[], datetime]) -> Done:
    """Do it. Refuses unsigned sources and an engine with other sources than the list; what failed is noted for the status."""
    try:
        done = _run(config, store, now)
    except PatchError as error:
        store.notes({FAILED: str(error)})
        raise
    failed = ""
    if done.left:
        failed = f"{', '.join(one.package for one in done.left)} could not be upgraded (/var/log/unattended-upgrades)"
    store.notes({FAILED: failed, **({} if failed else {SUCCEEDED: iso(now())})})
    return done


def _run(config: PatchConfig, store: Store, now: Callable[[], datetime]) -> Done:
    if not config.engine:
        raise RunRefused(
            "updates are not installed on this host", cure="set patching_updates for it, or rebuild it on a newer image"
        )
    first = probe(config)
    wrong = [*unsigned_sources(config, first), *unlisted_sources(config, first.engine)]
    if wrong:
        raise RunRefused("; ".join(wrong), cure="correct /etc/apt, or run the role patching (docs/patching.md)")
    apply_holds(config, first, store)
    _step(_UPDATE)
    store.notes({FETCHED: iso(now())})
    before = pending_of(config, probe(config), store, now())
    remember(before, store)
    _step(_UPGRADE)
    after = pending_of(config, probe(config), store, now())
    remember(after, store)
    still = {one.package for one in after if one.listed}
    return Done(
        tuple(one for one in before if one.listed and one.package not in still),
        tuple(one for one in after if one.listed and one.held),
        tuple(one for one in after if one.listed and not one.held),
    )


def _step(command: tuple[str, ...]) -> None:
    # No time limit: to kill dpkg half-way is worse than a long run.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL,
            env=environment,
        )  # fmt: skip
    except OSError as error:
        raise RunFailed(f"{command[0]}: {error.strerror}", cure=f"install the package that has {command[0]}") from error
    if done.returncode != 0:
        words = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        words = [line for line in words if line.startswith("E:")] or words
        said = " ".join((words or ["no reason given"])[-3:])[-_LAST_WORDS:]
        raise RunFailed(
            f"{command[0]} ended with {done.returncode}: {said}",
            cure="look at /var/log/unattended-upgrades and at `apt-get check`",
        )


__all__ = ["Done", "RunFailed", "RunRefused", "run"]
