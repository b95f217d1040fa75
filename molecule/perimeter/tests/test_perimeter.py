"""The perimeter host after its roles."""

from __future__ import annotations

import json
import subprocess
import time

import pytest

testinfra_hosts = ["edge"]


def test_gatekeeper_and_ring2_run_enabled_as_their_own_users(host):
    for unit, user in (
        ("saw-gatekeeper@1", "saw-gateway"),
        ("saw-gatekeeper@2", "saw-gateway"),
        ("saw-ring2", "saw-ring2"),
    ):
        service = host.service(unit)
        assert service.is_running, host.run(f"journalctl -u {unit} --no-pager -n 50").stdout
        assert service.is_enabled
        assert host.run(f"systemctl show --property=User --value {unit}").stdout.strip() == user


def replicas(host):
    """What `saw gateway status` says of each gatekeeper."""
    told = json.loads(host.run("/opt/saw/bin/saw gateway status --json").stdout)
    return {replica["replica"]: replica for replica in told["replicas"]}


def until(host, what, holds):
    """Wait until ``holds`` says so of the gatekeepers."""
    end = time.monotonic() + 120
    while not holds(replicas(host)):
        assert time.monotonic() < end, f"{what} did not happen: {replicas(host)}"
        time.sleep(0.2)


def test_no_other_gatekeeper_runs_and_the_unit_without_a_number_is_gone(host):
    units = host.run("systemctl list-units --all --plain --no-legend 'saw-gatekeeper*.service'").stdout.split("\n")
    assert sorted(line.split()[0] for line in units if " active " in line) == [
        "saw-gatekeeper@1.service",
        "saw-gatekeeper@2.service",
    ]
    assert not host.file("/etc/systemd/system/saw-gatekeeper.service").exists


def test_both_gatekeepers_decide_and_one_of_them_leads(host):
    until(host, "both decide", lambda found: not any(replica["problem"] for replica in found.values()))
    assert sorted(replica["leads"] for replica in replicas(host).values()) == [False, True]


def test_a_gatekeeper_that_stands_still_is_ended_and_another_one_leads(host):
    """The watchdog of the real unit: a stopped process is killed, the other takes over, and both are there again."""
    until(host, "both decide", lambda found: not any(replica["problem"] for replica in found.values()))
    first = next(replica for replica in replicas(host).values() if replica["leads"])
    assert host.run(f"kill -STOP {first['pid']}").rc == 0
    until(host, "the other leads", lambda found: found[3 - first["replica"]]["leads"])
    until(
        host,
        "the first one is back",
        lambda found: not found[first["replica"]]["problem"] and found[first["replica"]]["pid"] != first["pid"],
    )
    assert not replicas(host)[first["replica"]]["leads"]


def dumps_after_a_crash(host, *more):
    """What a gatekeeper that may write where it runs leaves behind when it ends by a fault of memory."""
    folder, place = "/run/systemd/system/saw-gatekeeper@1.service.d", "/var/lib/saw/gatekeeper"
    settings = "\\n".join(["[Service]", f"WorkingDirectory={place}", *more])
    host.run_expect(
        [0], f"mkdir -p {folder} && printf '{settings}\\n' > {folder}/crash.conf && systemctl daemon-reload"
    )
    try:
        host.run_expect([0], "systemctl restart saw-gatekeeper@1")
        until(host, "the gatekeeper decides", lambda found: not found[1]["problem"])
        ended = replicas(host)[1]["pid"]
        host.run_expect([0], f"kill -SEGV {ended}")
        until(host, "it is back", lambda found: not found[1]["problem"] and found[1]["pid"] != ended)
        return host.check_output(f"find {place} -name 'core*' -printf '%f '; rm -f {place}/core*").split()
    finally:
        host.run_expect([0], f"rm -r {folder} && systemctl daemon-reload && systemctl restart saw-gatekeeper@1")


@pytest.mark.control("CRED-01")
def test_a_crash_leaves_no_memory_on_the_disk(host):
    """Credentials are in the memory of both services. With the limit taken away, the same crash leaves all of it in a file."""
    assert host.file("/proc/sys/kernel/core_pattern").content_string.strip() == "core", (
        "dumps are handed to a program here"
    )
    assert dumps_after_a_crash(host) == []
    assert len(dumps_after_a_crash(host, "LimitCORE=infinity")) == 1
    until(host, "both decide", lambda found: not any(replica["problem"] for replica in found.values()))
    limits = host.check_output("cat /proc/$(systemctl show --property=MainPID --value saw-ring2)/limits")
    assert [line.split()[-3:-1] for line in limits.splitlines() if line.startswith("Max core file size")] == [
        ["0", "0"]
    ]


def test_the_gatekeeper_is_in_touch_with_the_broker(host):
    held = json.loads(host.file("/var/lib/saw/gatekeeper/state.json").content_string)
    assert held, "no state has come from the broker"


def test_credentials_are_for_the_gatekeeper_alone(host):
    folder, file = host.file("/etc/saw/credentials"), host.file("/etc/saw/credentials/git-token")
    assert (folder.user, folder.mode) == ("saw-gateway", 0o700)
    assert (file.user, file.mode, file.content_string) == ("saw-gateway", 0o600, "not-a-real-secret")
    assert host.run("setpriv --reuid saw-ring2 --clear-groups cat /etc/saw/credentials/git-token").rc != 0


@pytest.mark.control("CRED-01")
def test_no_credential_stands_in_the_hosts_log(host):
    """Also none of several lines, or with characters that a log writes as escapes: the call that brought them is there."""
    long = host.file("/etc/saw/credentials/key-file").content_string
    assert long == "not a real secret\nof more than one \\ line\n"
    log = host.check_output("journalctl --no-pager --all --output=cat")
    assert "/etc/saw/credentials/key-file" in log
    assert [word for word in ("not-a-real-secret", "not a real secret", "of more than one") if word in log] == []


def test_private_keys_are_for_their_services_alone(host):
    for path, user in (
        ("/etc/saw/gatekeeper-tls/key.pem", "saw-gateway"),
        ("/etc/saw/ring2-tls/server.key", "saw-ring2"),
    ):
        key = host.file(path)
        assert (key.user, key.mode) == (user, 0o400)


@pytest.mark.control("NET-01")
def test_the_packet_filter_drops_by_default(host):
    rules = json.loads(host.run("nft -j list table inet saw").stdout)["nftables"]
    policies = {item["chain"]["hook"]: item["chain"]["policy"] for item in rules if "hook" in item.get("chain", {})}
    assert policies["input"] == "drop"
    assert policies["forward"] == "drop"
    assert host.sysctl("net.ipv4.ip_forward") == 0


@pytest.mark.control("NET-01")
def test_only_operator_networks_get_in(host):
    """A door that no rule names is closed, while SSH from the operators' network (this very test) is open."""
    host.run("systemd-run --quiet --unit=test-listener python3 -m http.server 8099")
    try:
        assert host.run("timeout 10 sh -c 'until curl -s -o /dev/null http://127.0.0.1:8099; do :; done'").rc == 0
        url = "http://10.79.0.20:8099/"
        from_outside = subprocess.run(["curl", "-s", "-o", "/dev/null", "--max-time", "2", url], check=False)
        assert from_outside.returncode == 28, "a port outside the rules answered"
    finally:
        host.run("systemctl stop test-listener")


def test_units_are_confined(host):
    for unit, limit in (("saw-gatekeeper@1", 3.0), ("saw-ring2", 3.0)):
        report = host.run(f"systemd-analyze security --no-pager {unit}.service | tail -n 1").stdout
        assert float(report.split(":")[1].split()[0]) < limit, report
