"""``saw-exec``: confine this process as a launch file says, then execute a command in its place.

Used as ``python -I -m saw.runtime.launcher --launch FILE -- COMMAND…`` in every sandbox unit. The launch file is JSON,
written by root and readable by the sandbox (see :class:`Launch`). Order: identity, descriptors, limits, Landlock,
system call filter, execute. Any failure ends the process before the command runs (exit 125, reason on stderr);
a command that cannot be executed ends with 126 or 127. Only the standard library is imported: the start is on the path of every
long-lived unit.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saw.errors import SawError
from saw.runtime import landlock, seccomp

EXIT_NOT_CONFINED = 125
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127


class LaunchError(SawError):
    """The launch file or the process's own state does not allow a confined start."""

    code = "launch_refused"


@dataclass(frozen=True)
class Launch:
    """The content of a launch file.

    ``uid``: who must be running; ``minimum_abi``: Landlock ABI below which the start is refused (0 = best effort);
    ``rlimits``: name such as ``nofile`` to the hard and soft limit; ``environment`` is added to (and wins over) what is
    inherited, ``clear_environment`` names that are removed first; ``workdir`` is entered when it exists.
    """

    uid: int
    minimum_abi: int
    read_only: tuple[str, ...]
    read_write: tuple[str, ...]
    devices: tuple[str, ...] = ()
    connect_ports: tuple[int, ...] = ()
    rlimits: dict[str, int] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"

    @staticmethod
    def read(path: str) -> Launch:
        """Read a launch file; raise :class:`LaunchError` on anything unexpected."""
        try:
            value: dict[str, Any] = json.loads(Path(path).read_bytes())
            lists: dict[str, Any] = {
                name: tuple(value.pop(name, ())) for name in ("read_only", "read_write", "devices", "connect_ports")
            }
            return Launch(**lists, **value)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise LaunchError(
                f"{path} is not a usable launch file: {error}", cure="run `saw sandbox prepare`"
            ) from None


def confine(launch: Launch) -> int:
    """Bring the calling process into the sandbox of ``launch``; return the Landlock ABI in force.

    Raises :class:`LaunchError` (wrong user or still privileged), ``LandlockError`` or ``SeccompError``.
    """
    if os.getresuid() != (launch.uid,) * 3:
        raise LaunchError(f"started as uid {os.getuid()}, must be {launch.uid}", cure="start the unit as its User=")
    if launch.uid == 0:
        raise LaunchError("the sandbox never runs as root", cure="set process.run_as_user in policy.yaml")
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    for name, limit in launch.rlimits.items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}", None)
        if kind is None:
            raise LaunchError(f"there is no resource limit {name!r}", cure="correct the launch file")
        hard = resource.getrlimit(kind)[1]
        bounded = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (bounded, bounded))
    rules = landlock.Confinement(launch.read_only, launch.read_write, launch.devices, launch.connect_ports)
    version = landlock.confine(rules, minimum=launch.minimum_abi)
    seccomp.install(seccomp.build_filter())
    return version


def main(argv: list[str]) -> int:
    """Confine and execute; return an exit code only when the command could not be started."""
    if len(argv) < 4 or argv[0] != "--launch" or argv[2] != "--":
        print("usage: saw.runtime.launcher --launch FILE -- COMMAND…", file=sys.stderr)
        return 2
    command = argv[3:]
    try:
        launch = Launch.read(argv[1])
        environment = {**os.environ, **launch.environment}
        confine(launch)
    except SawError as error:
        print(f"saw-exec: {error}", file=sys.stderr)
        return EXIT_NOT_CONFINED
    try:
        os.chdir(launch.workdir)
    except OSError:
        os.chdir("/")
    try:
        os.execvpe(command[0], command, environment)  # noqa: S606
    except FileNotFoundError:
        print(f"saw-exec: {command[0]}: not found", file=sys.stderr)
        return EXIT_NOT_FOUND
    except OSError as error:
        print(f"saw-exec: {command[0]}: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_EXECUTABLE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
