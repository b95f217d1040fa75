"""A workspace host without TPM and credential: everything is in place and enabled, and waits for its conditions."""

from __future__ import annotations

import json

import pytest

testinfra_hosts = ["guest"]

WAITING = (
    "saw-bootstrap.service",
    "saw-attestd.service",
    "saw-policyd.service",
    "saw-decide.service",
    "saw-ring1.service",
)


@pytest.mark.parametrize("unit", [*WAITING, "saw-sandbox-net.service", "saw-sandbox-apply.path", "saw-ssh-reload.path"])
def test_the_unit_is_enabled_and_not_failed(host, unit):
    assert host.run(f"systemctl is-enabled {unit}").stdout.strip() == "enabled"
    assert host.run(f"systemctl is-failed {unit}").rc != 0, host.run(f"journalctl -u {unit} --no-pager -n 30").stdout


@pytest.mark.parametrize("unit", WAITING)
def test_the_unit_waits_for_its_conditions(host, unit):
    shown = host.run(f"systemctl show --property=ActiveState,ConditionResult {unit}").stdout
    assert "ActiveState=inactive" in shown
    assert "ConditionResult=no" in shown


def test_the_agent_is_an_unprivileged_account_without_shell_files_or_password(host):
    agent = host.user("agent")
    assert (agent.uid, agent.gid, agent.shell, agent.home) == (2000, 2000, "/bin/sh", "/home/agent")
    assert agent.groups == ["agent"]
    assert host.run("getent shadow agent").stdout.split(":")[1].startswith("!")
    assert host.file("/home/agent/project").user == "agent"


@pytest.mark.control("NET-03")
def test_the_sandbox_network_reaches_the_proxy_address_alone(host):
    assert host.run("saw sandbox check --json").rc in (0, 1)
    inside = "ip netns exec saw-sandbox"
    routes = host.run(f"{inside} ip -j route").stdout
    assert {route["dst"] for route in json.loads(routes)} == {"10.200.0.0/30"}
    assert (
        host.run(
            f"{inside} timeout 3 python3 -c \"import socket; socket.create_connection(('10.79.0.10', 8443), 2)\""
        ).rc
        != 0
    )


def test_the_proxy_configuration_that_the_installed_version_renders_is_accepted_by_envoy(host):
    done = host.run(
        "set -e; d=$(mktemp -d); mkdir -p /run/saw/generations/current; for f in lds cds; do"
        " [ -e /run/saw/generations/current/$f.json ] || echo '{\"resources\":[]}' > $d/$f.json; done;"
        " saw policyd render-bootstrap --config /etc/saw/policyd.json --output $d/bootstrap.json;"
        ' sed -i "s|/run/saw/generations/current|$d|; s|/run/saw/generations|$d|g" $d/bootstrap.json;'
        " /opt/saw/bin/envoy --mode validate -c $d/bootstrap.json --disable-hot-restart -l error;"
        " rm -r $d; rmdir /run/saw/generations/current"
    )
    assert done.rc == 0, done.stdout + done.stderr
