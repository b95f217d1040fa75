"""systemd units compiled from a :class:`~saw.runtime.sandbox.SandboxSpec`.

Directives and their meaning: systemd.exec(5), systemd.resource-control(5). The root of every sandbox is an empty, read-only
tmpfs into which only the listed paths are bound, so an unlisted path does not exist rather than being forbidden.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

from saw.runtime.limits import SLICE
from saw.runtime.sandbox import (
    APT_CONFIG,
    APT_CONFIGURATION,
    BASE_READ_WRITE,
    LAUNCH_DIRECTORY,
    SHELL_ALONE,
    UNREACHABLE,
    AgentSpec,
    McpServerSpec,
    SandboxError,
    SandboxSpec,
    encode_launch,
)
from saw.runtime.sandbox_bounds import bounded_properties, scratch, scratch_units, slice_unit
from saw.runtime.unitfile import Properties, unit_text

NETNS_PATH = "/run/netns/saw-sandbox"
MEDIATOR_USER = "saw-mcp"
MINIMUM_SYSTEMD_PRIVATE_PIDS = 257
MINIMUM_SYSTEMD_RESTART_STEPS = 254
_ALLOWED_CALLS = "landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp"
_REFUSED_CALLS = (
    "@clock @cpu-emulation @debug @keyring @module @mount @obsolete @raw-io @reboot @swap chroot",
    "io_uring_setup io_uring_enter io_uring_register userfaultfd perf_event_open bpf ptrace process_vm_readv process_vm_writev",
    "pidfd_getfd kcmp name_to_handle_at open_by_handle_at",
)


def common_properties(spec: SandboxSpec, *, systemd: int = 257) -> Properties:
    """Return the properties that every sandbox unit carries, without paths, user and network. ``systemd`` is its version."""
    properties: Properties = [
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("AmbientCapabilities", ""),
        ("PrivateDevices", "yes"),
        ("DevicePolicy", "closed"),
        ("PrivateIPC", "yes"),
        # PrivateDevices= binds the host's /dev/shm into the unit's /dev, and PrivateIPC= leaves it there.
        ("TemporaryFileSystem", f"/dev/shm:{spec.limits.tmpfs(spec.limits.shm_max)}"),  # noqa: S108
        ("ProtectProc", "invisible"),
        ("ProtectClock", "yes"),
        ("ProtectControlGroups", "yes"),
        ("ProtectHostname", "yes"),
        ("ProtectKernelLogs", "yes"),
        ("ProtectKernelModules", "yes"),
        ("ProtectKernelTunables", "yes"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("RestrictNamespaces", "yes"),
        ("RestrictRealtime", "yes"),
        ("RestrictSUIDSGID", "yes"),
        ("LockPersonality", "yes"),
        ("RemoveIPC", "yes"),
        ("KeyringMode", "private"),
        ("SystemCallArchitectures", "native"),
        ("SystemCallErrorNumber", "EPERM"),
        ("SystemCallFilter", f"@system-service {_ALLOWED_CALLS}"),
        *[("SystemCallFilter", f"~{calls}") for calls in _REFUSED_CALLS],
        ("LimitCORE", "0"),
        ("UMask", "0027"),
    ]
    if systemd >= MINIMUM_SYSTEMD_PRIVATE_PIDS:
        properties.append(("PrivatePIDs", "yes"))
    return properties


def view_properties(
    read_only: tuple[str, ...], read_write: tuple[str, ...], protected: tuple[str, ...] = ()
) -> Properties:
    """Return the properties that make the file system view: an empty root and the listed paths.

    Read-only paths may be missing on the host; writable and ``protected`` ones must exist, else the unit does not start. A
    directory between a writable path and a protected one is bound to itself: a mount point cannot be renamed, so that the agent
    cannot move ``.config`` aside and make another one with a ``.config/systemd`` of its own.
    """
    own = ("/tmp", "/var/tmp", "/dev", "/proc")  # noqa: S108
    properties: Properties = [("TemporaryFileSystem", "/:ro,mode=0755")]
    properties += [("BindReadOnlyPaths", f"-{p}") for p in dict.fromkeys(read_only) if p not in own]
    properties += [("BindPaths", p) for p in dict.fromkeys(read_write) if p not in own and not p.startswith("/dev/")]
    properties += [("BindPaths", p) for p in _between(read_write, protected)]
    properties += [("BindReadOnlyPaths", p) for p in protected]
    listed = [Path(p) for p in (*read_only, *read_write)]
    covered = [p for p in UNREACHABLE if any(Path(p).is_relative_to(q) for q in listed)]
    return properties + [("InaccessiblePaths", f"-{p}") for p in covered]


def device_properties(devices: tuple[str, ...]) -> Properties:
    """Return what gives a unit the device nodes ``devices``, those that are there when it starts.

    A unit's ``/dev`` is its own, so a node that is not listed does not exist in it; the device filter refuses it besides.
    """
    return [item for path in devices for item in (("BindPaths", f"-{path}"), ("DeviceAllow", f"{path} rw"))]


def _between(read_write: tuple[str, ...], protected: tuple[str, ...]) -> list[str]:
    """Return the directories strictly below a writable path that hold a protected one, outer ones first."""
    parents = {parent for path in protected for parent in Path(path).parents}
    return sorted(str(p) for p in parents if any(p != Path(q) and p.is_relative_to(q) for q in read_write))


def _launcher(spec: SandboxSpec, launch: str, command: tuple[str, ...]) -> str:
    words = (
        spec.paths.python,
        "-I",
        "-m",
        "saw.runtime.launcher",
        "--launch",
        f"{LAUNCH_DIRECTORY}/{launch}",
        "--",
        *command,
    )
    return " ".join(_quote(word) for word in words)


def _quote(word: str) -> str:
    if any(ord(character) < 32 for character in word):
        raise SandboxError(f"{word!r} has control characters", cure="correct the command in governance.yaml")
    escaped = word.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[A-Za-z0-9_@%+=:,./$-]+", escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _sandbox(spec: SandboxSpec, owner: str, sockets: tuple[str, ...], *, systemd: int) -> Properties:
    """Return the properties that shell and agents share; ``owner`` is whose temporary directories they are."""
    writable = (*(p for p in BASE_READ_WRITE if p not in SHELL_ALONE), *sockets, *spec.read_write)
    return [
        ("Type", "exec"),
        ("User", spec.user),
        ("Group", spec.group),
        ("WorkingDirectory", "/"),
        ("KillMode", "control-group"),
        ("TimeoutStopSec", "5s"),
        ("NetworkNamespacePath", NETNS_PATH),
        *bounded_properties(spec),
        *common_properties(spec, systemd=systemd),
        *view_properties((*spec.base_read_only, *spec.read_only), writable, spec.protected),
        *[("BindPaths", f"{place}:{inside}") for place, inside in scratch(owner)],
        *device_properties(spec.devices),
    ]


def _sandboxed(description: str, *mounts: str) -> Properties:
    """Return the head of a unit in the sandbox's network, which needs ``mounts``."""
    return [
        ("Description", description),
        ("Requires", "saw-sandbox-net.service"),
        ("After", "saw-sandbox-net.service saw-ring1.service"),
        ("RequiresMountsFor", " ".join(mounts)),
        ("StartLimitIntervalSec", "0"),
    ]


def shell_unit(spec: SandboxSpec, *, systemd: int = 257) -> str:
    """Return ``saw-shell.service``: the sandbox of the agent, holding tmux and the command daemon."""
    execd = (spec.paths.python, "-I", "-S", f"{spec.paths.package}/shell_execd.py", "--directory", "/run/saw/shell")
    places = (place for place, _ in scratch("shell"))
    return unit_text(
        {
            "Unit": _sandboxed("Agent sandbox: persistent shell and command daemon", *SHELL_ALONE, *places),
            "Service": [
                ("ExecStart", _launcher(spec, "shell.json", execd)),
                ("Restart", "always"),
                ("RestartSec", "1s"),
                *_sandbox(spec, "shell", SHELL_ALONE, systemd=systemd),
            ],
            "Install": [("WantedBy", "multi-user.target")],
            **_placed(spec),
        }
    )


def agent_unit(spec: SandboxSpec, agent: AgentSpec, *, systemd: int = 257) -> str:
    """Return ``saw-agent@NAME.service``: an always-on agent in a sandbox of its own, with the shell's files and network.

    It starts only while a policy is in force. Where it keeps ending, it is started again ever more slowly, where systemd can.
    """
    owner = f"agent-{agent.name}"
    init = (spec.paths.python, "-I", "-S", f"{spec.paths.package}/agent_init.py")
    backoff: Properties = [("RestartSec", "10s")]
    if systemd >= MINIMUM_SYSTEMD_RESTART_STEPS:
        backoff = [("RestartSec", "2s"), ("RestartSteps", "8"), ("RestartMaxDelaySec", "5min")]
    return unit_text(
        {
            "Unit": [
                *_sandboxed(f"Always-on agent {agent.name}", *(place for place, _ in scratch(owner))),
                ("ConditionPathExists", "/run/saw/generations/current/policy.yaml"),
            ],
            "Service": [
                ("ExecStart", _launcher(spec, agent.launch, (*init, *agent.command))),
                ("SuccessExitStatus", "143"),
                ("Restart", agent.restart),
                *backoff,
                *_sandbox(spec, owner, (), systemd=systemd),
            ],
        }
    )


def _placed(spec: SandboxSpec) -> dict[str, Properties]:
    """Return a section for readers, which systemd skips (``X-``): the files of the home that the bundle lays down."""
    files = sorted(spec.persistence.files.items())
    digests = [(f"{spec.home}/{name}", hashlib.sha256(text.encode()).hexdigest()) for name, text in files]
    return {"X-Saw": [("Placed", f"{path} sha256:{digest}") for path, digest in digests]} if files else {}


def mcp_units(spec: SandboxSpec, server: McpServerSpec, *, systemd: int = 257) -> dict[str, str]:
    """Return the three units of one stdio MCP server, by name.

    ``saw-mcp-server-NAME.socket`` and its per-connection service run the server in a sandbox of its own;
    ``saw-mcp-NAME.service`` is the mediator, a different user outside the agent's reach, and the only one that may
    connect to that socket.
    """
    name = server.name
    base = tuple(p for p in spec.base_read_only if p != "/run/saw/mcp")
    protected = tuple(p for p in spec.protected if any(Path(p).is_relative_to(q) for q in server.read_write))
    instance = unit_text(
        {
            "Unit": [("Description", f"MCP server {name} in its own sandbox"), ("CollectMode", "inactive-or-failed")],
            "Service": [
                ("Type", "exec"),
                ("User", spec.user),
                ("Group", spec.group),
                ("StandardInput", "socket"),
                ("StandardOutput", "socket"),
                ("StandardError", "journal"),
                ("ExecStart", _launcher(spec, f"mcp-{name}.json", server.command)),
                ("PrivateNetwork", "yes"),
                ("TimeoutStopSec", "5s"),
                *bounded_properties(spec),
                *common_properties(spec, systemd=systemd),
                *[
                    ("TemporaryFileSystem", f"{inside}:{spec.limits.tmpfs(spec.limits.tmp_max)}")
                    for _, inside in scratch("")
                ],
                *view_properties((*base, *server.read_only), server.read_write, protected),
            ],
        }
    )
    socket = unit_text(
        {
            "Unit": [("Description", f"MCP server {name}: one instance per mediated session")],
            "Socket": [
                ("ListenStream", f"/run/saw/mcp-server/{name}.sock"),
                ("Accept", "yes"),
                ("SocketUser", MEDIATOR_USER),
                ("SocketMode", "0600"),
                ("DirectoryMode", "0755"),
                ("MaxConnections", "16"),
            ],
            "Install": [("WantedBy", "sockets.target")],
        }
    )
    mediator = unit_text(
        {
            "Unit": [
                ("Description", f"MCP mediator for {name}"),
                ("Requires", f"saw-mcp-server-{name}.socket"),
                ("After", f"saw-mcp-server-{name}.socket saw-policyd.service"),
            ],
            "Service": [
                ("Type", "exec"),
                ("User", MEDIATOR_USER),
                ("Group", spec.group),
                ("ExecStart", f"{spec.paths.python} -I -m saw.cli.main mcp run {name}"),
                ("Restart", "always"),
                ("RestartSec", "1s"),
                ("TimeoutStopSec", "3s"),
                ("PrivateNetwork", "yes"),
                # One of the workspace's own services: what the agent sends it costs neither the others nor the agent.
                ("MemoryMax", "256M"),
                ("MemorySwapMax", "0"),
                ("TasksMax", "64"),
                ("PrivateTmp", "yes"),
                *common_properties(spec, systemd=systemd),
                ("ReadWritePaths", "/run/saw/mcp"),
                ("InaccessiblePaths", "/home -/root"),
                ("UMask", "0007"),
            ],
            "Install": [("WantedBy", "multi-user.target")],
        }
    )
    return {
        f"saw-mcp-server-{name}@.service": instance,
        f"saw-mcp-server-{name}.socket": socket,
        f"saw-mcp-{name}.service": mediator,
    }


def net_unit(spec: SandboxSpec) -> str:
    """Return ``saw-sandbox-net.service``, which holds the sandbox's network up."""
    saw = f"{spec.paths.python} -I -m saw.cli.main sandbox"
    return unit_text(
        {
            "Unit": [
                ("Description", "Network of the agent sandbox"),
                ("After", "saw-bootstrap.service"),
                ("Before", "saw-shell.service saw-ring1.service"),
            ],
            "Service": [
                ("Type", "oneshot"),
                ("RemainAfterExit", "yes"),
                ("ExecStart", f"{saw} net-up"),
                ("ExecStop", f"{saw} net-down"),
            ],
            "Install": [("WantedBy", "multi-user.target")],
        }
    )


def compile_units(spec: SandboxSpec, *, systemd: int = 257) -> dict[str, str]:
    """Return every unit of the generation as name → text."""
    units = {
        SLICE: slice_unit(spec),
        **scratch_units(spec),
        "saw-shell.service": shell_unit(spec, systemd=systemd),
        "saw-sandbox-net.service": net_unit(spec),
    }
    for server in spec.mcp_servers:
        units |= mcp_units(spec, server, systemd=systemd)
    units |= {agent.unit: agent_unit(spec, agent, systemd=systemd) for agent in spec.agents}
    return units


def compile_launch_files(spec: SandboxSpec) -> dict[str, bytes]:
    """Return every launch file of the generation as name (below ``/run/saw/sandbox``) → content, and apt's settings."""
    files = {"shell.json": encode_launch(spec.shell_launch()), Path(APT_CONFIG).name: APT_CONFIGURATION.encode()}
    files |= {agent.launch: encode_launch(spec.agent_launch()) for agent in spec.agents}
    files |= {f"mcp-{server.name}.json": encode_launch(spec.mcp_launch(server)) for server in spec.mcp_servers}
    return files


def systemd_version() -> int:
    """Return the major version of the installed systemd; raise :class:`SandboxError` without one."""
    try:
        answer = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=True, timeout=20)
        return int(answer.stdout.split()[1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise SandboxError(
            f"systemd's version is unknown: {error}", cure="run this where systemd is installed"
        ) from error


def stop_units(names: list[str]) -> None:
    """Stop ``names`` (patterns allowed) and wait for their end; raise :class:`SandboxError` when systemd cannot."""
    try:
        done = subprocess.run(
            ["systemctl", "stop", "--", *names], capture_output=True, text=True, check=False, timeout=90
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SandboxError(
            f"systemctl did not stop {', '.join(names)}: {error}", cure="see `systemctl status`"
        ) from error
    if done.returncode != 0:
        raise SandboxError(
            f"systemctl did not stop {', '.join(names)}: {done.stderr.strip()[-300:]}", cure="see its journal"
        )


def verify_units(units: dict[str, str], *, timeout: float = 60) -> None:
    """Check ``units`` with ``systemd-analyze verify`` in a directory of their own; raise :class:`SandboxError` with its words.

    Nothing is installed. Messages about other units of the host are not ours and are left out.
    """
    with tempfile.TemporaryDirectory(prefix="saw-units-") as folder:
        for name, text in units.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        names = [f"{folder}/{name}" for name in sorted(units)]
        command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SandboxError(f"systemd-analyze could not check the units: {error}", cure="install systemd") from error
    ours = [line for line in answer.stderr.splitlines() if any(name in line for name in units)]
    problems = [
        line for line in ours if re.search(r"Unknown|Invalid|Failed|not executable|ignoring|Refusing|bad", line)
    ]
    if problems or (answer.returncode != 0 and ours):
        raise SandboxError(
            "systemd refuses the compiled units: " + "; ".join(problems or ours),
            cure="correct the policy, or report this",
        )
