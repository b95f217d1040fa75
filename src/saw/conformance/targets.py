"""The targets: how a program is run inside each kind of sandbox, and what the kit knows about its surroundings."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from saw.conformance.outside import TCP_PORTS, UDP_PORTS, Canary, Ground, RecorderProcess
from saw.conformance.recorder import Plan
from saw.errors import ConfigError, UnavailableError

NOBODY = 65534
KINDS = "bare, bubblewrap, systemd-unit, systemd-unit:ROOT@HOST …, local-sandbox, cmd:PROGRAM ARGS…, ssh:HOST …, workspace:NAME"


@dataclass
class Session:
    """An open target: the command line to which the probe is sent, the facts, and what stands outside.

    ``ours`` says that the reasons of refusals are held against those of our own services.
    """

    name: str
    command: list[str]
    ours: bool
    facts: dict[str, Any]
    recorder: RecorderProcess | None = None
    canary: Canary | None = None
    descriptor_mark: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Options:
    """What a person says about a target: see ``saw conformance run --help``."""

    python: str = "python3"
    recorder: tuple[str, ...] = ()
    proxy: str = ""
    allowed_url: str = ""
    second_url: str = ""
    graphql_url: str = ""
    mcp_url: str = ""
    redirect_url: str = ""
    echo_url: str = ""
    placeholder: str = ""
    websocket_url: str = ""
    inside_url: str = ""
    mixed_url: str = ""
    forged_url: str = ""
    governance: str = ""
    ours: bool = False


def words_of(text: str, kind: str) -> list[str]:
    """Split a command line of a target; raise :class:`ConfigError` when it is none."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"the command of {kind}: cannot be read: {error}", cure="quote it as for a shell") from None
    if not words:
        raise ConfigError(f"{kind}: needs a command", cure=f"write --target '{kind}:COMMAND'")
    return words


@contextlib.contextmanager
def open_target(name: str, options: Options) -> Iterator[Session]:
    """Open the target ``name``; raise :class:`ConfigError` for a wrong name, ``UnavailableError`` for what is missing here."""
    kind, _, rest = name.partition(":")
    local = {"bare": _bare, "bubblewrap": _bubblewrap, "systemd-unit": _systemd_unit, "local-sandbox": _local_sandbox}
    remote = {"cmd": _cmd, "ssh": _ssh, "systemd-unit": _systemd_unit_at, "workspace": _workspace}
    beyond = limit_facts(options)
    if kind in local and not rest:
        with contextlib.ExitStack() as stack:
            session = local[kind](stack, options)
            session.facts |= beyond
            yield session
    elif kind in remote:
        with contextlib.ExitStack() as stack:
            command, ours = remote[kind](rest, options)
            session = _elsewhere(stack, Session(name, command, ours or options.ours, {}), options)
            session.facts |= beyond
            yield session
    else:
        raise ConfigError(f"there is no target {name!r}", cure=f"name one of {KINDS}")


def _cmd(rest: str, options: Options) -> tuple[list[str], bool]:
    return [*words_of(rest, "cmd"), options.python, "-I", "-u", "-"], False


def _ssh(rest: str, options: Options) -> tuple[list[str], bool]:
    return ["ssh", "-T", "-o", "BatchMode=yes", *words_of(rest, "ssh"), f"{shlex.quote(options.python)} -I -u -"], False


def _workspace(rest: str, options: Options) -> tuple[list[str], bool]:
    if not rest:
        raise ConfigError("workspace: needs the id of a workspace", cure="write --target workspace:ws-demo")
    python = "/usr/bin/python3" if options.python == "python3" else options.python
    return [str(Path(sys.executable).with_name("saw")), "ssh", rest, "--", python, "-I", "-u", "-"], True


def limit_facts(options: Options) -> dict[str, Any]:
    """Return what is more than may be had: bytes and files of a temporary directory, and bytes of memory.

    Without a policy a gigabyte, 66,560 files and no number for memory; with one a little beyond what it gives. A directory to
    which it gives as much as all memory has no number of bytes: the kernel ends the attempt before.
    """
    if not options.governance:
        return {"beyond_tmp": 1024**3, "beyond_shm": 1024**3, "beyond_inodes": 65536 + 1024, "beyond_memory": None}
    from saw.policy.loader import load_governance
    from saw.policy.sandbox_limits import size

    try:
        raw = Path(options.governance).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"--governance {options.governance} cannot be read: {error.strerror}",
            cure="name the governance.yaml of the policy that is in force there",
        ) from error
    limits = load_governance(raw, options.governance).sandbox.limits
    beyond = {"beyond_tmp": size(limits.tmp) + 1024**2, "beyond_shm": size(limits.shm) + 1024**2}
    facts: dict[str, Any] = {name: most if most < size(limits.memory) else None for name, most in beyond.items()}
    more = {
        "beyond_inodes": limits.inodes + 1024,
        "beyond_memory": size(limits.memory) + size(limits.swap) + 64 * 1024**2,
    }
    return facts | more


def web_facts(options: Options, *, environment: bool) -> dict[str, Any]:
    """Return the facts about the proxy and what its policy allows."""
    from urllib.parse import urlsplit

    facts: dict[str, Any] = {}
    if options.proxy:
        address, _, port = options.proxy.rpartition(":")
        if not address or not port.isdigit():
            raise ConfigError(f"--proxy {options.proxy!r} is no ADDRESS:PORT", cure="write for example 10.200.0.1:3128")
        facts |= {"proxy": address.strip("[]"), "proxy_port": int(port)}
    for option, url, example in (
        ("allowed", options.allowed_url, "https://api.example.com/v1/things"),
        ("graphql", options.graphql_url, "https://api.example.com/graphql"),
        ("mcp", options.mcp_url, "https://mcp.example.com/mcp"),
        ("redirect", options.redirect_url, "https://api.example.com/v1/redirect-to"),
        ("second", options.second_url, "https://git.example.com/v1/things"),
        ("echo", options.echo_url, "https://api.example.com/v1/headers"),
        ("websocket", options.websocket_url, "https://chat.example.com/rooms/1"),
        ("inside", options.inside_url, "https://inside.example.com/v1/things"),
        ("mixed", options.mixed_url, "https://mixed.example.com/v1/things"),
        ("forged", options.forged_url, "https://forged.example.com/v1/things"),
    ):
        if not url:
            continue
        parts = urlsplit(url)
        if parts.scheme != "https" or not parts.hostname:
            raise ConfigError(f"--{option}-url is no https address", cure=f"write for example {example}")
        facts |= {
            f"{option}_host": parts.hostname,
            f"{option}_authority": f"{parts.hostname}:{parts.port or 443}",
            f"{option}_path": parts.path or "/",
            "http_proxy": environment or None,
        }
    return facts | {"sibling": facts.get("second_host"), "placeholder": options.placeholder or None}


def recorder_facts(address: str) -> dict[str, Any]:
    """Return the facts about one address at which the kit records: as it is, as one number and in hexadecimal."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        raise ConfigError(f"--recorder {address!r} is no address", cure="write for example 203.0.113.5") from None
    if found.version == 6:
        return {"v6": address}
    return {"v4": address, "v4_number": str(int(found)), "v4_hex": hex(int(found))}


def _elsewhere(stack: contextlib.ExitStack, session: Session, options: Options) -> Session:
    """Complete the session of a target that the kit does not surround: a recorder at the addresses that were given."""
    session.facts = {**web_facts(options, environment=True), "cgroup": True}
    if options.recorder:
        for address in options.recorder:
            session.facts = recorder_facts(address) | session.facts
        plan = Plan(
            tcp=tuple((address, port) for address in options.recorder for port in TCP_PORTS),
            udp=tuple((address, port) for address in options.recorder for port in UDP_PORTS),
            icmp=os.geteuid() == 0,
        )
        session.recorder = RecorderProcess(plan, [])
        stack.callback(session.recorder.close)
        session.notes += [f"not recorded: {text}" for text in session.recorder.failed]
    return session


def _grounded(
    stack: contextlib.ExitStack, name: str, options: Options, uid: int, *, run: bool = True, mark: bool = True
) -> tuple[Ground, Session]:
    """Return a ground and a session in it, with the canary; the recorder is started by :func:`_record`."""
    ground = Ground()
    stack.callback(ground.close)
    session = Session(name, [], options.ours, {**ground.facts(run=run), **web_facts(options, environment=False)})
    canary = Canary([*ground.prefix(), "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"])
    stack.callback(canary.close)
    session.canary = canary
    session.facts |= {
        "host_mark": canary.mark,
        "host_pid": canary.pid,
        "shm_key": canary.key,
        "canary_tmp": f"/tmp/{canary.mark}",  # noqa: S108
        "canary_shm": f"/dev/shm/{canary.mark}",  # noqa: S108
        "canary_var": f"/var/tmp/{canary.mark}",  # noqa: S108
        "cgroup": True,
    }
    if mark:
        session.descriptor_mark = session.facts["fd_mark"] = f"saw-{os.urandom(10).hex()}"
    return ground, session


def _record(stack: contextlib.ExitStack, session: Session, ground: Ground, plan: Plan) -> None:
    session.recorder = RecorderProcess(plan, ground.prefix())
    stack.callback(session.recorder.close)
    session.notes += [f"not recorded: {text}" for text in session.recorder.failed]


def _home(ground: Ground, uid: int) -> str:
    """Make an empty home directory of ``uid`` in the ground's own ``/run``."""
    place = "/run/saw-home"
    done = ground.run("install", "-d", "-o", str(uid), "-g", str(uid), "-m", "0700", place)
    if done.returncode:
        raise UnavailableError(f"no home directory for the target: {done.stderr.strip()}")
    return place


def _bare(stack: contextlib.ExitStack, options: Options) -> Session:
    ground, session = _grounded(stack, "bare", options, NOBODY)
    _record(stack, session, ground, ground.plan(knock=("192.0.2.10", "127.0.0.1")))
    home = _home(ground, NOBODY)
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    session.command = [
        *ground.prefix(),
        *drop,
        "env",
        "-i",
        f"HOME={home}",
        "PATH=/usr/bin:/bin",
        options.python,
        "-I",
        "-u",
        "-",
    ]
    return session


def _bubblewrap(stack: contextlib.ExitStack, options: Options) -> Session:
    program = shutil.which("bwrap")
    if program is None:
        raise UnavailableError("bubblewrap is not installed", cure="apt-get install bubblewrap")
    ground, session = _grounded(stack, "bubblewrap", options, NOBODY)
    _record(stack, session, ground, ground.plan(knock=("192.0.2.10", "127.0.0.1")))
    home = _home(ground, NOBODY)
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--inh-caps=-all"]
    session.command = [*ground.prefix(), *drop, program, *bubblewrap_words(home), options.python, "-I", "-u", "-"]
    session.notes.append(f"bwrap {shlex.join(bubblewrap_words(home))}")
    return session


def bubblewrap_words(home: str) -> list[str]:
    """Return the arguments of bwrap as its manual and common wrappers use them: everything unshared, programs read-only."""
    links = [word for name in ("bin", "sbin", "lib", "lib64") for word in ("--symlink", f"usr/{name}", f"/{name}")]
    return [
        "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--setenv", "HOME", home, "--setenv", "PATH",
        "/usr/bin:/bin", "--ro-bind", "/usr", "/usr", *links, "--ro-bind", "/etc", "/etc", "--proc", "/proc", "--dev", "/dev",
        "--tmpfs", "/tmp", "--bind", home, home, "--chdir", home,  # noqa: S108
    ]  # fmt: skip


UNIT = (
    "NoNewPrivileges=yes", "PrivateTmp=yes", "PrivateDevices=yes", "PrivateIPC=yes", "PrivateUsers=yes", "ProtectSystem=strict",
    "ProtectHome=yes", "ProtectProc=invisible", "ProcSubset=pid", "ProtectKernelTunables=yes", "ProtectKernelModules=yes",
    "ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectClock=yes", "ProtectHostname=yes", "RestrictNamespaces=yes",
    "RestrictRealtime=yes", "RestrictSUIDSGID=yes", "LockPersonality=yes", "KeyringMode=private", "CapabilityBoundingSet=",
    "SystemCallFilter=@system-service", "SystemCallArchitectures=native", "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6",
    "TasksMax=512", "MemoryMax=512M", "LimitCORE=0", "UMask=0077",
)  # fmt: skip
"""What ``systemd.exec(5)`` offers (252) and guides recommend for a service that needs the network and runs any program."""
BOOTED = Path("/run/systemd/system")
BUS = Path("/run/dbus/system_bus_socket")


def unit_words(name: str, more: tuple[str, ...] = ()) -> list[str]:
    """Return the command that runs its arguments in a transient unit, with a home of its own that goes with it.

    ``name`` is that home's below ``/run``; systemd names each unit, since one may not be gone yet when the next one starts.
    ``more`` are further properties.
    """
    home = f"/run/{name}"
    words = [
        "systemd-run",
        "--quiet",
        "--wait",
        "--pipe",
        "--collect",
        f"--uid={NOBODY}",
        f"--gid={NOBODY}",
    ]
    words += [f"--setenv=HOME={home}", "--setenv=PATH=/usr/bin:/bin"]
    for line in (*UNIT, f"RuntimeDirectory={name}", f"WorkingDirectory={home}", *more):
        words += ["-p", line]
    return [*words, "--"]


def _home_name() -> str:
    return f"saw-conformance-{os.urandom(4).hex()}"


def _systemd_unit(stack: contextlib.ExitStack, options: Options) -> Session:
    if not BOOTED.is_dir():
        raise UnavailableError(
            "systemd does not run here as process 1, so that no unit can be started",
            cure="run it on a booted host, or name one: systemd-unit:root@HOST",
        )
    if not BUS.exists():
        raise UnavailableError(f"systemd-run needs the system bus, and {BUS} is not there", cure="apt-get install dbus")
    ground, session = _grounded(stack, "systemd-unit", options, NOBODY, run=False, mark=False)
    _record(stack, session, ground, ground.plan(knock=("192.0.2.10", "127.0.0.1"), run=False))
    words = unit_words(_home_name(), (f"NetworkNamespacePath=/proc/{ground.pid}/ns/net",))
    session.facts |= {"dns": None}
    session.command = [*words, shutil.which(options.python) or options.python, "-I", "-u", "-"]
    session.notes.append("properties: " + " ".join(UNIT))
    return session


def _systemd_unit_at(rest: str, options: Options) -> tuple[list[str], bool]:
    """A unit on another host, reached as root by SSH. systemd-run wants the program's full path there."""
    python = "/usr/bin/python3" if options.python == "python3" else options.python
    inside = shlex.join([*unit_words(_home_name()), python, "-I", "-u", "-"])
    return ["ssh", "-T", "-o", "BatchMode=yes", *words_of(rest, "systemd-unit"), inside], False


def _local_sandbox(stack: contextlib.ExitStack, options: Options) -> Session:
    from saw.conformance.local import open_local

    ground, session = _grounded(stack, "local-sandbox", options, 2000)
    plan, command = open_local(ground, options.python)
    _record(stack, session, ground, plan)
    session.ours = True
    session.command = command
    session.facts |= {"proxy": "10.200.0.1", "proxy_port": 3128, "other_port": True, "cgroup": None}
    session.notes.append(
        "launcher, Landlock, system call filter and network; the unit's namespaces are made by unshare"
    )
    return session
