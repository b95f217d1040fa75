"""Starting always-on agents: once per policy and boot, or again when something about them changed.

Whatever changes below ``/run/saw/generations`` sets the units going again. An agent that has ended, and that its policy does not
start again, must not come back by that.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec

from saw import jsontext
from saw.files import write_atomic
from saw.runtime.sandbox import LAUNCH_DIRECTORY, AgentSpec, SandboxError, SandboxSpec

STARTED = Path("/run/saw/agents-started.json")
"""As what each agent was started last (unit → SHA-256); gone after a boot, like what it tells of."""


def start_agents(
    spec: SandboxSpec,
    digest: str,
    start: Callable[[str], None],
    *,
    unit_directory: str,
    launch_directory: str = LAUNCH_DIRECTORY,
    record: Path = STARTED,
) -> list[str]:
    """Start the agents that the policy ``digest`` has run and that were not started under it as they are now; return their units.

    One with ``restart: always`` is started whenever it does not run. ``start`` raises :class:`SandboxError` when systemd does not
    take a unit: the others are started first, then that is raised, and it is tried again the next time.
    """
    before = _recorded(record)
    after: dict[str, str] = {}
    started, problems = [], []
    for agent in spec.agents:
        now = _identity(agent, digest, unit_directory, launch_directory)
        if agent.restart != "always" and before.get(agent.unit) == now:
            after[agent.unit] = now
            continue
        try:
            start(agent.unit)
        except SandboxError as error:
            problems.append(error)
            continue
        after[agent.unit] = now
        started.append(agent.unit)
    if after != before:
        write_atomic(record, msgspec.json.encode(after) + b"\n", mode=0o600)
    if problems:
        raise problems[0]
    return started


def start_unit(unit: str) -> None:
    """Have systemd start ``unit``, without waiting for it: one that keeps ending waits for minutes (``RestartSec=``)."""
    try:
        done = subprocess.run(
            ["systemctl", "start", "--no-block", "--", unit], capture_output=True, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(f"systemctl did not start {unit}: {error}", cure="see `systemctl status`") from error
    if done.returncode != 0:
        raise SandboxError(f"systemctl did not start {unit}: {done.stderr.strip()[-300:]}", cure="see its journal")


def _identity(agent: AgentSpec, digest: str, unit_directory: str, launch_directory: str) -> str:
    """Return a SHA-256 of the policy and of what the agent is run from."""
    found = hashlib.sha256(digest.encode())
    try:
        for path in (Path(unit_directory, agent.unit), Path(launch_directory, agent.launch)):
            found.update(hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise SandboxError(
            f"{agent.unit} is not prepared: {error.filename}: {error.strerror}", cure="saw sandbox prepare"
        ) from error
    return found.hexdigest()


def _recorded(record: Path) -> dict[str, str]:
    """Return what the record says; one that cannot be read says nothing, and agents are started once too often."""
    try:
        return jsontext.decode(record.read_bytes(), kind=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}
