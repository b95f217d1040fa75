"""The packet filter of the perimeter, loaded into a real kernel: what a workspace link reaches and what it does not."""

from __future__ import annotations

import errno
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from netns import Namespace, sh

from saw.gateway.nft import render_nft

OPERATOR, STRANGER = "172.30.1.2", "172.30.2.2"
REFUSED_S = 0.4


class Perimeter:
    """An edge with two workspaces on bridges of their own, an operator and a stranger, each in its own namespace."""

    def __init__(self, stack: ExitStack) -> None:
        def space(role: str) -> Namespace:
            namespace = Namespace(role)
            stack.callback(namespace.close)
            return namespace

        self.edge = space("edge")
        self.vm = {number: space(f"vm{number}") for number in (1, 2)}
        self.operator, self.stranger = space("op"), space("str")
        edge = self.edge
        for number, vm in self.vm.items():
            bridge, tap = f"sawbr{number}", f"sawtap{number}"
            edge.ip("link", "add", bridge, "type", "bridge")
            edge.ip("link", "add", tap, "type", "veth", "peer", "name", "eth0", "netns", vm.name)
            edge.ip("link", "set", tap, "master", bridge, "up")
            edge.ip("addr", "add", f"10.210.{number}.1/30", "dev", bridge)
            edge.ip("link", "set", bridge, "up")
            vm.ip("addr", "add", f"10.210.{number}.2/30", "dev", "eth0")
            vm.ip("link", "set", "eth0", "up")
            vm.ip("route", "add", "default", "via", f"10.210.{number}.1")
        for index, (space_, address) in enumerate(((self.operator, OPERATOR), (self.stranger, STRANGER)), 1):
            edge.ip("link", "add", f"up{index}", "type", "veth", "peer", "name", "eth0", "netns", space_.name)
            edge.ip("addr", "add", f"172.30.{index}.1/24", "dev", f"up{index}")
            edge.ip("link", "set", f"up{index}", "up")
            space_.ip("addr", "add", f"{address}/24", "dev", "eth0")
            space_.ip("link", "set", "eth0", "up")
            space_.ip("route", "add", "default", "via", f"172.30.{index}.1")
        # Forwarding on: the filter must hold even where somebody turns it on.
        edge.sh("sysctl", "-q", "-w", "net.ipv4.ip_forward=1")
        self._sockets: list[socket.socket] = []
        stack.callback(self._close)
        edge.sh("nft", "-f", "-", stdin=render_nft([f"{OPERATOR}/32"]))

    def serve(self, namespace: Namespace, port: int) -> None:
        """Accept TCP on every address of the namespace."""

        def listening() -> socket.socket:
            server = socket.create_server(("", port), backlog=16)
            self._sockets.append(server)
            return server

        server = namespace.run(listening)

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.sendall(b"hello")
                connection.close()

        threading.Thread(target=accept, daemon=True).start()

    def counters(self) -> dict[str, int]:
        """Return packets per named counter."""
        answer = json.loads(self.edge.sh("nft", "-j", "list", "counters", "table", "inet", "saw"))
        return {item["counter"]["name"]: item["counter"]["packets"] for item in answer["nftables"] if "counter" in item}

    def _close(self) -> None:
        for server in self._sockets:
            server.shutdown(socket.SHUT_RDWR)
            server.close()


def dial(namespace: Namespace, address: str, port: int, source: str | None = None) -> str:
    """Return ``hello`` when the connection works, ``dropped`` when nothing answers, else the error's name."""

    def attempt() -> str:
        bound = (source, 0) if source else None
        try:
            with socket.create_connection((address, port), timeout=REFUSED_S, source_address=bound) as connection:
                return connection.recv(16).decode()
        except TimeoutError:
            return "dropped"
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, str(error))

    return namespace.run(attempt)


@pytest.fixture(scope="module")
def perimeter() -> Iterator[Perimeter]:
    with ExitStack() as stack:
        rig = Perimeter(stack)
        for port in (22, 2222, 8443, 8444, 9000, 22001):
            rig.serve(rig.edge, port)
        rig.serve(rig.vm[1], 22)
        rig.serve(rig.vm[2], 22)
        rig.serve(rig.vm[2], 9000)
        yield rig


def counted(perimeter: Perimeter, name: str, action: Callable[[], str]) -> tuple[str, bool]:
    """Return the outcome of ``action`` and whether the named counter rose: refused for the intended reason."""
    before = perimeter.counters()[name]
    outcome = action()
    return outcome, perimeter.counters()[name] > before


def test_the_rules_pass_the_checker_of_nft() -> None:
    sh(
        "nft",
        "-c",
        "-f",
        "-",
        stdin=render_nft(["192.0.2.0/24", "2001:db8::/32"], ingress_of=lambda _number: "192.0.2.1"),
    )
    sh("nft", "-c", "-f", "-", stdin=render_nft([]))


@pytest.mark.control("NET-01")
@pytest.mark.parametrize("port", [8443, 8444])
def test_a_workspace_reaches_the_two_ports_of_its_gateway(perimeter: Perimeter, port: int) -> None:
    outcome = counted(perimeter, "vm_allowed", lambda: dial(perimeter.vm[1], "10.210.1.1", port))
    assert outcome == ("hello", True)


@pytest.mark.control("NET-01")
@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("10.210.1.1", 22),
        ("10.210.1.1", 9000),
        ("10.210.1.1", 22001),
        ("172.30.1.1", 8443),
        ("172.30.1.1", 22),
    ],
)
def test_a_workspace_reaches_nothing_else_of_the_host(perimeter: Perimeter, address: str, port: int) -> None:
    outcome = counted(perimeter, "vm_refused", lambda: dial(perimeter.vm[1], address, port))
    assert outcome == ("dropped", True)


@pytest.mark.control("NET-01")
def test_nothing_is_forwarded_even_with_forwarding_on(perimeter: Perimeter) -> None:
    outcome = counted(perimeter, "forward_refused", lambda: dial(perimeter.vm[1], OPERATOR, 22))
    assert outcome == ("dropped", True)


@pytest.mark.control("NET-03")
def test_a_workspace_does_not_reach_another_nor_its_gateway(perimeter: Perimeter) -> None:
    vm = perimeter.vm[1]
    assert counted(perimeter, "forward_refused", lambda: dial(vm, "10.210.2.2", 9000)) == ("dropped", True)
    assert counted(perimeter, "vm_refused", lambda: dial(vm, "10.210.2.1", 8443)) == ("dropped", True)
    assert dial(perimeter.vm[2], "10.210.2.1", 8443) == "hello"
    assert dial(perimeter.edge, "10.210.2.2", 22) == "hello"


@pytest.mark.control("NET-03")
def test_a_forged_source_address_is_dropped(perimeter: Perimeter) -> None:
    vm = perimeter.vm[1]
    vm.ip("addr", "add", "10.210.2.2/32", "dev", "lo")
    vm.ip("addr", "add", "192.0.2.9/32", "dev", "lo")
    try:
        for source in ("10.210.2.2", "192.0.2.9"):
            outcome = counted(perimeter, "vm_spoofed", lambda: dial(vm, "10.210.1.1", 8443, source))  # noqa: B023
            assert outcome == ("dropped", True), source
    finally:
        vm.ip("addr", "del", "10.210.2.2/32", "dev", "lo")
        vm.ip("addr", "del", "192.0.2.9/32", "dev", "lo")
    assert dial(vm, "10.210.1.1", 8443, "10.210.1.2") == "hello"


@pytest.mark.control("NET-01")
def test_udp_and_ipv6_of_a_workspace_are_dropped(perimeter: Perimeter) -> None:
    def send_udp() -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"x", ("10.210.1.1", 53))
        return "sent"

    def send_ipv6() -> str:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            scope = socket.if_nametoindex("eth0")
            sender.sendto(b"x", ("ff02::1", 9999, 0, scope))
        return "sent"

    vm = perimeter.vm[1]
    assert counted(perimeter, "vm_refused", lambda: vm.run(send_udp)) == ("sent", True)
    vm.ip("-6", "addr", "add", "fe80::2/64", "dev", "eth0", "nodad")
    assert any(counted(perimeter, "vm_refused", lambda: vm.run(send_ipv6)))


@pytest.mark.control("NET-02")
def test_only_operators_reach_ssh_and_the_ingress_ports(perimeter: Perimeter) -> None:
    for port in (22, 22001):
        assert dial(perimeter.operator, "172.30.1.1", port) == "hello"
        outcome = counted(perimeter, "host_refused", lambda: dial(perimeter.stranger, "172.30.2.1", port))  # noqa: B023
        assert outcome == ("dropped", True)
    assert dial(perimeter.operator, "172.30.1.1", 9000) == "dropped"


@pytest.mark.control("NET-02")
def test_a_bastion_is_reached_by_operators_where_there_is_one(perimeter: Perimeter) -> None:
    operators = [f"{OPERATOR}/32"]
    assert dial(perimeter.operator, "172.30.1.1", 2222) == "dropped"
    perimeter.edge.sh("nft", "-f", "-", stdin=render_nft(operators, bastion_port=2222))
    try:
        assert dial(perimeter.operator, "172.30.1.1", 2222) == "hello"
        assert dial(perimeter.stranger, "172.30.2.1", 2222) == "dropped"
        assert dial(perimeter.vm[1], "10.210.1.1", 2222) == "dropped"
    finally:
        perimeter.edge.sh("nft", "-f", "-", stdin=render_nft(operators))


@pytest.mark.control("NET-02")
def test_the_host_dials_a_workspace_on_ssh_alone(perimeter: Perimeter) -> None:
    assert dial(perimeter.edge, "10.210.2.2", 22) == "hello"
    outcome, rose = counted(perimeter, "vm_refused", lambda: dial(perimeter.edge, "10.210.2.2", 9000))
    assert outcome != "hello"
    assert rose
