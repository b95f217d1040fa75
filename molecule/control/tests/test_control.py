"""The control host after its roles."""

from __future__ import annotations

import json

import pytest

testinfra_hosts = ["control"]


def test_the_broker_runs_enabled_as_its_own_user(host):
    unit = host.service("saw-broker")
    assert unit.is_running, host.run("journalctl -u saw-broker --no-pager -n 50").stdout
    assert unit.is_enabled
    assert host.process.get(user="saw-broker", comm="saw").args.endswith("broker serve --config /etc/saw/broker.json")


def test_the_operator_socket_admits_root_and_operators_alone(host):
    socket = host.file("/run/saw/broker/operator.sock")
    assert (socket.user, socket.group, socket.mode) == ("saw-broker", "saw-operators", 0o660)
    answer = host.run("curl --silent --unix-socket /run/saw/broker/operator.sock http://broker/v1/trust")
    assert '"trust_domain":"saw.example"' in answer.stdout
    stranger = host.run(
        "setpriv --reuid nobody --clear-groups curl --silent --unix-socket /run/saw/broker/operator.sock http://broker/"
    )
    assert stranger.rc == 7, "an account outside the group reached the operator socket"


def test_keys_are_private(host):
    assert host.file("/var/lib/saw/broker").mode == 0o700
    assert host.run("find /var/lib/saw/broker/keys -name '*.key' -perm /077").stdout == ""


def test_the_unit_is_confined(host):
    report = host.run("systemd-analyze security --no-pager saw-broker.service | tail -n 1").stdout
    exposure = float(report.split(":")[1].split()[0])
    assert exposure < 3.0, report


def test_the_broker_runs_with_the_limits_of_rollouts_that_it_was_given(host):
    answer = host.run("curl --silent --unix-socket /run/saw/broker/operator.sock http://broker/v1/policy/rollouts")
    assert json.loads(answer.stdout)["limits"] == {
        "max_refused": 0,
        "max_silent_s": 120,
        "max_deny_rate_increase": 0.25,
        "min_calls": 20,
        "first_wave": 2,
        "soak_s": 600,
        "require_rollback": True,
    }


@pytest.mark.control("P0-01")
def test_the_schedule_of_drift_reports_is_on_and_a_look_that_cannot_be_done_is_told(host):
    timer = host.service("saw-drift-report.timer")
    assert timer.is_enabled
    assert timer.is_running
    try:
        assert host.run("systemctl start saw-drift-report.service").rc != 0
        report = json.loads(host.file("/var/lib/saw/drift/report.json").content_string)
        assert (report["hosts"], report["drift"]) == ([], [])
        assert "ansible-playbook is missing" in report["problems"][0]
        trail = "http://broker/v1/audit/events?source=broker&limit=1000"
        told = host.run(f"curl --silent --unix-socket /run/saw/broker/operator.sock '{trail}'").stdout
        assert '"check_incomplete"' in told
    finally:
        host.run("systemctl reset-failed saw-drift-report.service")
