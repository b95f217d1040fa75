"""Make the host ready for a compiled sandbox: directories, protected places in the home, launch files, command shims."""

from __future__ import annotations

import os
import pwd
import py_compile
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from saw.files import write_atomic
from saw.runtime.limits import SLICE
from saw.runtime.sandbox import (
    LAUNCH_DIRECTORY,
    RuntimePaths,
    SandboxError,
    SandboxSpec,
)
from saw.runtime.sandbox_bounds import SCRATCH, hold_running, slice_unit
from saw.runtime.sandbox_home import PLACED, make_below_home, place_files, protect_home
from saw.runtime.sandbox_units import MEDIATOR_USER, compile_launch_files, compile_units
from saw.runtime.unitfile import MARK

SHIMS = {"saw-run": "shell_client.py", "saw-mcp-connect": "mcp_connect.py", "saw-postgres": "pg_connect.py"}


def bound(spec: SandboxSpec, *, unit_directory: str) -> list[str]:
    """Write the slice of everything of the agent and hold what runs to it, whether or not it changed; return what changed.

    It comes first, so that nothing that fails later, such as what the agent did to its home, keeps wider limits in force.
    """
    changed = _write_changed(unit_directory, {SLICE: slice_unit(spec).encode()})
    hold_running(spec)
    return changed


def prepare(
    spec: SandboxSpec,
    *,
    launch_directory: str = LAUNCH_DIRECTORY,
    unit_directory: str | None = None,
    placed: Path = PLACED,
) -> list[str]:
    """Write launch files (and units, when a directory is given) and create what they bind; return what changed.

    ``placed`` is the list of the files that the bundle before laid down. Runs as root. Raises :class:`SandboxError` when a place
    in the home directory is not what it must be.
    """
    changed: list[str] = []
    for path in (launch_directory, "/run/saw/shell", "/run/saw/mcp", "/run/saw/mcp-server"):
        Path(path).mkdir(mode=0o755, parents=True, exist_ok=True)
    # Nobody but root passes: what lies there is the agent's, and is mounted into its sandbox.
    Path(SCRATCH).mkdir(mode=0o700, exist_ok=True)
    Path(SCRATCH).chmod(0o700)
    os.chown("/run/saw/shell", spec.uid, spec.gid)
    if spec.mcp_servers:
        os.chown("/run/saw/mcp", _uid(MEDIATOR_USER), spec.gid)
    changed += _write_changed(launch_directory, compile_launch_files(spec))
    if unit_directory is not None:
        changed += _write_changed(unit_directory, {name: text.encode() for name, text in compile_units(spec).items()})
    for path in spec.read_write:
        if path.startswith(spec.home) and not Path(path).exists():
            make_below_home(spec, path)
            changed.append(path)
    return changed + protect_home(spec) + place_files(spec, placed)


def retire(
    spec: SandboxSpec,
    stop: Callable[[list[str]], None],
    *,
    launch_directory: str = LAUNCH_DIRECTORY,
    unit_directory: str,
) -> list[str]:
    """Stop and remove what is left of MCP servers and agents that the policy has no longer; return what was removed.

    An agent that the policy has otherwise than before is stopped, too: it would run on as it was started, for ever. Only
    files that :func:`prepare` wrote are touched. ``stop`` gets the names of units, patterns of instances among them, and raises
    when one goes on running: then nothing is removed, so that it is tried again.
    """
    wanted = compile_units(spec)
    launches = compile_launch_files(spec)
    left = [path for path in _ours(unit_directory) if path.name not in wanted]
    stale = _changed_agents(spec, Path(unit_directory), launch_directory)
    changed = [path for path in _ours(unit_directory) if path.name in stale]
    if left or changed:
        stop([path.name.replace("@.", "@*.") for path in (*left, *changed)])
    if not left:
        return []
    files = left + [path for path in sorted(Path(launch_directory).glob("*.json")) if _is_left(path.name, launches)]
    for path in files:
        path.unlink()
    return [str(path) for path in files]


def _ours(unit_directory: str) -> list[Path]:
    """Return the unit files of MCP servers and agents that :func:`prepare` wrote."""
    kinds = ("saw-mcp-*", "saw-agent@*", "run-saw-scratch-agent*.mount")
    found = (path for kind in kinds for path in sorted(Path(unit_directory).glob(kind)))
    return [path for path in found if path.is_file() and path.read_bytes().startswith(MARK.encode())]


def _is_left(name: str, launches: Collection[str]) -> bool:
    return name.startswith(("mcp-", "agent-")) and name not in launches


def _changed_agents(spec: SandboxSpec, unit_directory: Path, launch_directory: str) -> set[str]:
    """Return the units of agents whose unit or launch file is no longer what the policy makes of it."""
    units, launches = compile_units(spec), compile_launch_files(spec)
    changed = set()
    for agent in spec.agents:
        files = ((unit_directory / agent.unit, units[agent.unit].encode()),
                 (Path(launch_directory, agent.launch), launches[agent.launch]))  # fmt: skip
        if any(path.is_file() and path.read_bytes() != content for path, content in files):
            changed.add(agent.unit)
    return changed


def write_shims(directory: Path, paths: RuntimePaths) -> list[str]:
    """Write ``saw-run``, ``saw-mcp-connect``, ``saw-postgres`` and ``saw-attach`` into ``directory``; return what changed.

    The Python programs are compiled beforehand, which saves 2 ms at each start; run this again after an upgrade, with
    the interpreter of ``paths``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    changed: list[str] = []
    for name, module in SHIMS.items():
        compiled = directory / f".{name}.pyc"
        with tempfile.TemporaryDirectory(prefix="saw-shim-") as folder:
            source, target = f"{paths.package}/{module}", f"{folder}/compiled"
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(source, cfile=target, doraise=True, invalidation_mode=mode)
            changed += _write_changed(str(directory), {compiled.name: Path(target).read_bytes()})
        text = f'#!/bin/sh\nexec {paths.python} -I -S {compiled} "$@"\n'
        changed += _write_changed(str(directory), {name: text.encode()}, mode=0o755)
    attach = (Path(paths.package) / "shell_attach.sh").read_bytes()
    return changed + _write_changed(str(directory), {"saw-attach": attach}, mode=0o755)


def login_shell_problem(user: str) -> str | None:
    """Return why the login shell of ``user`` would run the agent's own files outside the sandbox, or None.

    ``sshd`` runs the forced command by ``SHELL -c``; Debian's bash then reads ``~/.bashrc`` when it finds itself under sshd.
    """
    try:
        shell = pwd.getpwnam(user).pw_shell
    except KeyError:
        return f"user {user!r} does not exist"
    if Path(shell).resolve().name in {"sh", "dash", "nologin", "false"}:
        return None
    return f"the login shell of {user} is {shell}, which reads files of the home directory; set it to /bin/sh"


def _write_changed(directory: str, files: dict[str, bytes], *, mode: int = 0o644) -> list[str]:
    changed = []
    for name, content in files.items():
        path = Path(directory, name)
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content, mode=mode)
            changed.append(str(path))
    return changed


def _uid(user: str) -> int:
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise SandboxError(f"user {user!r} does not exist", cure="create it as a system user") from None
