"""The control host serves a verified copy of its policy repository."""

from __future__ import annotations

import pytest

testinfra_hosts = ["control"]
SERVED = "http://127.0.0.1:8444/tuf"


def test_the_server_runs_enabled_as_its_own_user(host):
    unit = host.service("saw-policy-repository")
    assert unit.is_running, host.run("journalctl -u saw-policy-repository --no-pager -n 50").stdout
    assert unit.is_enabled
    assert host.service("saw-policy-mirror.timer").is_enabled
    assert host.run("systemctl show --property=User --value saw-policy-repository").stdout.strip() == "saw-policy-web"


@pytest.mark.control("POL-01")
def test_what_is_served_is_what_the_broker_publishes(host):
    host.run_expect([0], "systemctl start saw-policy-mirror.service")
    for name in ("metadata/timestamp.json", "metadata/1.root.json"):
        broker = host.file(f"/var/lib/saw/broker/tuf/{name}").content_string
        assert host.run(f"curl --silent --fail {SERVED}/{name}").stdout == broker
    assert host.run(f"curl --silent --output /dev/null --write-out '%{{http_code}}' {SERVED}/../keys/").stdout == "404"


def test_the_server_cannot_write_the_copy(host):
    done = host.run("setpriv --reuid saw-policy-web --clear-groups touch /var/lib/saw/policy-repository/metadata/x")
    assert done.rc != 0


def test_units_are_confined(host):
    for unit in ("saw-policy-repository", "saw-policy-mirror"):
        report = host.run(f"systemd-analyze security --no-pager {unit}.service | tail -n 1").stdout
        assert float(report.split(":")[1].split()[0]) < 3.0, report
