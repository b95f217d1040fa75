"""The compiled units on a host with a booted systemd: each profile starts and keeps its shared memory to itself.

The host is a container without Landlock, so what is refused here is refused by the units alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import PROBE, PYTHON, ROOT, SOURCE, wait_until
from saw.lab.nspawn import LabNetwork, LightHost
from saw.lab.process import recall
from saw.runtime import sandbox_prepare, sandbox_units
from saw.runtime.sandbox import AgentSpec, RuntimePaths, SandboxError, SandboxSpec

sys.path.insert(0, str(ROOT / "tests" / "unit" / "sandbox"))
TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"), key=lambda path: path.stat().st_mtime)
PACKAGES = "/usr/lib/python3/dist-packages"
CLIENT = f"{PACKAGES}/saw/runtime/shell_client.py"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to boot a host"),
    pytest.mark.skipif(not TARS, reason="no base tree in build/cache: run `make workspace` once"),
]


class Booted:
    """Commands on the booted host, by its namespaces."""

    spec: SandboxSpec

    def __init__(self, pid: int) -> None:
        self.root = Path(f"/proc/{pid}/root")
        self.prefix = ["nsenter", "-t", str(pid), "-a", "--"]

    def run(self, *command: str, check: bool = True, data: bytes = b"") -> str:
        done = subprocess.run([*self.prefix, *command], input=data, capture_output=True, check=False, timeout=60)
        if check and done.returncode:
            log = subprocess.run(
                [*self.prefix, "journalctl", "-n", "30", "--no-pager"], capture_output=True, check=False
            )
            raise AssertionError(f"{command}: {done.stderr.decode()}\n{log.stdout.decode()}")
        return done.stdout.decode()

    def write(self, path: str, content: bytes, mode: str = "644") -> None:
        self.run("sh", "-ec", 'mkdir -p "${1%/*}"; cat >"$1"; chmod "$2" "$1"', "sh", path, mode, data=content)


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """A booted host with the sandbox's units of a compiled policy running."""
    from test_sandbox_spec import build

    number = os.getpid() % 100000
    lan = LabNetwork(f"sawu{number}", f"10.95.{number % 250}")
    host = LightHost("units", f"{lan.prefix}.10", tmp_path_factory.mktemp("lab"), lan, "all")
    try:
        host.unpack(TARS[-1])
        shutil.copytree(SOURCE / "saw", Path(f"{host.root}{PACKAGES}/saw"))
        (host.root / "etc/passwd").open("a").write(
            "agent:x:2000:2000::/home/agent:/bin/sh\nsaw-mcp:x:2001:2001::/var/empty:/bin/sh\n"
            "saw-forward:x:2002:2002::/:/bin/sh\n"
        )
        (host.root / "etc/group").open("a").write("agent:x:2000:\nsaw-mcp:x:2001:\nsaw-forward:x:2002:\n")
        project = host.root / "home/agent/project"
        project.mkdir(parents=True)
        for path in (project.parent, project):
            os.chown(path, 2000, 2000)
        host.up(TARS[-1], patience=90)
        yield _bring_up(host, build)
    finally:
        host.down(purge=True)
        lan.down()


def _bring_up(host: LightHost, build: Callable) -> Booted:
    nspawn = recall(host.pid_file)
    children = Path(f"/proc/{nspawn}/task/{nspawn}/children").read_text(encoding="ascii").split()
    machine = Booted(int(children[0]))
    version = int(machine.run("systemctl", "--version").split()[1])
    # Nodes of two GPUs that no driver answers for. The policy grants the first.
    for number in ("0", "1"):
        machine.run("mknod", "-m", "666", f"/dev/nvidia{number}", "c", "195", number)
    spec = build(compatibility="best_effort", best_effort="true", read_write=", /dev/nvidia0")
    server = replace(spec.mcp_servers[0], command=(PYTHON, "/run/saw/sandbox/probe.py", *MCP_CASES))
    idle = replace(server, name="idle", command=("/usr/bin/sleep", "600"))
    watch = AgentSpec("night-watch", (PYTHON, "/run/saw/sandbox/watch.py"), "on-failure")
    spec = replace(
        spec, paths=RuntimePaths(PYTHON, f"{PACKAGES}/saw/runtime"), mcp_servers=(server, idle), agents=(watch,)
    )
    machine.spec = spec
    machine.run("install", "-d", "-o", "2000", "-g", "2000", "/run/saw/shell")
    machine.run("install", "-d", "/run/saw/mcp", "/run/saw/mcp-server", "/run/saw/generations", "/run/saw/ring1-ca")
    machine.run("ip", "netns", "add", "saw-sandbox")
    for name, content in sandbox_units.compile_launch_files(spec).items():
        machine.write(f"/run/saw/sandbox/{name}", content)
    machine.write("/run/saw/sandbox/probe.py", PROBE.read_bytes())
    machine.write("/run/saw/sandbox/watch.py", WATCH.encode())
    machine.write("/run/saw/sandbox/ca-bundle.pem", b"public\n")
    machine.write("/run/saw/ring1-ca/ca.key", b"secret\n", "600")
    machine.run("ln", "-s", "closed", "/run/saw/generations/current")
    machine.write("/dev/shm/saw-probe-host", b"the host's\n", "666")
    units = sandbox_units.compile_units(spec, systemd=version)
    units["saw-sandbox-net.service"] = "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
    for name, text in units.items():
        machine.write(f"/run/systemd/system/{name}", text.encode())
    for path in spec.protected:
        kind = "d" if dict(spec.persistence.places())[path.removeprefix(f"{spec.home}/")] else "f"
        machine.run("sh", "-ec", f'mkdir -p "${{1%/*}}"; {"mkdir -p" if kind == "d" else "touch"} "$1"', "sh", path)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "saw-shell.service", "saw-mcp-server-files.socket", "saw-mcp-server-idle.socket")
    wait_until(lambda: machine.run("sh", "-c", "test -S /run/saw/shell/exec.sock && echo 1", check=False))
    return machine


MCP_CASES = ("read-host-shm", "write-shm", "write-tmp", "read-gpu-0", "read-gpu-1")
WATCH = """
import json, subprocess, time
words = ["python3", "/run/saw/sandbox/probe.py", "read-host-shm", "write-tmp", "write-unit", "read-ring1-ca", "tcp-socket"]
with open("/home/agent/project/watched", "a") as stream:
    stream.write(json.dumps(json.loads(subprocess.run(words, capture_output=True).stdout)) + "\\n")
time.sleep(600)
"""
HOLD = """
import socket, time
with socket.socket(socket.AF_UNIX) as s:
    s.connect("/run/saw/mcp-server/idle.sock")
    print("held", flush=True)
    time.sleep(60)
"""
RELAY = """
import socket
with socket.socket(socket.AF_UNIX) as s:
    s.connect("/run/saw/mcp-server/files.sock")
    s.settimeout(30)
    print(s.makefile().read())
"""


def probe(machine: Booted, profile: str, *cases: str) -> dict[str, str]:
    """Run the probe in one profile of the sandbox, or on the host itself, as root."""
    words = (PYTHON, "/run/saw/sandbox/probe.py", *cases)
    if profile == "host":
        return json.loads(machine.run(*words))
    if profile == "MCP server":
        return json.loads(machine.run(PYTHON, "-c", RELAY))
    if profile == "shell":  # what the interactive shell sees: the view of the unit's main process, as the agent
        main = machine.run("systemctl", "show", "--property=MainPID", "--value", "saw-shell.service").strip()
        entered = ("nsenter", "-t", main, "-m", "--", "setpriv", "--reuid=2000", "--regid=2000", "--clear-groups")
        return json.loads(machine.run(*entered, *words))
    return json.loads(machine.run(PYTHON, "-I", "-S", CLIENT, "--", *words))


@pytest.mark.control("RUN-03")
@pytest.mark.parametrize("profile", ["shell", "one-shot run", "MCP server"])
def test_shared_memory_is_the_units_own(booted: Booted, profile: str) -> None:
    inside = probe(booted, profile, *MCP_CASES)
    assert {name: inside[name] for name in MCP_CASES[:3]} == {
        "read-host-shm": "ENOENT",
        "write-shm": "ok",
        "write-tmp": "ok",
    }
    assert probe(booted, "host", "read-host-shm") == {"read-host-shm": "ok"}


@pytest.mark.control("GPU-01")
@pytest.mark.parametrize("profile", ["shell", "one-shot run", "MCP server"])
def test_a_gpu_is_there_only_where_the_policy_grants_it(booted: Booted, profile: str) -> None:
    """A node that is there leads to the kernel, which has no such driver here (ENXIO); one that is not granted is absent."""
    outside = probe(booted, "host", "read-gpu-0", "read-gpu-1")
    assert outside == {"read-gpu-0": "ENXIO", "read-gpu-1": "ENXIO"}
    inside = probe(booted, profile, *MCP_CASES)
    granted = "ENOENT" if profile == "MCP server" else "ENXIO"
    assert (inside["read-gpu-0"], inside["read-gpu-1"]) == (granted, "ENOENT")


@pytest.mark.control("RUN-03")
def test_shared_memory_has_an_end_and_is_not_seen_by_the_host(booted: Booted) -> None:
    def shell(script: str) -> str:
        return booted.run(PYTHON, "-I", "-S", CLIENT, "--", "/bin/sh", "-c", script, check=False)

    assert shell("head -c 1000000 /dev/zero >/dev/shm/some && stat -c %s /dev/shm/some").strip() == "1000000"
    assert booted.run("ls", "/dev/shm").split() == ["saw-probe-host"]
    assert shell("head -c 600M /dev/zero >/dev/shm/more 2>/dev/null || echo full; rm /dev/shm/*").strip() == "full"


OUR_FILES = {
    "write-generation": "ENOENT",
    "replace-generation": "ENOENT",
    "write-ring1-ca": "ENOENT",
    "read-ring1-ca": "ENOENT",
    "replace-ca-bundle": "EROFS",
    "write-unit": "ENOENT",
    "write-unit-etc": "ENOENT",
    "netlink-nft": "EPERM",
}


@pytest.mark.control("POL-05")
def test_the_agent_cannot_edit_policy_authority_units_or_packet_filter(booted: Booted) -> None:
    assert probe(booted, "one-shot run", *OUR_FILES) == OUR_FILES
    allowed = ("replace-own-file", "read-ca-bundle", "tcp-socket")
    assert probe(booted, "one-shot run", *allowed) == dict.fromkeys(allowed, "ok")
    assert probe(booted, "host", *OUR_FILES) == dict.fromkeys(OUR_FILES, "ok")


@pytest.mark.control("RUN-05")
def test_an_mcp_server_that_left_the_policy_is_stopped_and_removed(booted: Booted) -> None:
    held = subprocess.Popen([*booted.prefix, PYTHON, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    try:
        assert held.stdout is not None
        assert held.stdout.readline() == "held\n"
        instance = "saw-mcp-server-idle@*.service"
        wait_until(lambda: "running" in booted.run("systemctl", "list-units", "--no-legend", instance))
        folder, launches = booted.root / "run/systemd/system", booted.root / "run/saw/sandbox"
        (folder / "saw-mcp-of-others.service").write_text("[Service]\nExecStart=/bin/true\n")

        def stop(names: list[str]) -> None:
            booted.run("systemctl", "stop", "--", *names)

        def fail(names: list[str]) -> None:
            raise SandboxError("told to")

        def retire(spec: SandboxSpec, stopping: Callable[[list[str]], None]) -> list[str]:
            removed = sandbox_prepare.retire(spec, stopping, launch_directory=str(launches), unit_directory=str(folder))
            return sorted(Path(path).name for path in removed)

        kept = [server for server in booted.spec.mcp_servers if server.name == "files"]
        without = replace(booted.spec, mcp_servers=tuple(kept))
        assert retire(booted.spec, fail) == []
        with pytest.raises(SandboxError):
            retire(without, fail)
        assert (folder / "saw-mcp-server-idle.socket").exists()
        assert retire(without, stop) == [
            "mcp-idle.json",
            "saw-mcp-idle.service",
            "saw-mcp-server-idle.socket",
            "saw-mcp-server-idle@.service",
        ]
        assert booted.run("systemctl", "list-units", "--no-legend", "saw-mcp-server-idle*") == ""
        assert "inactive" in booted.run("systemctl", "is-active", "saw-mcp-server-idle.socket", check=False)
        # Its twin: the server that stays, and what is not ours, are as they were.
        assert booted.run("systemctl", "is-active", "saw-mcp-server-files.socket").strip() == "active"
        assert sorted(path.name for path in folder.glob("saw-mcp-*")) == [
            "saw-mcp-files.service",
            "saw-mcp-of-others.service",
            "saw-mcp-server-files.socket",
            "saw-mcp-server-files@.service",
        ]
        assert (launches / "shell.json").exists()
        assert retire(without, fail) == []
    finally:
        held.kill()
        held.wait()
        held.stdout.close()


@pytest.mark.control("RUN-03")
def test_temporary_directories_and_open_files_have_an_end_that_the_host_does_not_feel(booted: Booted) -> None:
    """By bytes and by files; memory and tasks are tried where there are controllers for them (test_limits_in_a_vm.py)."""
    booted.write("/run/saw/sandbox/limits_probe.py", Path(__file__).with_name("limits_probe.py").read_bytes())

    def wants(*words: str) -> dict[str, object]:
        program = (PYTHON, "/run/saw/sandbox/limits_probe.py", *words)
        return json.loads(booted.run(PYTHON, "-I", "-S", CLIENT, "--", *program))

    for place in ("/tmp", "/var/tmp", "/dev/shm"):
        assert wants("bytes", "600", f"{place}/x") == {"count": 512, "stopped": "ENOSPC"}
        assert wants("bytes", "100", f"{place}/x") == {"count": 100, "stopped": ""}
    assert wants("inodes", "100", "/run/saw/shell/x")["stopped"] == "ENOSPC"
    assert wants("bytes", "1", "/run/saw/shell/x")["stopped"] == "ENOSPC"
    assert wants("files", "9000")["stopped"] == "EMFILE"
    assert wants("files", "8000") == {"count": 8000, "stopped": ""}
    mounted = booted.run("findmnt", "-rno", "TARGET,FSTYPE")
    for place in ("/run/saw/shell", "/run/saw/scratch/shell/tmp", "/run/saw/scratch/shell/var"):
        assert f"{place} tmpfs" in mounted
    assert (
        booted.run(PYTHON, "-I", "-S", CLIENT, "--", "sh", "-ec", "cp /bin/true /tmp/x; /tmp/x && echo ran").strip()
        == "ran"
    )
    seen = booted.run("sh", "-c", "ls /run/saw/scratch/shell/tmp; ls /tmp")
    assert seen.split()[0] == "x", "malware scans look there"
    assert "x" not in booted.run("ls", "/tmp").split()
    agent = ("setpriv", "--reuid=2000", "--regid=2000", "--clear-groups", "ls", "/run/saw/scratch/shell/tmp")
    booted.run("chmod", "700", "/run/saw/scratch")
    assert booted.run(*agent, check=False) == ""


@pytest.mark.control("RUN-03")
def test_an_always_on_agent_runs_while_a_policy_is_in_force_and_is_started_again(booted: Booted) -> None:
    unit = "saw-agent@night-watch.service"
    watched = booted.root / "home/agent/project/watched"

    def lines() -> int:
        return len(watched.read_text().splitlines()) if watched.exists() else 0

    def shown(name: str) -> str:
        return booted.run("systemctl", "show", f"--property={name}", "--value", unit).strip()

    booted.run("systemctl", "start", unit)
    assert (shown("ActiveState"), shown("ConditionResult")) == ("inactive", "no"), "no policy is in force"
    booted.write("/run/saw/generations/closed/policy.yaml", b"version: 1\n")
    try:
        booted.run("systemctl", "start", unit)
        wait_until(lambda: lines() == 1, 90)
        assert (shown("ActiveState"), shown("Slice")) == ("active", "sandbox.slice")
        assert json.loads(watched.read_text().splitlines()[0]) == {
            "read-host-shm": "ENOENT",
            "write-tmp": "ok",
            "write-unit": "ENOENT",
            "read-ring1-ca": "ENOENT",
            "tcp-socket": "ok",
        }
        first = shown("MainPID")
        booted.run("kill", "-9", first)
        wait_until(lambda: lines() == 2, 120)
        assert (shown("ActiveState"), shown("NRestarts")) == ("active", "1")
        folder, launches = booted.root / "run/systemd/system", booted.root / "run/saw/sandbox"

        def stop(names: list[str]) -> None:
            booted.run("systemctl", "stop", "--", *names)

        gone = sandbox_prepare.retire(
            replace(booted.spec, agents=()), stop, launch_directory=str(launches), unit_directory=str(folder)
        )
        assert sorted(Path(path).name for path in gone if path.endswith((".service", ".json"))) == [
            "agent-night-watch.json",
            unit,
        ]
        assert shown("ActiveState") == "inactive", "it was ended by force"
        assert "agent-night-watch" not in booted.run("findmnt", "-rno", "TARGET")
        assert booted.run("systemctl", "is-active", "saw-shell.service").strip() == "active"
    finally:
        booted.run("rm", "-r", "/run/saw/generations/closed")


SERVE = """
import socket
with socket.create_server(("127.0.0.1", 3000)) as listener:
    while True:
        with listener.accept()[0] as client:
            client.sendall(b"hello from the agent")
"""
REACH = """
import socket, sys
from saw.mux import Frame, Frames, Kind, encode
frames, found = Frames(), b""
with socket.socket(socket.AF_UNIX) as s:
    s.settimeout(30)
    try:
        s.connect("/run/saw/forward.sock")
    except OSError as error:
        sys.exit(print(type(error).__name__))
    s.sendall(sys.argv[1].encode() + b"\\n" + encode(Frame(Kind.OPEN, 1)))
    while piece := s.recv(65536):
        for frame in frames.feed(piece):
            found += frame.data if frame.kind is Kind.DATA else b""
            if frame.kind in {Kind.END, Kind.RESET}:
                sys.exit(print(found.decode() or "cut"))
print(found.decode() or "nothing")
"""


@pytest.fixture(scope="module")
def forwarding(booted: Booted) -> Iterator[Booted]:
    """The units of forwarded ports as the role installs them, but for the place of the program; and a server of the agent's."""
    for name in ("saw-forward.socket", "saw-forward@.service"):
        text = (ROOT / "roles/sandbox/templates" / f"{name}.j2").read_text().replace("{{ ansible_managed }}", "test")
        program = f'{PYTHON} -c "import sys; from saw.runtime.forward import serve; sys.exit(serve())"'
        text = text.replace("/opt/saw/bin/saw sandbox forward-serve", program)
        booted.write(f"/run/systemd/system/{name}", text.encode())
    booted.run("ip", "-n", "saw-sandbox", "link", "set", "lo", "up")
    booted.run("systemctl", "daemon-reload")
    booted.run("systemctl", "start", "saw-forward.socket")
    inside = [*booted.prefix, PYTHON, "-I", "-S", CLIENT, "--", PYTHON, "-c", SERVE]
    server = subprocess.Popen(inside, stdin=subprocess.DEVNULL)
    try:
        wait_until(lambda: ":3000" in booted.run("ip", "netns", "exec", "saw-sandbox", "ss", "-ltnH"))
        yield booted
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.control("NET-02")
def test_a_port_of_the_sandbox_is_reached_through_its_unit_by_its_account_alone(forwarding: Booted) -> None:
    def reach(port: str, *account: str) -> str:
        return forwarding.run(*account, PYTHON, "-c", REACH, port).strip()

    forward = ("setpriv", "--reuid=2002", "--regid=2002", "--clear-groups")
    agent = ("setpriv", "--reuid=2000", "--regid=2000", "--clear-groups")
    assert reach("3000", *forward) == "hello from the agent"
    assert reach("3001", *forward) == "cut", "nobody listens there"
    assert reach("22", *forward) == "nothing"
    assert reach("3000", *agent) == "PermissionError"
    assert reach("3000", PYTHON, "-I", "-S", CLIENT, "--") == "FileNotFoundError", (
        "in the sandbox there is no such socket"
    )
    user = forwarding.run("systemctl", "show", "--property=User", "--value", "saw-forward@0.service").strip()
    assert user == "saw-forward"
