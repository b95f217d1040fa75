"""The sandbox's network on a real kernel: what passes, what does not, and that it repairs itself."""

from __future__ import annotations

import json

import pytest

from conftest import PROBE, PYTHON, PrivateMachine
from saw.runtime.netns import SandboxNet


def probe(machine: PrivateMachine, *cases: str, **where) -> dict[str, str]:
    return json.loads(machine.run(PYTHON, str(PROBE), *cases, **where).stdout)


@pytest.mark.control("NET-01")
def test_only_the_proxy_is_reachable_by_the_packet_filter_alone(networked):
    cases = [
        "direct-tcp",
        "direct-tcp6",
        "link-local6",
        "metadata",
        "proxy-other-port",
        "ssh-of-vm",
        "dns-udp",
        "udp-out",
        "udp6-out",
    ]
    found = probe(networked, *cases, "proxy", "udp-loopback", netns=True)
    assert (found.pop("proxy"), found.pop("udp-loopback")) == ("ok", "ok")
    assert found["dns-udp"] == "EPERM"
    assert {found["proxy-other-port"], found["ssh-of-vm"]} == {"timeout"}
    no_route = {found[name] for name in ("direct-tcp", "metadata", "udp-out")}
    assert no_route == {"ENETUNREACH"}
    assert "ok" not in found.values()


@pytest.mark.control("NET-02")
def test_nothing_reaches_a_listener_in_the_sandbox(networked):
    code = "import socket,sys; socket.create_connection(('10.200.0.2', 8080), 1)"
    assert networked.run(PYTHON, "-c", code, netns=True).returncode == 0
    refused = networked.run(PYTHON, "-c", code)
    assert refused.returncode == 1
    assert "timed out" in refused.stderr or "not permitted" in refused.stderr


@pytest.mark.control("NET-01")
def test_icmp_gets_no_answer(networked):
    assert networked.run("nft", "list", "table", "inet", "saw_vm").returncode == 0
    code = (
        "import socket\n"
        "s=socket.socket(socket.AF_INET,socket.SOCK_RAW,1); s.settimeout(1)\n"
        "s.sendto(b'\\x08\\x00\\xf7\\xff\\x00\\x00\\x00\\x00',('10.200.0.1',0))\n"
    )
    assert "not permitted" in networked.run(PYTHON, "-c", code, netns=True).stderr


@pytest.mark.control("NET-01")
def test_up_converges_from_every_interrupted_state(machine):
    steps = ("namespace", "sandbox-rules", "vm-rules", "link", "addresses")
    code = (
        "import sys\nfrom saw.runtime import netns\nnet=netns.SandboxNet()\n"
        "class Crash(Exception): pass\n"
        "def step(name):\n    if name == sys.argv[1]: raise Crash\n"
        "try: netns.up(net, step)\nexcept Crash: pass\n"
        "else: sys.exit('not interrupted')\n"
        "assert netns.check(net)\n"
        "assert netns.up(net)\n"
        "assert not netns.check(net)\nassert not netns.up(net)\nassert netns.down(net)\nassert not netns.down(net)\n"
    )
    import sys

    machine.saw("sandbox", "net-down")
    for name in steps:
        answer = machine.run(sys.executable, "-c", code, name)
        assert answer.returncode == 0, (name, answer.stderr)


@pytest.mark.control("POL-05")
@pytest.mark.parametrize(
    ("change", "seen"),
    [
        (("nft", "flush", "table", "inet", "saw_vm"), "missing"),
        (("nft", "add", "rule", "inet", "saw_vm", "forward", "accept"), "not ours"),
        (("ip", "netns", "exec", "saw-sandbox", "nft", "delete", "table", "inet", "saw_sandbox"), "not loaded"),
        (("ip", "-n", "saw-sandbox", "route", "add", "default", "via", "10.200.0.1"), "default route"),
        (("ip", "address", "add", "10.200.0.9/30", "dev", "sawveth0"), "addresses"),
    ],
)
def test_drift_is_reported_and_repaired(machine, change, seen):
    assert machine.saw("sandbox", "net-up")[0] == 0
    assert machine.run(*change).returncode == 0
    code, answer = machine.saw("sandbox", "check")
    assert code == 1
    assert any(seen in problem for problem in answer["problems"])
    machine.saw("sandbox", "net-up")
    if seen == "default route":
        machine.saw("sandbox", "net-down")
    assert machine.saw("sandbox", "net-up")[0] == 0


@pytest.mark.control("NET-03")
def test_vm_wide_rules_admit_daemons_and_ssh_only(machine):
    rules = SandboxNet().vm_rules(1, (0, 990), (988,))
    machine.write("/run/host.json", rules.load_document())
    assert machine.run("nft", "-c", "-j", "-f", "/run/host.json").returncode == 0
    assert machine.run("nft", "-j", "-f", "/run/host.json").returncode == 0
    setup = (
        "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; ip link add perim0 type veth peer name perim1; "
        "ip link set perim1 up; ip address add 10.210.1.2/30 dev perim0; ip link set perim0 up"
    )
    assert machine.run("unshare", "-m", "sh", "-ec", "mount -t proc proc /proc; " + setup).returncode == 0
    code = (
        "import os,socket,sys\nos.setuid(int(sys.argv[1]))\ns=socket.socket()\ns.setblocking(False)\n"
        "print(s.connect_ex((sys.argv[2], int(sys.argv[3]))))\n"
        "u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        "try: u.sendto(b'x',(sys.argv[2],53)); print('sent')\nexcept PermissionError: print('refused')\n"
    )
    for uid, port, admitted in (
        ("990", "8443", True),
        ("0", "8444", True),
        ("2000", "8443", False),
        ("990", "443", False),
        ("988", "8444", True),
        ("988", "8443", False),
    ):
        machine.run("nft", "-j", "-f", "/run/host.json")
        answer = machine.run(PYTHON, "-c", code, uid, "10.210.1.1", port)
        assert answer.stdout.split()[1] == "refused", answer
        dropped = json.loads(machine.run("nft", "-j", "list", "chain", "inet", "saw_host", "output").stdout)
        packets = [
            e["counter"]["packets"]
            for i in dropped["nftables"]
            for e in i.get("rule", {}).get("expr", [])
            if "counter" in e
        ]
        assert packets[-1] == (1 if admitted else 2), (uid, port, packets)
    machine.run("nft", "delete", "table", "inet", "saw_host")
    machine.run("ip", "link", "delete", "perim0")


@pytest.mark.control("INT-01")
def test_an_account_that_is_no_daemon_reaches_ring_1_on_the_vm_itself_and_nothing_outside(networked):
    """What runs OpenShell: its supervisor is in the VM's own network, so only these rules stand between it and the perimeter."""
    networked.write("/run/host.json", SandboxNet().vm_rules(1, (0, 990)).load_document())
    assert networked.run("nft", "-j", "-f", "/run/host.json").returncode == 0
    networked.run("ip", "link", "add", "perim0", "type", "veth", "peer", "name", "perim1")
    networked.run("ip", "link", "set", "perim1", "up")
    networked.run("ip", "address", "add", "10.210.1.2/30", "dev", "perim0")
    networked.run("ip", "link", "set", "perim0", "up")
    code = (
        "import os,socket,sys\nos.setuid(int(sys.argv[1]))\n"
        "socket.create_connection(('10.200.0.1', 3128), 60).close(); print('ring 1')\n"
        "u=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\n"
        "try: u.sendto(b'x',('10.210.1.1',8443)); print('sent')\nexcept PermissionError: print('refused')\n"
    )
    try:
        assert networked.run(PYTHON, "-c", code, "994").stdout.split("\n")[:2] == ["ring 1", "refused"]
        networked.run("nft", "delete", "table", "inet", "saw_host")
        assert networked.run(PYTHON, "-c", code, "994").stdout.split("\n")[:2] == ["ring 1", "sent"], (
            "the rules refuse it"
        )
    finally:
        networked.run("nft", "delete", "table", "inet", "saw_host")
        networked.run("ip", "link", "delete", "perim0")
