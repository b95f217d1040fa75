"""systemd units and directives that bound what the agent may use of the workspace; see :mod:`saw.runtime.limits`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from saw.runtime import limits
from saw.runtime.sandbox import SandboxError, SandboxSpec
from saw.runtime.unitfile import Properties, unit_text

CONTROL = Path("/run/systemd/system.control")
"""Where systemd keeps what ``set-property --runtime`` said (systemctl(1))."""
SCRATCH = "/run/saw/scratch"
"""Where the temporary directories of the agent's sandboxes are mounted; nobody but root passes."""


def scratch(owner: str) -> tuple[tuple[str, str], ...]:
    """Return where the temporary directories of ``owner`` (``shell``, ``agent-NAME``) are mounted, each with its place inside."""
    return ((f"{SCRATCH}/{owner}/tmp", "/tmp"), (f"{SCRATCH}/{owner}/var", "/var/tmp"))  # noqa: S108


def mount_name(path: str) -> str:
    """Return the name of the unit that mounts ``path`` (systemd.unit(5), of lower-case letters, digits, dashes and slashes)."""
    return f"{path[1:].replace('-', chr(92) + 'x2d').replace('/', '-')}.mount"


def bounded_properties(spec: SandboxSpec) -> Properties:
    """Return what holds a unit of the agent's to the limits.

    A process that is ended for want of memory does not take the unit with it: the others go on.
    """
    return [
        ("Slice", limits.SLICE),
        *limits.properties(spec.limits),
        ("OOMPolicy", "continue"),
        ("OOMScoreAdjust", str(limits.OOM_SCORE)),
        ("LimitNOFILE", str(dict(spec.limits.rlimits)["nofile"])),
    ]


def slice_unit(spec: SandboxSpec) -> str:
    """Return the slice that holds everything of the agent to the limits together."""
    return unit_text(
        {
            "Unit": [("Description", "Everything of the agent"), ("Before", "slices.target")],
            "Slice": limits.properties(spec.limits),
        }
    )


def slice_words(spec: SandboxSpec) -> list[str]:
    """Return the command that holds what already runs to the limits of ``spec``; a reload reads them, and sets none."""
    wanted = dict(limits.properties(spec.limits))
    wanted.setdefault("CPUQuota", "")
    return [
        "systemctl",
        "set-property",
        "--runtime",
        limits.SLICE,
        *(f"{name}={value}" for name, value in wanted.items()),
    ]


def hold_running(spec: SandboxSpec, *, control: Path = CONTROL) -> bool:
    """Hold what runs to the limits of ``spec``; tell whether anything does. Raises :class:`SandboxError`.

    Nothing is compared before: what systemd shows is what it has read, and not what the kernel was told. ``control`` is where
    systemd notes what it was told; the note is taken away however this ends, since the unit file says the same.
    """
    try:
        active = ["systemctl", "is-active", "--quiet", limits.SLICE]
        if subprocess.run(active, check=False, capture_output=True, timeout=60).returncode != 0:
            return False
        done = subprocess.run(slice_words(spec), capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"systemctl did not set the limits: {error}", cure="see `systemctl status`") from error
    finally:
        shutil.rmtree(control / f"{limits.SLICE}.d", ignore_errors=True)
    if done.returncode != 0:
        raise SandboxError(f"systemctl did not set the limits: {done.stderr.strip()[-300:]}", cure="see its journal")
    return True


def scratch_units(spec: SandboxSpec) -> dict[str, str]:
    """Return the units that mount what shell and agents write outside the home, by name.

    Their temporary directories, which the workspace's own file system would have to hold else, and the directory of the shell's
    sockets, which would be a part of ``/run``. They are mounted in the host's view, so that malware scans see what lies there,
    and are gone when the sandbox has ended.
    """
    owned = f"rw,nosuid,nodev,noexec,mode=0750,uid={spec.uid},gid={spec.gid},size=256K,nr_inodes=32"
    tmpfs = spec.limits.tmpfs(spec.limits.tmp_max)
    owners = ("shell", *(f"agent-{agent.name}" for agent in spec.agents))
    places = {"/run/saw/shell": owned, **{place: tmpfs for owner in owners for place, _ in scratch(owner)}}
    return {
        mount_name(path): unit_text(
            {
                "Unit": [
                    ("Description", f"What the agent's sandbox writes: {path}"),
                    ("DefaultDependencies", "no"),
                    ("Conflicts", "umount.target"),
                    ("Before", "umount.target"),
                    ("StopWhenUnneeded", "yes"),
                ],
                "Mount": [("What", "tmpfs"), ("Where", path), ("Type", "tmpfs"), ("Options", options)],
            }
        )
        for path, options in places.items()
    }
