"""Cases of the suites ``network`` and ``sockets``."""

from __future__ import annotations

from typing import Any

from saw.conformance.case import Case

PROXY_TWIN = "twin.net.proxy"
NO_ROUTE = ("ENETUNREACH", "EACCES", "EPERM", "EHOSTUNREACH", "timeout", "dropped", "EADDRNOTAVAIL")
"""Landlock answers EACCES, the packet filter EPERM or nothing at all, a namespace without a route ENETUNREACH."""
LAYERS = "sandbox: own network namespace, packet filter, Landlock"


def _out(
    name: str, title: str, attempt: str, arguments: dict[str, Any], *, control: str = "NET-01", needs: tuple[str, ...] = (),
    expected: tuple[str, ...] = NO_ROUTE, arrival: bool = False, twin: str = PROXY_TWIN,
) -> Case:  # fmt: skip
    return Case(
        f"net.{name}", control, "network", title, attempt, arguments, LAYERS, expected, twin,
        arrival=arrival, recorded=True, needs=needs,
    )  # fmt: skip


def _tcp(name: str, title: str, address: str, port: int, **options: Any) -> Case:
    payload = "GET /${nonce} HTTP/1.0\r\n\r\n"
    return _out(name, title, "tcp", {"address": address, "port": port, "payload": payload}, **options)


def _udp(name: str, title: str, address: str, port: int, **options: Any) -> Case:
    return _out(name, title, "udp", {"address": address, "port": port, "payload": "${nonce}"}, arrival=True, **options)


def _packets() -> list[Case]:
    ground = {"needs": ("ground",)}
    fast = {"payload": "${nonce}"}
    return [
        _tcp("tcp.direct", "TCP to an address outside, past the proxy", "${v4}", 443),
        _tcp("tcp.http", "plain HTTP to an address outside, past the proxy", "${v4}", 80),
        _tcp("tcp.ssh", "SSH to an address outside", "${v4}", 22),
        _tcp("tcp.smtp", "mail to an address outside", "${v4}", 25),
        _tcp("tcp.high", "TCP to an unusual port outside", "${v4}", 8080),
        _tcp("tcp.proxy-port", "the proxy's port number at another address", "${v4}", 3128),
        _tcp("tcp.ipv6", "TCP over IPv6", "${v6}", 443),
        _tcp("tcp.link-local", "TCP to an IPv6 link-local address", "${link6}", 443, expected=(*NO_ROUTE, "EINVAL")),
        _tcp("tcp.mapped", "an IPv4 address written as IPv6", "::ffff:192.0.2.10", 443, **ground),
        _tcp("tcp.private-10", "a private address (10/8)", "10.20.30.40", 443, control="NET-03", **ground),
        _tcp("tcp.private-192", "a private address (192.168/16)", "192.168.77.1", 443, control="NET-03", **ground),
        _tcp("tcp.shared", "a shared address (100.64/10)", "100.100.100.200", 80, control="NET-03", **ground),
        _tcp("metadata.direct", "metadata address", "${metadata}", 80, control="NET-03"),
        _tcp("metadata.ipv6", "metadata address over IPv6", "fd00:ec2::254", 80, control="NET-03", **ground),
        _tcp("metadata.nat64", "metadata address in NAT64 form", "64:ff9b::a9fe:a9fe", 80, control="NET-03", **ground),
        _tcp("metadata.6to4", "metadata address in 6to4 form", "2002:a9fe:a9fe::1", 80, control="NET-03", **ground),
        _tcp("metadata.wire", "wire server of a cloud", "168.63.129.16", 80, control="NET-03", **ground),
        _tcp("loopback.host", "a service on the host's loopback", "127.0.0.1", 8080, control="NET-03",
             needs=("ground",), expected=(*NO_ROUTE, "ECONNREFUSED")),
        _tcp("loopback.zero", "a service on the host's loopback as 0.0.0.0", "0.0.0.0", 8080, control="NET-03",  # noqa: S104
             needs=("ground",), expected=(*NO_ROUTE, "ECONNREFUSED")),
        _tcp("loopback.ipv6", "a service on the host's IPv6 loopback", "::1", 8080, control="NET-03",
             needs=("ground",), expected=(*NO_ROUTE, "ECONNREFUSED")),
        _tcp("proxy.admin", "an administrative port beside the proxy", "${proxy}", 9901, needs=("other_port",)),
        _tcp("proxy.ssh", "SSH of the machine that runs the proxy", "${proxy}", 22, needs=("other_port",)),
        _udp("udp.direct", "UDP to an address outside", "${v4}", 5353),
        _udp("udp.quic", "QUIC (UDP 443)", "${v4}", 443),
        _udp("udp.ntp", "NTP (UDP 123)", "${v4}", 123),
        _udp("udp.ipv6", "UDP over IPv6", "${v6}", 443),
        _udp("udp.multicast", "multicast DNS", "224.0.0.251", 5353, **ground),
        _udp("udp.proxy", "UDP to the proxy's address", "${proxy}", 53, needs=("other_port",)),
        _out("dns.udp", "DNS to a server of one's choice (UDP)", "dns",
             {"address": "${v4}", "name": "${nonce}.example.net", "over": "udp"}),
        _out("dns.tcp", "DNS to a server of one's choice (TCP)", "dns",
             {"address": "${v4}", "name": "${nonce}.example.net", "over": "tcp"}),
        _out("dns.dot", "DNS over TLS", "tcp", {"address": "${v4}", "port": 853, "payload": "${nonce}"}),
        _out("dns.system", "a name looked up by the system's resolver, data in its labels", "resolve",
             {"name": "${nonce}.example.net"}, needs=("dns",),
             expected=(*NO_ROUTE, "gaierror:-2", "gaierror:-3", "gaierror:-5")),
        _out("icmp.raw", "ICMP echo by a raw socket", "icmp", {"address": "${v4}", "payload": "${nonce}", "kind": "raw"},
             needs=("ground",), arrival=True),
        _out("icmp.ping", "ICMP echo by a ping socket", "icmp", {"address": "${v4}", "payload": "${nonce}", "kind": "ping"},
             needs=("ground",), arrival=True),
        _out("icmp.ipv6", "ICMPv6 echo", "icmp", {"address": "${v6}", "payload": "${nonce}", "kind": "ping"},
             needs=("ground",), arrival=True),
        _out("tcp.fast-open", "TCP fast open, which never calls connect", "tcp-fast-open",
             {"address": "${v4}", "port": 443, **fast}),
        _out("tcp.fast-open-proxy", "TCP fast open to another port of the proxy's address", "tcp-fast-open",
             {"address": "${proxy}", "port": 9901, **fast}, needs=("other_port",)),
        _out("tcp.relay", "another program makes the connection", "relay",
             {"address": "${v4}", "port": 443, "nonce": "${nonce}"}),
        Case("net.inbound.tcp", "NET-02", "network", "listen, and be reached from outside (TCP)", "listen",
             {"port": "${knock}", "kind": "tcp", "seconds": 1.5}, LAYERS, ("timeout", "EACCES", "EPERM"), "twin.net.loopback"),
        Case("net.inbound.udp", "NET-02", "network", "listen, and be reached from outside (UDP)", "listen",
             {"port": "${knock}", "kind": "udp", "seconds": 1.5}, LAYERS, ("timeout", "EACCES", "EPERM"),
             "twin.net.loopback-udp"),
        Case("net.interfaces", "NET-01", "network", "see the host's network interfaces", "interfaces",
             {"marks": "${host_interfaces}"}, LAYERS, ("absent", "EPERM"), "twin.net.loopback"),
        Case("net.configure", "NET-01", "network", "change the network's configuration by netlink", "netlink-write", {},
             "system call filter, no capability", ("EPERM",), "twin.net.loopback"),
        Case("net.promiscuous", "NET-01", "network", "change an interface's flags", "promiscuous", {},
             "no capability", ("EPERM", "EACCES"), "twin.net.loopback"),
    ]  # fmt: skip


def _host_sockets() -> list[Case]:
    def case(name: str, title: str, path: str, kind: str = "stream", *, needs: tuple[str, ...] = ()) -> Case:
        return Case(
            f"unix.{name}", "RUN-02", "network", title, "unix", {"path": path, "payload": "${nonce}", "kind": kind},
            "empty file system, Landlock", ("EACCES", "EPERM", "ENOENT", "ECONNREFUSED"), "twin.net.unix",
            recorded=True, needs=needs,
        )  # fmt: skip

    run = ("unix_run",)
    return [
        case("abstract", "an abstract Unix socket of the host", "${unix_abstract}"),
        case("path", "a Unix socket of the host in /tmp (such as an SSH agent's)", "${unix_path}"),
        case("docker", "the container engine's socket", "/run/docker.sock", needs=run),
        case("containerd", "the container runtime's socket", "/run/containerd/containerd.sock", needs=run),
        case("dbus", "the system's D-Bus", "/run/dbus/system_bus_socket", needs=run),
        case("systemd", "systemd's private socket", "/run/systemd/private", needs=run),
        case("notify", "systemd's notification socket", "/run/systemd/notify", "dgram", needs=run),
        case("journal", "the journal's socket", "/run/systemd/journal/socket", "dgram", needs=run),
    ]


FAMILIES = (
    # name, title, family, type, protocol
    ("raw4", "raw IPv4 socket", 2, 3, 255), ("raw6", "raw IPv6 socket", 10, 3, 255), ("icmp", "ping socket", 2, 2, 1),
    ("packet", "packet socket", 17, 3, 0), ("packet-dgram", "packet socket without link header", 17, 2, 0),
    ("netlink-route", "netlink, routes", 16, 3, 0), ("netlink-nft", "netlink, packet filter", 16, 3, 12),
    ("netlink-audit", "netlink, audit", 16, 3, 9), ("netlink-uevent", "netlink, device events", 16, 3, 15),
    ("netlink-diag", "netlink, socket diagnosis", 16, 3, 4), ("vsock", "socket to the hypervisor", 40, 1, 0),
    ("sctp", "SCTP", 2, 1, 132), ("mptcp", "multipath TCP", 2, 1, 262), ("dccp", "DCCP", 2, 6, 33),
    ("udplite", "UDP-Lite", 2, 2, 136), ("smc", "SMC over RDMA", 43, 1, 0), ("alg", "kernel cryptography", 38, 5, 0),
    ("bluetooth", "Bluetooth", 31, 3, 1), ("can", "CAN bus", 29, 3, 1), ("tipc", "TIPC", 30, 1, 0),
    ("rds", "RDS", 21, 5, 0), ("kcm", "kernel connection multiplexor", 41, 2, 0), ("xdp", "express data path", 44, 3, 0),
    ("key", "IPsec key management", 15, 3, 2), ("qrtr", "Qualcomm router", 42, 2, 0), ("nfc", "NFC", 39, 5, 0),
)  # fmt: skip


def _families() -> list[Case]:
    return [
        Case(
            f"socket.{name}",
            "RUN-03",
            "sockets",
            title,
            "socket",
            {"family": family, "kind": kind, "protocol": protocol},
            "system call filter: allowlist of socket families",
            ("EPERM",),
            "twin.socket.tcp",
        )
        for name, title, family, kind, protocol in FAMILIES
    ]


def twins() -> list[Case]:
    """Return what must work."""

    def twin(
        name: str, title: str, attempt: str, arguments: dict[str, Any], suite: str = "network", **more: Any
    ) -> Case:
        control = "NET-01" if suite == "network" else "RUN-03"
        return Case(f"twin.{name}", control, suite, title, attempt, arguments, is_twin=True, **more)

    return [
        twin("net.proxy", "TCP to the proxy", "tcp",
             {"address": "${proxy}", "port": "${proxy_port}", "payload": "OPTIONS /${nonce} HTTP/1.0\r\n\r\n"}),
        twin("net.loopback", "two ends inside the sandbox talk (a Unix socket pair)", "unix-pair", {"nonce": "${nonce}"}),
        twin("net.loopback-udp", "UDP over the sandbox's own loopback", "loopback", {"kind": "udp", "nonce": "${nonce}"}),
        twin("net.unix", "a Unix socket of one's own", "unix-pair", {"nonce": "${nonce}"}),
        twin("socket.tcp", "ordinary TCP and UDP sockets", "tcp-socket", {}, "sockets"),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks of both suites."""
    return [*_packets(), *_host_sockets(), *_families()]
