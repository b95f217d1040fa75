"""What the sandbox may reach, compiled from one verified policy generation.

``policy.yaml`` says which paths, user and Landlock strictness; ``governance.yaml`` says credentials and MCP servers. The result
(:class:`SandboxSpec`) is the single source for the systemd units, the launch files and the network rules.
"""

from __future__ import annotations

import pwd
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import msgspec

from saw.errors import SawError
from saw.policy.checks_policy import DEVICES, GPU_DEVICE, SHARED_MEMORY
from saw.policy.governance import Governance
from saw.policy.model import Policy
from saw.policy.persistence import Persistence, git_environment
from saw.runtime.launcher import Launch
from saw.runtime.limits import Limits, Machine, here, limits_of

GENERATION = Path("/run/saw/generations/current")
LAUNCH_DIRECTORY = "/run/saw/sandbox"
CA_BUNDLE = "/run/saw/sandbox/ca-bundle.pem"
RING1_CA = "/run/saw/sandbox/ring1-ca.pem"
"""Ring 1's authority alone, for programs that add it to authorities of their own and would read a whole bundle at each start."""
JAVA_TRUST = "/run/saw/sandbox/ca-bundle.p12"
"""The same authorities as :data:`CA_BUNDLE`, in the only form that every Java reads."""
APT_CONFIG = "/run/saw/sandbox/apt.conf"
APT_CONFIGURATION = f'Acquire::https::CAInfo "{CA_BUNDLE}";\n'
"""What apt must be told in a file: it takes the proxy from the environment, but no authority (apt-transport-https(1))."""
PROXY_ADDRESS, PROXY_PORT = "10.200.0.1", 3128
PROXY_URL = f"http://{PROXY_ADDRESS}:{PROXY_PORT}"

BASE_READ_ONLY = (
    "/usr",
    "/bin",
    "/sbin",
    "/lib",
    "/lib64",
    "/opt/saw",
    "/proc",
    "/run/saw/sandbox",
    "/run/saw/mcp",
    "/etc/alternatives",
    "/etc/bash.bashrc",
    "/etc/ca-certificates",
    "/etc/group",
    "/etc/hosts",
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/nsswitch.conf",
    "/etc/passwd",
    "/etc/profile",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/terminfo",
)
"""What a process needs to start at all; the policy adds to it. ``/etc/shadow`` and the rest of ``/etc`` are absent."""

BASE_READ_WRITE = ("/run/saw/shell", "/tmp", "/var/tmp", SHARED_MEMORY)  # noqa: S108
"""Writable in every sandbox: its own private temporary directories and the directory of its two sockets."""

SHELL_ALONE = ("/run/saw/shell",)
"""Of these, what always-on agents do not have: a command sent there runs in the main sandbox."""

UNREACHABLE = (
    "/etc/shadow",
    "/etc/gshadow",
    "/root",
    "/boot",
    "/sys",
    "/run/systemd",
    "/run/dbus",
    "/var/lib/saw",
    "/etc/saw",
)
"""Never listed in a policy; covered up where a listed directory holds one of them."""


_PROGRAM_SUFFIXES = {".js", ".mjs", ".cjs", ".py"}


class SandboxError(SawError):
    """The sandbox cannot be compiled, prepared or checked as the policy asks."""

    code = "sandbox_invalid"


@dataclass(frozen=True)
class RuntimePaths:
    """Where the installed distribution lies: the interpreter and the folder of ``saw.runtime``."""

    python: str = sys.executable
    package: str = str(Path(__file__).parent)


@dataclass(frozen=True)
class McpServerSpec:
    """One stdio MCP server: its command and the directories it is narrowed to."""

    name: str
    command: tuple[str, ...]
    read_only: tuple[str, ...]
    read_write: tuple[str, ...]


@dataclass(frozen=True)
class AgentSpec:
    """One always-on agent: its command and when systemd starts it again (``Restart=``)."""

    name: str
    command: tuple[str, ...]
    restart: str

    @property
    def unit(self) -> str:
        """Return the name of its unit."""
        return f"saw-agent@{self.name}.service"

    @property
    def launch(self) -> str:
        """Return the name of its launch file."""
        return f"agent-{self.name}.json"


@dataclass(frozen=True)
class SandboxSpec:
    """Everything that the units, launch files and checks of one generation are made from. Paths are absolute."""

    user: str
    group: str
    uid: int
    gid: int
    home: str
    workdir: str
    read_only: tuple[str, ...]
    read_write: tuple[str, ...]
    minimum_abi: int
    environment: Mapping[str, str]
    limits: Limits
    mcp_servers: tuple[McpServerSpec, ...] = ()
    agents: tuple[AgentSpec, ...] = ()
    devices: tuple[str, ...] = ()
    """Device nodes of a GPU that the policy grants to the main sandbox; MCP servers get none."""
    paths: RuntimePaths = RuntimePaths()
    persistence: Persistence = field(default_factory=Persistence)

    @property
    def base_read_only(self) -> tuple[str, ...]:
        """Return :data:`BASE_READ_ONLY` and, when installed elsewhere, the interpreter's and the package's folders."""
        extra: tuple[str, ...] = (
            str(Path(self.paths.package).parents[1]),
            str(Path(self.paths.python).resolve().parents[1]),
        )
        extra += (str(Path(self.paths.python).parents[1]),)
        missing = tuple(p for p in dict.fromkeys(extra) if not any(_inside(p, base) for base in BASE_READ_ONLY))
        return BASE_READ_ONLY + missing

    @property
    def protected(self) -> tuple[str, ...]:
        """Return the paths in the home directory that stay read-only, when the home is writable at all."""
        if not any(_inside(self.home, path) or _inside(path, self.home) for path in self.read_write):
            return ()
        inside = tuple(f"{self.home}/{name}" for name, _ in self.persistence.places())
        return tuple(p for p in inside if any(_inside(p, path) for path in self.read_write))

    def shell_launch(self) -> Launch:
        """Return the launch file of the main sandbox (shell, agent, one-shot commands)."""
        return Launch(
            uid=self.uid,
            minimum_abi=self.minimum_abi,
            read_only=tuple(dict.fromkeys((*self.base_read_only, *self.read_only))),
            read_write=tuple(dict.fromkeys((*BASE_READ_WRITE, *self.read_write))),
            devices=(*DEVICES, *self.devices),
            connect_ports=(PROXY_PORT,),
            rlimits=dict(self.limits.rlimits),
            environment=dict(self.environment),
            workdir=self.workdir,
        )

    def agent_launch(self) -> Launch:
        """Return the launch file of an always-on agent: what the main sandbox has, without the sockets into that one."""
        launch = self.shell_launch()
        return replace(launch, read_write=tuple(p for p in launch.read_write if p not in SHELL_ALONE))

    def mcp_launch(self, server: McpServerSpec) -> Launch:
        """Return the launch file of one MCP server: only its own directories, and no network at all."""
        base = tuple(p for p in self.base_read_only if p != "/run/saw/mcp")
        return replace(
            self.shell_launch(),
            read_only=(*base, *server.read_only),
            read_write=("/tmp", SHARED_MEMORY, *server.read_write),  # noqa: S108
            devices=DEVICES,
            connect_ports=(),
            environment={
                "HOME": self.home,
                "PATH": self.environment["PATH"],
                "LANG": "C.UTF-8",
                **git_environment(self.persistence),
            },
            workdir=(*server.read_write, *server.read_only, "/")[0],
        )


def _inside(path: str, directory: str) -> bool:
    return PurePosixPath(path).is_relative_to(directory)


def credential_key(identifier: str) -> str:
    """Return the environment variable that stands for the credential ``identifier`` (``git-token`` → ``GIT_TOKEN``)."""
    return re.sub(r"[^A-Z0-9]", "_", identifier.upper())


def environment(governance: Governance, *, user: str, home: str) -> dict[str, str]:
    """Return the sandbox's environment: proxy, trust anchors, Git's settings, a placeholder (never a secret) per credential."""
    values = {
        "HOME": home,
        "USER": user,
        "LOGNAME": user,
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/bin:/usr/bin:/bin:/opt/saw/libexec",
        "NODE_USE_ENV_PROXY": "1",
    }
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WS_PROXY", "WSS_PROXY"):
        values[name] = values[name.lower()] = PROXY_URL
    values["NO_PROXY"] = values["no_proxy"] = "localhost,127.0.0.1,::1"
    for name in (
        "SSL_CERT_FILE",
        "REQUESTS_CA_BUNDLE",
        "CURL_CA_BUNDLE",
        "GIT_SSL_CAINFO",
        "DENO_CERT",
        "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
        # These two win over a machine's own settings file, which may name an authority of its own.
        "NPM_CONFIG_CAFILE",
        "PIP_CERT",
    ):
        values[name] = CA_BUNDLE
    values["NODE_EXTRA_CA_CERTS"] = RING1_CA
    values["APT_CONFIG"] = APT_CONFIG
    values["JAVA_TOOL_OPTIONS"] = _java_options()
    values |= git_environment(governance.persistence)
    for credential in governance.credentials:
        key = credential_key(credential.id)
        if key in values:
            raise SandboxError(
                f"credential {credential.id!r} would replace the environment variable {key}",
                cure="give the credential another id in governance.yaml",
            )
        values[key] = placeholder(credential.id)
    return values


def _java_options() -> str:
    """Return the options that bring a Java virtual machine to the proxy and to our authorities: it reads no other variable.

    No quotes in it and no spaces but those between options, so that it means the same to every program that reads it.
    """
    options = {"http.nonProxyHosts": "localhost|127.*|[::1]"}
    for scheme in ("http", "https"):
        options |= {f"{scheme}.proxyHost": PROXY_ADDRESS, f"{scheme}.proxyPort": str(PROXY_PORT)}
    options |= {"javax.net.ssl.trustStore": JAVA_TRUST, "javax.net.ssl.trustStoreType": "PKCS12"}
    return " ".join(f"-D{name}={value}" for name, value in options.items())


def placeholder(identifier: str) -> str:
    """Return what stands for a credential inside the sandbox.

    The gatekeeper knows it by its beginning and lets it out in no header and no query; in bodies it may be spoken of.
    """
    return f"openshell:resolve:env:{credential_key(identifier)}"


def compile_spec(
    policy: Policy,
    governance: Governance,
    *,
    paths: RuntimePaths | None = None,
    machine: Machine | None = None,
    account: tuple[int, int, str] | None = None,
) -> SandboxSpec:
    """Compile the sandbox of a generation.

    ``account`` is (uid, gid, home) of ``process.run_as_user``; looked up when absent. ``machine`` is what its limits are
    bounded by; absent: this one. Raises :class:`SandboxError` for
    root, unknown users, paths that reach the system's own secrets, and MCP servers that ask for more than the sandbox has.
    """
    user = policy.process.run_as_user
    uid, gid, home = account or _account(user)
    if uid == 0 or gid == 0:
        raise SandboxError(f"process.run_as_user {user!r} is root", cure="name an unprivileged user in policy.yaml")
    files = policy.filesystem_policy
    workdir = f"{home}/project"
    read_write = list(files.read_write)
    if files.include_workdir and not any(_inside(workdir, path) for path in read_write):
        read_write.append(workdir)
    read_only = tuple(p for p in files.read_only if p not in DEVICES)
    devices = tuple(p for p in read_write if GPU_DEVICE.match(p))
    writable = tuple(p for p in read_write if p not in DEVICES and p not in devices)
    for path in (*read_only, *writable):
        _refuse_reserved(path, writable=path in writable)
    spec = SandboxSpec(
        user=user,
        group=policy.process.run_as_group,
        uid=uid,
        gid=gid,
        home=home,
        workdir=workdir if any(_inside(workdir, p) for p in (*writable, *read_only)) else "/",
        read_only=read_only,
        read_write=writable,
        minimum_abi=_minimum_abi(policy, governance),
        environment=environment(governance, user=user, home=home),
        devices=devices,
        limits=limits_of(governance.sandbox.limits, machine or here()),
        paths=paths or RuntimePaths(),
        persistence=governance.persistence,
    )
    _check_persistence(spec)
    servers = [
        _mcp_server(spec, name, server.command, tuple(_under(server)))
        for name, server in sorted(governance.mcp.servers.items())
        if server.transport == "stdio"
    ]
    agents = (AgentSpec(name, one.command, one.restart) for name, one in sorted(governance.sandbox.agents.items()))
    return replace(spec, mcp_servers=tuple(servers), agents=tuple(agents))


def load_spec(generation: Path = GENERATION, **options: object) -> SandboxSpec:
    """Compile the sandbox of the generation folder ``generation`` (``policy.yaml`` and ``governance.yaml``)."""
    from saw.policy.loader import load_governance, load_policy

    try:
        raw_policy = (generation / "policy.yaml").read_bytes()
        raw_governance = (generation / "governance.yaml").read_bytes()
    except OSError as error:
        raise SandboxError(
            f"no policy generation is loaded: {error.filename}: {error.strerror}",
            cure="see `systemctl status saw-policyd`; nothing starts before a verified generation is there",
        ) from error
    return compile_spec(load_policy(raw_policy), load_governance(raw_governance), **options)  # type: ignore[arg-type]


def encode_launch(launch: Launch) -> bytes:
    """Return the launch file (JSON, readable by the sandbox; holds no secret)."""
    return msgspec.json.format(msgspec.json.encode(launch), indent=1) + b"\n"


def _account(user: str) -> tuple[int, int, str]:
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise SandboxError(
            f"user {user!r} does not exist here", cure="create it, or correct process.run_as_user"
        ) from None
    return entry.pw_uid, entry.pw_gid, entry.pw_dir


def _minimum_abi(policy: Policy, governance: Governance) -> int:
    if policy.landlock.compatibility == "best_effort" and governance.landlock.allow_best_effort:
        return 0
    return governance.landlock.minimum_abi


def _refuse_reserved(path: str, *, writable: bool) -> None:
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts or path != str(pure) or len(pure.parts) < 2:
        raise SandboxError(f"{path!r} is not a plain absolute path below /", cure="correct filesystem_policy")
    if re.search(r"[\s:%\"'\\]", path):
        raise SandboxError(f"{path!r} has characters that a unit file cannot carry", cure="rename the directory")
    for reserved in UNREACHABLE:
        if _inside(path, reserved):
            raise SandboxError(f"{path} holds secrets or controls of the host", cure="remove it from filesystem_policy")
    if not writable:
        return
    for reserved in (*UNREACHABLE, *BASE_READ_ONLY):
        if _inside(path, reserved) or _inside(reserved, path):
            raise SandboxError(
                f"{path} must not be writable: it covers {reserved}", cure="list it as read_only, or narrow it"
            )


def _check_persistence(spec: SandboxSpec) -> None:
    """Refuse hooks that the sandbox could write or not read, and files of the home that it would not see."""
    hooks = spec.persistence.git_hooks
    if hooks:
        if any(_inside(hooks, path) or _inside(path, hooks) for path in (*BASE_READ_WRITE, *spec.read_write)):
            raise SandboxError(
                f"persistence.git_hooks {hooks} can be written in the sandbox", cure="name a read-only one"
            )
        if not any(_inside(hooks, path) for path in (*spec.base_read_only, *spec.read_only)):
            raise SandboxError(
                f"persistence.git_hooks {hooks} cannot be read in the sandbox", cure="list it as read_only"
            )
    for name in spec.persistence.files:
        if not any(_inside(f"{spec.home}/{name}", path) for path in (*spec.read_only, *spec.read_write)):
            raise SandboxError(
                f"persistence.files: {spec.home}/{name} does not exist in the sandbox",
                cure="list the home directory in filesystem_policy, or remove the file",
            )


def _under(server: object) -> list[str]:
    found: list[str] = []
    for tool in getattr(server, "tools", {}).values():
        pending = list(tool.args.values())
        while pending:
            argument = pending.pop()
            if argument.under:
                found.append(argument.under)
            if argument.items is not None:
                pending.append(argument.items)
    return found


def _mcp_server(spec: SandboxSpec, name: str, command: tuple[str, ...], under: tuple[str, ...]) -> McpServerSpec:
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,31}", name):
        raise SandboxError(f"MCP server name {name!r} is not usable", cure="use lower-case letters, digits and dashes")
    if not command:
        raise SandboxError(
            f"MCP server {name!r} has no command", cure="set mcp.servers.{name}.command in governance.yaml"
        )
    wanted = [item for item in (*command[1:], *under) if item.startswith("/")]
    outermost = [p for p in dict.fromkeys(wanted) if not any(p != q and _inside(p, q) for q in wanted)]
    read_write = tuple(p for p in outermost if any(_inside(p, allowed) for allowed in spec.read_write))
    known = (*spec.read_only, *spec.base_read_only)
    reading = [p for p in outermost if p not in read_write and any(_inside(p, allowed) for allowed in known)]
    beyond = [p for p in outermost if p not in (*read_write, *reading)]
    if beyond:
        raise SandboxError(
            f"MCP server {name!r} wants {', '.join(beyond)}, which the sandbox itself may not reach",
            cure="list the path in filesystem_policy, or change the server's command and `under`",
        )
    programs = [p for p in (command[0], *reading) if p == command[0] or PurePosixPath(p).suffix in _PROGRAM_SUFFIXES]
    homes = [allowed for allowed in spec.read_only for p in programs if _inside(p, allowed)]
    read_only = tuple(dict.fromkeys((*(p for p in reading if p not in programs), *homes)))
    return McpServerSpec(name, command, read_only, read_write)
