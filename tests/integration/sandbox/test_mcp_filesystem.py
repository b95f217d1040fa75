"""The reference filesystem MCP server behind the mediator: its own confinement, and the policy's arguments."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from conftest import PYTHON, SOURCE, wait_until
from saw.policy.loader import load_governance, load_policy
from saw.runtime.sandbox import RuntimePaths, compile_spec, encode_launch

CONNECT = str(SOURCE / "saw" / "runtime" / "mcp_connect.py")
GOVERNANCE = """
schema: 1
blueprint: {{name: coding, version: 1.0.0, owner: team}}
landlock: {{minimum_abi: 6}}
mcp:
  servers:
    files:
      transport: stdio
      command: [/usr/bin/node, {script}, /run/home/project]
      tools:
        read_text_file: {{class: auto, args: {{path: {{under: /run/home/project, required: true}}}}}}
        write_file: {{class: auto, args: {{path: {{under: /run/home/project/src, required: true}}, content: {{max_length: 99}}}}}}
"""


class Client:
    """A minimal MCP client over the bridge command."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.number = 0

    def send(self, message: dict) -> None:
        self.process.stdin.write(json.dumps({"jsonrpc": "2.0", **message}) + "\n")
        self.process.stdin.flush()

    def ask(self, method: str, params: dict) -> dict:
        self.number += 1
        self.send({"id": self.number, "method": method, "params": params})
        while True:
            answer = json.loads(self.process.stdout.readline())
            if answer.get("id") == self.number:
                return answer

    def call(self, tool: str, **arguments: object) -> dict:
        return self.ask("tools/call", {"name": tool, "arguments": arguments})


@pytest.fixture(scope="module")
def mcp(networked, launch, filesystem_server):
    """A connected client; the server is started per connection by systemd's socket activation, as in the units."""
    text = GOVERNANCE.format(script=filesystem_server)
    folder = filesystem_server.parents[4]
    policy = f"version: 1\nfilesystem_policy: {{read_only: [/usr, {folder}], read_write: [/run/home]}}\n"
    policy += "landlock: {compatibility: hard_requirement}\nprocess: {run_as_user: agent, run_as_group: agent}\n"
    spec = compile_spec(load_policy(policy.encode()), load_governance(text.encode()), account=(2000, 2000, "/run/home"))
    spec = replace(spec, paths=RuntimePaths(PYTHON, str(SOURCE / "saw" / "runtime")))
    networked.write("/run/saw/generations/current/governance.yaml", text.encode())
    networked.write("/run/saw/policy/tools.json", b'{"bound": false}')
    networked.write("/run/saw/sandbox/mcp-files.json", encode_launch(spec.mcp_launch(spec.mcp_servers[0])))
    networked.run(
        "install", "-d", "-o", "2000", "-g", "2000", "/run/home/project", "/run/home/project/src", "/run/home/other"
    )
    networked.run("install", "-d", "-o", "990", "-g", "2000", "/run/saw/mcp")
    networked.run("mkdir", "-p", "/run/saw/mcp-server")
    networked.write("/run/home/project/readme", b"hello from the project\n")
    networked.write("/run/home/other/private", b"not for the server\n")
    networked.run("ln", "-s", "/run/home/other/private", "/run/home/project/link")
    command = (
        PYTHON,
        "-m",
        "saw.runtime.launcher",
        "--launch",
        "/run/saw/sandbox/mcp-files.json",
        "--",
        *spec.mcp_servers[0].command,
    )
    agent = ("setpriv", "--reuid=2000", "--regid=2000", "--clear-groups")
    listen = (
        "systemd-socket-activate",
        "--accept",
        "--inetd",
        "-E",
        f"PYTHONPATH={SOURCE}",
        "-l",
        "/run/saw/mcp-server/files.sock",
    )
    activation = networked.start(*listen, *agent, *command, direct=False, stderr=subprocess.DEVNULL)
    wait_until(lambda: networked.run("test", "-S", "/run/saw/mcp-server/files.sock").returncode == 0)
    networked.run("chown", "990", "/run/saw/mcp-server/files.sock")
    mediator_user = ("setpriv", "--reuid=990", "--regid=2000", "--clear-groups")
    mediator = networked.start(
        *mediator_user, sys.executable, "-m", "saw.cli.main", "mcp", "run", "files", stderr=subprocess.PIPE
    )
    wait_until(
        lambda: networked.run("test", "-S", "/run/saw/mcp/files.sock").returncode == 0 or mediator.poll() is not None
    )
    assert mediator.poll() is None, mediator.stderr.read()
    bridge = networked.start(
        PYTHON, "-I", "-S", CONNECT, "files", user=True, netns=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    client = Client(bridge)
    opening = {
        "protocolVersion": "2025-06-18",
        "capabilities": {"roots": {}},
        "clientInfo": {"name": "test", "version": "1"},
    }
    assert client.ask("initialize", opening)["result"]["capabilities"].keys() <= {"tools", "logging"}
    client.send({"method": "notifications/initialized"})
    yield client
    for process in (bridge, mediator, activation):
        process.terminate()
        process.wait(20)
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


@pytest.mark.control("RUN-05")
def test_the_agent_sees_the_allowed_tools_only(mcp):
    assert {tool["name"] for tool in mcp.ask("tools/list", {})["result"]["tools"]} == {"read_text_file", "write_file"}


@pytest.mark.control("RUN-05")
def test_arguments_decide(mcp, networked):
    allowed = mcp.call("read_text_file", path="/run/home/project/readme")
    assert "hello from the project" in json.dumps(allowed["result"])
    denied = mcp.call("read_text_file", path="/run/home/other/private")
    assert denied["error"]["data"]["reason"] == "argument_not_allowed"
    assert denied["error"]["data"]["next_steps"]
    assert mcp.call("write_file", path="/run/home/project/src/new", content="made")["result"].get("isError") is not True
    assert networked.run("cat", "/run/home/project/src/new").stdout == "made"
    assert "error" in mcp.call("write_file", path="/run/home/project/readme", content="spoiled")
    assert networked.run("cat", "/run/home/project/readme").stdout == "hello from the project\n"
    assert (
        mcp.call("move_file", source="/run/home/project/readme", destination="/x")["error"]["data"]["reason"]
        == "tool_not_allowed"
    )


@pytest.mark.control("RUN-05")
def test_a_link_out_of_the_project_is_refused_by_the_server_or_its_confinement(mcp):
    answer = mcp.call("read_text_file", path="/run/home/project/link")
    assert "not for the server" not in json.dumps(answer)
    assert answer["result"]["isError"] is True


@pytest.mark.control("RUN-05")
def test_the_agent_cannot_reach_the_server_past_the_mediator(networked, mcp):
    code = "import socket; socket.socket(socket.AF_UNIX).connect('/run/saw/mcp-server/files.sock')"
    refused = networked.run(PYTHON, "-c", code, user=True)
    assert "Permission denied" in refused.stderr
    via_mediator = code.replace("mcp-server", "mcp")
    assert networked.run(PYTHON, "-c", via_mediator, user=True).returncode == 0
