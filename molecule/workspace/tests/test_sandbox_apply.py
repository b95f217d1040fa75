"""A policy generation that comes into force brings the sandbox up by itself.

The container has no Landlock, so the generation allows best effort; the rest of the confinement is the real one.
"""

from __future__ import annotations

import pytest

testinfra_hosts = ["guest"]
pytestmark = pytest.mark.usefixtures("generation")


@pytest.mark.control("RUN-03")
def test_commands_run_confined_as_the_agent(host):
    assert host.run("saw run -- id -u").stdout.strip() == "2000"
    status = host.run("saw run -- cat /proc/self/status").stdout
    assert "NoNewPrivs:\t1" in status
    assert "CapBnd:\t0000000000000000" in status


@pytest.mark.control("RUN-01")
def test_the_sandbox_is_in_its_own_network(host):
    assert host.run("saw run -- cat /proc/net/dev").stdout.count(":") == 2, "more than loopback and the link to ring 1"
    refused = host.run("saw run -- curl -s --noproxy '*' --max-time 2 http://10.79.0.40:2222/")
    assert refused.rc in {7, 28}
    assert host.run("curl -s --http0.9 --max-time 2 http://10.79.0.40:2222/").rc != 7, "nothing listens there at all"


@pytest.mark.control("RUN-02")
def test_the_agent_writes_its_home_and_nothing_else(host):
    assert host.run("saw run -- sh -c 'echo 1 > /home/agent/project/mine'").rc == 0
    for path in ("/etc/mine", "/opt/saw/mine", "/run/saw/sandbox/mine", "/home/agent/.bashrc"):
        assert host.run(f"saw run -- sh -c 'echo 1 > {path}'").rc != 0, path


def test_the_mcp_mediator_runs_as_its_own_user(host):
    assert host.service("saw-mcp-files").is_running
    assert host.run("systemctl show --property=User --value saw-mcp-files.service").stdout.strip() == "saw-mcp"


@pytest.mark.control("POL-02")
def test_a_switch_that_came_while_nobody_looked_is_found(host):
    taken = "timeout 60 sh -c 'while [ -e /run/saw/generations/switched ]; do :; done'"
    assert host.run(taken).rc == 0, "the switch that brought the sandbox up"
    host.run_expect([0], "systemctl stop saw-sandbox-apply.path && touch /run/saw/generations/switched")
    try:
        assert host.file("/run/saw/generations/switched").exists
    finally:
        host.run_expect([0], "systemctl start saw-sandbox-apply.path")
    assert host.run(taken).rc == 0, host.run("systemctl status saw-sandbox-apply.path saw-sandbox-apply.service").stdout
