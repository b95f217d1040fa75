"""Whether the host needs a restart, and whether it may restart now."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from saw.patching.apt import PatchError
from saw.patching.config import PatchConfig

Livepatch = Literal["none", "applied", "in_transition"]
_COMMAND_S = 60
#: What packages of the kernel are called; an upgrade of anything else that asks for a restart is not covered by a live patch.
_KERNEL = ("linux-", "intel-microcode", "amd64-microcode")


class RebootRefused(PatchError):
    """The host needs a restart, and may not restart now."""

    code = "reboot_refused"


class Need(msgspec.Struct, frozen=True):
    """Why the host needs a restart; ``reasons`` is empty when it does not.

    ``livepatch`` is what the kernel says of its live patches. ``urgent`` is false while the kernel is the only
    reason and a live patch is applied to it. ``since`` is when the need came up.
    """

    reasons: tuple[str, ...]
    livepatch: Livepatch
    urgent: bool
    since: datetime | None


class Decision(msgspec.Struct, frozen=True):
    """Whether a restart is needed, and every reason why it may not be now."""

    needed: bool
    refusals: tuple[str, ...]

    @property
    def allowed(self) -> bool:
        """Whether to restart now."""
        return self.needed and not self.refusals


def need_of(config: PatchConfig, kernels: tuple[str, ...], running: str) -> Need:
    """Look whether a restart is needed. ``kernels`` are the installed ones, oldest first; ``running`` is empty in a container."""
    reasons: list[str] = []
    since: list[float] = []
    others = False
    flag = Path(config.reboot_required)
    if flag.exists():
        packages = _lines(flag.with_name(flag.name + ".pkgs"))
        named = sorted(set(packages))
        others = not named or any(not name.startswith(_KERNEL) for name in named)
        reasons.append(f"packages ask for it: {', '.join(named)}" if named else f"{flag} is there")
        since.append(flag.stat().st_mtime)
    if running and kernels and kernels[-1] != running:
        reasons.append(f"the kernel {running} runs, and {kernels[-1]} is installed")
        since.append((Path(config.boot_dir) / f"vmlinuz-{kernels[-1]}").stat().st_mtime)
    livepatch = livepatch_of(Path(config.livepatch_dir))
    return Need(
        tuple(reasons),
        livepatch,
        bool(reasons) and (others or livepatch != "applied"),
        datetime.fromtimestamp(min(since), UTC) if since else None,
    )


def livepatch_of(folder: Path) -> Livepatch:
    """Return what the kernel says below /sys/kernel/livepatch (Linux, ABI/testing/sysfs-kernel-livepatch)."""
    states = [(_word(one / "enabled"), _word(one / "transition")) for one in sorted(folder.glob("*")) if one.is_dir()]
    if any(transition != "0" for _, transition in states):
        return "in_transition"
    return "applied" if any(enabled == "1" for enabled, _ in states) else "none"


def running_kernel() -> str:
    """Return the release of the running kernel, empty in a container, which has none of its own."""
    return "" if Path("/run/systemd/container").exists() else os.uname().release


def busy_units(config: PatchConfig) -> list[str]:
    """Return the units that keep the host from restarting; raises :class:`PatchError` when systemd does not say."""
    if not config.reboot.busy:
        return []
    command = [
        "systemctl", "list-units", "--plain", "--no-legend", "--no-pager", "--full",
        "--state=active,activating,reloading,deactivating", *config.reboot.busy,
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_COMMAND_S, check=False, stdin=subprocess.DEVNULL
        )
        words = done.stderr.strip() or f"ended with {done.returncode}"
        failed = done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        words, failed = str(error), True
    if failed:
        raise PatchError(f"systemd does not say what runs: {words}", cure="look at `systemctl list-units`")
    return [line.split()[0] for line in done.stdout.splitlines() if line.split()]


def decide(
    config: PatchConfig, need: Need, now: datetime, busy: list[str], *, any_time: bool = False, regardless: bool = False
) -> Decision:
    """Decide about a restart at ``now`` (UTC). ``any_time``: without a window; ``regardless``: although something is busy."""
    refusals: list[str] = []
    window = config.reboot.window
    if not any_time and window is None:
        refusals.append("there is no reboot window")
    elif not any_time and window is not None and not window.holds(now):
        refusals.append(f"it is outside the reboot window, which begins at {window.following(now):%Y-%m-%d %H:%M} UTC")
    if busy and not regardless:
        refusals.append(f"an engagement would be cut off: {', '.join(busy)} runs")
    return Decision(bool(need.reasons), tuple(refusals))


@contextmanager
def no_upgrade(path: Path) -> Iterator[bool]:
    """Hold dpkg's frontend lock; yields False when somebody else has it, that is, while packages are being changed."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise PatchError(f"cannot open {path}: {error.strerror}", cure="run this as root") from error
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return "unreadable"


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return [line.strip() for line in text.splitlines() if line.strip()]


__all__ = [
    "Decision",
    "Need",
    "RebootRefused",
    "busy_units",
    "decide",
    "livepatch_of",
    "need_of",
    "no_upgrade",
    "running_kernel",
]
