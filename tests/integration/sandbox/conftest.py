"""A private machine for the sandbox tests: own network, mount, PID and IPC namespaces with an empty ``/run``.

Names and addresses inside are the real ones; nothing that happens there reaches the machine that runs the tests, and all of
it ends with the holder process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mcp_packages import mcp_packages

ROOT = Path(__file__).parents[3]
SOURCE = ROOT / "src"
PROBE = ROOT / "tests" / "conformance" / "probes" / "sandbox_probe.py"
PYTHON = "/usr/bin/python3"
sys.path.insert(0, str(ROOT / "tests" / "unit" / "sandbox"))

LISTENERS = """
import socket, sys, threading
held = []
def serve(listener):
    listener.listen(8)
    while True:
        listener.accept()[0].close()
for port in map(int, sys.argv[2:]):
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((sys.argv[1], port))
    held.append(listener)
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\\0saw-probe-host")
held.append(abstract)
for listener in held:
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
print("ready", flush=True)
threading.Event().wait()
"""


@dataclass
class PrivateMachine:
    """Runs commands in the private namespaces of ``pid``."""

    pid: int

    def prefix(self, *, netns: bool = False, user: bool = False, direct: bool = False) -> list[str]:
        """Return the command prefix: inside the machine, its sandbox namespace, as the agent (uid 2000).

        ``direct`` leaves the PID namespace out, so that nothing forks in between and signals reach the command.
        """
        words = ["nsenter", "-t", str(self.pid), "-m", "-n", "-i", *([] if direct else ["-p"])]
        words += ["ip", "netns", "exec", "saw-sandbox"] if netns else []
        words += ["setpriv", "--reuid=2000", "--regid=2000", "--clear-groups"] if user else []
        return words

    def run(
        self, *command: str, netns: bool = False, user: bool = False, **options
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end and return what happened."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [*self.prefix(netns=netns, user=user), *command]
        return subprocess.run(
            words, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd="/", **options
        )

    def start(
        self, *command: str, netns: bool = False, user: bool = False, direct: bool = True, **options
    ) -> subprocess.Popen[str]:
        """Start in the background; the caller stops it (what is not ``direct`` ends with the machine)."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1"}
        words = [*self.prefix(netns=netns, user=user, direct=direct), *command]
        return subprocess.Popen(words, text=True, env=environment, cwd="/", **options)

    def write(self, path: str, content: bytes) -> None:
        """Write a file inside the machine (world-readable)."""
        subprocess.run(
            [*self.prefix(), "sh", "-c", 'mkdir -p "${1%/*}" && cat >"$1" && chmod 644 "$1"', "sh", path],
            input=content,
            check=True,
            timeout=20,
        )

    def saw(self, *arguments: str) -> tuple[int, dict]:
        """Run ``saw … --json`` inside and return exit code and answer."""
        answer = self.run(sys.executable, "-m", "saw.cli.main", *arguments, "--json")
        return answer.returncode, json.loads(answer.stdout)

    def confined(self, launch: str, *command: str, **options) -> subprocess.CompletedProcess[str]:
        """Run ``command`` through the launcher, as the agent, in the sandbox's network."""
        words = (PYTHON, "-m", "saw.runtime.launcher", "--launch", launch, "--", *command)
        return self.run(*words, netns=True, user=True, **options)


def wait_until(ready, seconds: float = 20.0):
    """Return the first true value of ``ready()``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = ready()
        if value:
            return value
        time.sleep(0.02)
    raise AssertionError("the state did not come within the time")


@pytest.fixture(scope="module")
def machine():
    if os.geteuid() != 0:
        pytest.skip("namespaces need root")
    script = "mount -t tmpfs none /run && mkdir -p /run/netns && ip link set lo up && echo ready && exec sleep 1000"
    flags = ["--mount", "--net", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]
    holder = subprocess.Popen(["unshare", *flags, "sh", "-ec", script], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text(encoding="ascii").split()
        yield PrivateMachine(int(children[0]))
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout:
            holder.stdout.close()


@pytest.fixture(scope="module")
def networked(machine):
    """The machine with the sandbox's network up and listeners on both sides of the link."""
    code, answer = machine.saw("sandbox", "net-up")
    assert (code, answer["changed"]) == (0, True), answer
    processes = []
    for netns, address, ports in ((False, "10.200.0.1", ("3128", "9901", "22")), (True, "10.200.0.2", ("8080",))):
        process = machine.start(PYTHON, "-c", LISTENERS, address, *ports, netns=netns, stdout=subprocess.PIPE)
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    yield machine
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope="module")
def launch(networked):
    """Path of a launch file with the real rules of a compiled policy, and the probe inside the machine."""
    from test_sandbox_spec import build

    from saw.runtime.landlock import abi
    from saw.runtime.sandbox import RuntimePaths, encode_launch

    if abi() < 6:
        pytest.skip("this kernel's Landlock is older than ABI 6 (or switched off)")
    from dataclasses import replace

    spec = replace(build(read_write=", /run/home"), paths=RuntimePaths(PYTHON, str(SOURCE / "saw" / "runtime")))
    networked.run("install", "-d", "-o", "2000", "-g", "2000", "/run/home", "/run/saw/shell")
    networked.write("/run/saw/sandbox/shell.json", encode_launch(spec.shell_launch()))
    networked.write("/run/saw/sandbox/probe.py", PROBE.read_bytes())
    networked.write("/run/saw/sandbox/ca-bundle.pem", b"public\n")
    networked.write("/run/saw/ring1-ca/ca.key", b"secret\n")
    networked.run("install", "-d", "/run/saw/generations/closed", "/run/systemd/system")
    networked.run("ln", "-s", "closed", "/run/saw/generations/current")
    return "/run/saw/sandbox/shell.json"


@pytest.fixture(scope="session")
def filesystem_server():
    """Script of the reference MCP server ``@modelcontextprotocol/server-filesystem`` from npm."""
    return mcp_packages() / "@modelcontextprotocol/server-filesystem/dist/index.js"
