"""Root in the VM on the wire: whatever it sends, ring 2 and the broker's port are all that answers.

Each refusal has a second witness outside the VM: the packet filter's counters, the kernel's, or the far end's own record.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from vm_access import Workspace, wait_until

PACKETS = r"""
import json, os, select, socket, struct, sys, time

task = json.loads(sys.argv[1])
gateway, own = task["gateway"], task["own"]
link = next(name for name in os.listdir("/sys/class/net") if name.startswith("en"))
hardware = bytes.fromhex(open(f"/sys/class/net/{link}/address").read().strip().replace(":", ""))


def total(data):
    data += b"\0" * (len(data) % 2)
    value = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def packet(source, target, protocol, payload):
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 7, 0, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target))
    return head + payload


def syn(source, target, port, own_port=40000):
    body = struct.pack("!HHIIBBHHH", own_port, port, 1, 0, 0x50, 2, 1024, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!BBH", 0, 6, len(body))
    return packet(source, target, 6, body[:16] + struct.pack("!H", total(pseudo + body) ^ 0xFFFF) + body[18:])


def datagram(source, target, port, payload=b"question"):
    return packet(source, target, 17, struct.pack("!HHHH", 40000, port, 8 + len(payload), 0) + payload)


def echo(source, target):
    body = struct.pack("!BBHHH", 8, 0, 0, 1, 1)
    return packet(source, target, 1, body[:2] + struct.pack("!H", total(body) ^ 0xFFFF) + body[4:])


def answers(wire, seconds):
    end, seen = time.monotonic() + seconds, []
    while (left := end - time.monotonic()) > 0:
        if select.select([wire], [], [], left)[0]:
            frame, address = wire.recvfrom(65535)
            if address[2] != socket.PACKET_OUTGOING:
                seen.append(frame)
    return seen


def listen(kind):
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    wire.bind((link, kind))
    return wire


def from_gateway(frames):
    "(source, protocol, source port, destination port, tcp flags) of what answers our packets: they all come from port 40000."
    seen = []
    for frame in frames:
        body = frame[14 + (frame[14] & 15) * 4:]
        ports = struct.unpack("!HH", body[:4])
        if frame[23] == 1 or ports[1] == 40000:
            seen.append([socket.inet_ntoa(frame[26:30]), frame[23], *ports, body[13] if frame[23] == 6 else 0])
    return seen


def send(packets):
    with listen(0x0800) as wire, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out:
        for raw in packets:
            out.sendto(raw, (socket.inet_ntoa(raw[16:20]), 0))
        return from_gateway(answers(wire, 3))


def scan():
    "SYN to every port of the gateway; the checksum is corrected, not computed, for each."
    first = syn(own, gateway, 0)
    base = struct.unpack("!H", first[36:38])[0] ^ 0xFFFF
    seen = set()
    with listen(0x0800) as wire, socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as out:
        for port in range(1, 65536):
            value = base + port
            value = (value & 0xFFFF) + (value >> 16)
            out.sendto(first[:22] + struct.pack("!H", port) + first[24:36] + struct.pack("!H", value ^ 0xFFFF) + first[38:],
                       (gateway, 0))
            if port % 4096 == 0:
                seen |= {(entry[2], entry[4]) for entry in from_gateway(answers(wire, 0.2))}
        seen |= {(entry[2], entry[4]) for entry in from_gateway(answers(wire, 4))}
    return sorted(seen)


def neighbours(addresses):
    "Ask by ARP who has each address; return address -> hardware address of who answered."
    with listen(0x0806) as wire:
        for address in addresses:
            wire.send(b"\xff" * 6 + hardware + struct.pack("!HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1) + hardware
                      + socket.inet_aton(own) + b"\0" * 6 + socket.inet_aton(address))
        frames = [frame for frame in answers(wire, 3) if frame[20:22] == b"\0\2"]
    return {socket.inet_ntoa(frame[28:32]): frame[22:28].hex() for frame in frames}


def version_6():
    "Neighbour solicitations and echo requests to all nodes, to link-local and to unique local addresses; frames that came back."
    mine = socket.inet_pton(socket.AF_INET6, "fe80::2")
    sent, targets = 0, ["ff02::1", "ff02::2", "fe80::1", "fd00:210::1", "fd00:77::10"]
    with listen(0x86DD) as wire:
        for target in targets:
            far = socket.inet_pton(socket.AF_INET6, target)
            group = socket.inet_pton(socket.AF_INET6, "ff02::1:ff00:0")[:13] + far[13:]
            option = b"\1\1" + hardware
            question = struct.pack("!BBHI", 135, 0, 0, 0) + far + option
            for to, body in ((far, struct.pack("!BBHHH", 128, 0, 0, 1, 1)), (group, question)):
                pseudo = mine + to + struct.pack("!II", len(body), 58)
                body = body[:2] + struct.pack("!H", total(pseudo + body) ^ 0xFFFF) + body[4:]
                mac = b"\x33\x33" + to[12:] if to[0] == 0xFF else b"\xff" * 6
                wire.send(mac + hardware + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + mine + to + body)
                sent += 1
        return sent, len(answers(wire, 3))


def attempt():
    kind = task["kind"]
    if kind == "syn":
        return send([syn(source, target, port) for source, target, port in task["packets"]])
    if kind == "udp":
        return send([datagram(source, target, port) for source, target, port in task["packets"]])
    if kind == "icmp":
        return send([echo(source, target) for source, target in task["packets"]])
    return {"scan": scan, "neighbours": lambda: neighbours(task["addresses"]), "version 6": version_6}[kind]()


print(json.dumps(attempt()))
"""
SYN_ACK = 0x12


@pytest.fixture(scope="module")
def wire(rooted: Workspace) -> Callable[..., Any]:
    """Send what the task says from the VM and return what came back; the VM's own filter is off and routes lead to the edge."""
    gateway, own = f"10.210.{rooted.number}.1", f"10.210.{rooted.number}.2"
    assert rooted.root(f"nft flush ruleset; ip route replace default via {gateway}")[0] == 0

    def attempt(kind: str, **task: Any) -> Any:
        told = json.dumps({"kind": kind, "gateway": gateway, "own": own, **task})
        return json.loads(rooted.root_python(PACKETS, told))

    return attempt


def risen(workspace: Workspace, before: dict[str, int], *names: str) -> int:
    """By how much the counters ``names`` rose together since ``before``."""
    now = workspace.counters()
    return sum(now[name] - before[name] for name in names)


@pytest.mark.control("NET-01")
@pytest.mark.control("NET-03")
def test_root_reaches_ring_2_and_the_broker_and_nothing_else(rooted: Workspace, wire: Callable[..., Any]) -> None:
    gateway = f"10.210.{rooted.number}.1"
    targets = {
        f"{gateway}:8443": "open", f"{gateway}:8444": "open", f"{gateway}:22": "shut", f"{gateway}:80": "shut",
        "10.77.0.10:8443": "shut", "10.77.0.10:8445": "shut", "10.77.0.10:22": "shut",
        "10.77.0.20:22": "shut", "10.77.0.30:443": "shut", "10.77.0.1:22": "shut",
        "169.254.169.254:80": "shut", "10.210.2.1:8443": "shut", "127.0.0.1:22": "open",
    }  # fmt: skip
    connect = "import socket, sys; h, p = sys.argv[1].rsplit(':', 1); socket.create_connection((h, int(p)), 2)"
    script = f"""
for t in {" ".join(targets)}; do
  if timeout 5 python3 -c "{connect}" $t 2>/dev/null; then echo $t open; else echo $t shut; fi
done
"""
    before = rooted.counters()
    code, text = rooted.root(script)
    assert code == 0
    assert dict(line.split() for line in text.strip().splitlines()) == targets
    assert risen(rooted, before, "vm_allowed") >= 2
    assert risen(rooted, before, "vm_refused") >= 2


@pytest.mark.control("NET-01")
def test_no_other_port_of_the_gateway_answers(rooted: Workspace, wire: Callable[..., Any]) -> None:
    listening = rooted.host("edge", "ss -ltnH | wc -l")
    assert int(listening) > 4, "there is more to find than the two ports"
    before = rooted.counters()
    assert wire("scan") == [[8443, SYN_ACK], [8444, SYN_ACK]]
    assert risen(rooted, before, "vm_refused") > 60000, "the others were dropped by the perimeter's filter"


@pytest.mark.control("NET-03")
def test_a_forged_source_address_gets_no_answer(rooted: Workspace, wire: Callable[..., Any]) -> None:
    gateway, own = f"10.210.{rooted.number}.1", f"10.210.{rooted.number}.2"
    before = rooted.counters()
    assert wire("syn", packets=[[own, gateway, 8443]])[0] == [gateway, 6, 8443, 40000, SYN_ACK], "its own is answered"
    assert risen(rooted, before, "vm_allowed") >= 1
    before = rooted.counters()
    forged = ["10.210.2.2", "10.210.2.1", "10.77.0.10", "10.77.0.20", "10.77.0.30", "192.0.2.7"]
    assert wire("syn", packets=[[source, gateway, 8443] for source in forged for _ in range(3)]) == []
    assert risen(rooted, before, "vm_spoofed", "TcpExt:IPReversePathFilter") >= (len(forged) - 1) * 3, (
        "all but the perimeter's own address, which its kernel drops uncounted"
    )


@pytest.mark.control("NET-01")
def test_no_datagram_and_no_echo_request_gets_out(rooted: Workspace, wire: Callable[..., Any]) -> None:
    gateway, own = f"10.210.{rooted.number}.1", f"10.210.{rooted.number}.2"
    before = rooted.counters()
    far = ["10.77.0.1", "10.77.0.10", "10.77.0.30", "192.0.2.53"]
    asked = [[own, target, port] for target in (gateway, "10.77.0.20", *far) for port in (53, 123, 443, 5353)]
    assert wire("udp", packets=asked) == []
    assert risen(rooted, before, "vm_refused") >= 8, "what was addressed to the perimeter host itself"
    assert risen(rooted, before, "received") >= len(asked), "the datagrams did leave the VM"
    before = rooted.counters()
    assert wire("icmp", packets=[[own, target] for target in (gateway, *far)]) == []
    assert risen(rooted, before, "vm_refused") >= 1


@contextmanager
def another_workspace(workspace: Workspace) -> Iterator[Callable[[], list[str]]]:
    """A second workspace network on the same perimeter host with a listener in it; yields a reader of what arrived there."""
    program = (
        "import socket, threading\n"
        "log = open('/run/e2e-other.log', 'a', buffering=1)\n"
        "server = socket.create_server(('', 22))\n"
        "def accept():\n"
        "    while True:\n"
        "        connection, address = server.accept()\n"
        "        print('accepted', address[0], file=log)\n"
        "        connection.close()\n"
        "threading.Thread(target=accept, daemon=True).start()\n"
        "wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))\n"
        "print('ready', file=log)\n"
        "while True:\n"
        "    print('packet', socket.inet_ntoa(wire.recv(65535)[26:30]), file=log)\n"
    )
    remove = (
        "systemctl stop e2e-other.service 2>/dev/null || true; ip netns delete e2e-other 2>/dev/null || true; "
        "ip link delete sawbr2 2>/dev/null || true; rm -f /run/e2e-other.log /run/e2e-other.py"
    )
    make = f"""
{remove}
cat > /run/e2e-other.py
ip netns add e2e-other
ip link add sawbr2 type bridge forward_delay 0
ip link add sawtap2 type veth peer name eth0 netns e2e-other
ip link set sawtap2 master sawbr2 up
ip addr add 10.210.2.1/30 dev sawbr2
ip link set sawbr2 up
ip -n e2e-other link set lo up
ip -n e2e-other addr add 10.210.2.2/30 dev eth0
ip -n e2e-other link set eth0 up
ip -n e2e-other route add default via 10.210.2.1
systemd-run --quiet --collect --unit=e2e-other ip netns exec e2e-other python3 /run/e2e-other.py
"""
    try:
        workspace.host("edge", make, stdin=program)

        def record() -> list[str]:
            return workspace.host("edge", "cat /run/e2e-other.log 2>/dev/null || true").splitlines()

        wait_until("the other workspace", record, patience=20)
        yield record
    finally:
        workspace.host("edge", remove)


@pytest.mark.control("NET-03")
def test_another_workspace_is_neither_seen_nor_reached(rooted: Workspace, wire: Callable[..., Any]) -> None:
    own, gateway = f"10.210.{rooted.number}.2", f"10.210.{rooted.number}.1"
    with another_workspace(rooted) as record:
        near = "import socket; socket.create_connection(('10.210.2.2', 22), 5)"
        rooted.host("edge", f'python3 -c "{near}"')
        wait_until("the perimeter's own connection", lambda: "accepted 10.210.2.1" in record(), patience=10)
        others = ["10.210.2.2", "10.77.0.10", "10.77.0.30", "10.210.2.1", "10.77.0.20"]
        before = rooted.counters()
        assert wire("neighbours", addresses=[*others, gateway]).keys() == {gateway}, "its own gateway alone answers"
        assert risen(rooted, before, "received") > len(others)
        before = rooted.counters()
        assert wire("syn", packets=[[own, "10.210.2.2", port] for port in (22, 443, 8443)]) == []
        assert wire("udp", packets=[[own, "10.210.2.2", 53]]) == []
        assert risen(rooted, before, "vm_refused", "forward_refused", "Ip:InAddrErrors") >= 4
        assert risen(rooted, before, "Ip:ForwDatagrams") == 0
        assert not [line for line in record() if own in line], "nothing of it arrived there"


@pytest.mark.control("NET-01")
@pytest.mark.control("NET-03")
def test_version_6_of_the_protocol_leads_nowhere(rooted: Workspace, wire: Callable[..., Any]) -> None:
    before = rooted.counters()
    sent, back = wire("version 6")
    assert (sent, back) == (10, 0)
    assert risen(rooted, before, "received") >= sent, "the packets did leave the VM"
    bridge = f"sawbr{rooted.number}"
    known = rooted.host(
        "edge", f"ip -6 neigh show dev {bridge}; ip -6 addr show dev {bridge}; ip -6 route show dev {bridge}"
    )
    assert known.strip() == "", "the perimeter has no address and no neighbour of that version there"
