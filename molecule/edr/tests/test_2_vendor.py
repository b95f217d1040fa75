"""A vendor's agent behind the same interface: installed from a package, enrolled by a token that shows nowhere, watched."""

from __future__ import annotations

import json
import secrets

import pytest

testinfra_hosts = ["bare"]
pytestmark = pytest.mark.control("P0-03")
#: An agent as vendors ship it: a package with a unit, and a command that enrols and tells its health.
AGENT = """set -e
umask 022
mkdir -p /root/agent/DEBIAN /root/agent/usr/sbin /root/agent/usr/lib/systemd/system
cat > /root/agent/DEBIAN/control <<'END'
Package: acme-agent
Version: 1.0
Architecture: all
Maintainer: Acme <acme@example.com>
Description: an agent
END
cat > /root/agent/usr/sbin/acmectl <<'END'
#!/bin/sh
case $1 in
  enrol) umask 077; cat > /var/lib/acme.id ;;
  enrolled) test -s /var/lib/acme.id ;;
  health) test -s /var/lib/acme.id && test ! -e /run/acme-ill ;;
  run) exec sleep infinity ;;
esac
END
chmod 755 /root/agent/usr/sbin/acmectl
printf '[Service]\\nExecStart=/usr/sbin/acmectl run\\n[Install]\\nWantedBy=multi-user.target\\n' \
  > /root/agent/usr/lib/systemd/system/acme-agent.service
dpkg-deb --build --root-owner-group /root/agent /root/acme.deb
"""


@pytest.fixture(scope="module")
def agent(host, play, tmp_path_factory):
    """The role's variables for that agent, with a fresh token; at the end the host has its embedded engine again."""
    import base64

    host.run_expect([0], "sh -c %s", AGENT)
    package = tmp_path_factory.mktemp("agent") / "acme.deb"
    package.write_bytes(base64.b64decode(host.check_output("base64 /root/acme.deb")))
    yield {
        "edr_provider": "vendor_package",
        "edr_vendor": {
            "deb": str(package),
            "service": "acme-agent.service",
            "health": ["/usr/sbin/acmectl", "health"],
            "enrol": ["/usr/sbin/acmectl", "enrol"],
            "enrolled": ["/usr/sbin/acmectl", "enrolled"],
        },
        "edr_vendor_token": secrets.token_hex(16),
    }
    host.run_expect([0], "apt-get --yes purge acme-agent && rm -f /var/lib/acme.id")
    back = play({"edr_signatures_mirror": ""})
    assert back.returncode == 0, back.stdout


def test_the_agent_is_forecast_installed_enrolled_and_left_alone(host, play, agent):
    forecast = play(agent, "--check", "--diff")
    assert forecast.returncode == 0, forecast.stdout
    assert not host.file("/usr/sbin/acmectl").exists
    made = play(agent, "--diff", "-vvv")
    assert made.returncode == 0, made.stdout
    assert host.file("/var/lib/acme.id").content_string.strip() == agent["edr_vendor_token"]
    assert host.service("acme-agent").is_running
    again = play(agent, "--check")
    assert (again.returncode, "changed=0" in again.stdout) == (0, True), again.stdout
    for output in (forecast, made, again):
        assert agent["edr_vendor_token"] not in output.stdout + output.stderr
    assert host.run("journalctl --no-pager | grep -c %s", agent["edr_vendor_token"]).stdout.strip() == "0"


def test_an_agent_that_is_ill_or_gone_is_red_and_a_finding(host, subjects):
    well = json.loads(host.run("saw edr status --json").stdout)
    assert (well["provider"], well["problems"]) == ("vendor_package", [])
    host.run_expect([0], "touch /run/acme-ill")
    assert "the health command of acme-agent.service ended with 1" in host.run("saw edr status").stdout
    host.run_expect([0], "rm /run/acme-ill; systemctl stop acme-agent.service; systemctl start saw-edr-health.service")
    assert any("acme-agent.service does not run" in text for text in subjects("agent_unhealthy"))
    host.run_expect([0], "systemctl start acme-agent.service")
    assert host.run("saw edr status").rc == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"edr_provider": "acme"}, "value of edr_provider must be one of: embedded, falco, wazuh, vendor_package"),
        ({"edr_vendor_token": ""}, "edr_vendor_token is empty"),
        ({"edr_vendor": {"package": "acme-agent", "deb": "x.deb"}}, "needs a package or a deb, and not both"),
        ({"edr_vendor": {"enrolled": None}}, "edr_vendor.enrol needs edr_vendor.enrolled"),
        ({"edr_provider": "embedded"}, "edr_vendor belongs to edr_provider vendor_package"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_changes(play, agent, change, words):
    vendor = {**agent["edr_vendor"], **change.get("edr_vendor", {})}
    wanted = {**agent, **change, "edr_vendor": {name: value for name, value in vendor.items() if value is not None}}
    refused = play(wanted)
    assert (refused.returncode, "changed=0" in refused.stdout) == (2, True), refused.stdout
    assert words in " ".join((refused.stdout + refused.stderr).split())
    assert agent["edr_vendor_token"] not in refused.stdout + refused.stderr
