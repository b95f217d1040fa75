"""systemd units and directives that bound what the agent may use of the workspace; see :mod:`saw.runtime.limits`."""

from __future__ import annotations

from saw.runtime import limits
from saw.runtime.sandbox import SandboxSpec
from saw.runtime.unitfile import Properties, unit_text

SCRATCH = (("/run/saw/scratch/tmp", "/tmp"), ("/run/saw/scratch/var", "/var/tmp"))  # noqa: S108
"""Where the temporary directories of the shell's sandbox are mounted, and their places inside."""


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


def scratch_units(spec: SandboxSpec) -> dict[str, str]:
    """Return the units that mount what the shell's sandbox writes outside the home, by name.

    Its temporary directories, which the workspace's own file system would have to hold else, and the directory of its sockets,
    which would be a part of ``/run``. They are mounted in the host's view, so that malware scans see what lies there, and are
    gone when the sandbox has ended.
    """
    owned = f"rw,nosuid,nodev,noexec,mode=0750,uid={spec.uid},gid={spec.gid},size=256K,nr_inodes=32"
    tmpfs = spec.limits.tmpfs(spec.limits.tmp_max)
    places = {"/run/saw/shell": owned, **{place: tmpfs for place, _ in SCRATCH}}
    return {
        f"{path[1:].replace('/', '-')}.mount": unit_text(
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
