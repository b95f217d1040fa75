"""Attempts on the network: packets past the proxy, socket families, sockets of the host, being reached from outside."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import subprocess

from saw.conformance.probe.core import NotPossible, Refused, attempt

SAID = (errno.EACCES, errno.EPERM, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ECONNREFUSED)
PATIENCE = 1.5
"""Seconds to wait for an answer."""


def _family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _target(address: str, port: int) -> tuple:  # type: ignore[type-arg]
    if address.lower().startswith("fe80:"):
        names = sorted((name for _, name in socket.if_nameindex() if name != "lo"), key=lambda name: name != "sawc0")
        if not names:
            raise OSError(errno.ENETUNREACH, "no interface but loopback")
        return (address, port, 0, socket.if_nametoindex(names[0]))
    return (address, port)


def _answer(connection: socket.socket) -> str:
    connection.settimeout(PATIENCE)
    try:
        return connection.recv(4096).decode("latin-1")
    except OSError as error:
        return f"no answer ({error})"


@attempt("tcp")
def tcp(address: str, port: int, payload: str) -> str:
    """Connect and send."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(_target(address, port))
        connection.sendall(payload.encode("latin-1"))
        return f"connected; {_answer(connection)[:80]!r}"


@attempt("tcp-fast-open")
def tcp_fast_open(address: str, port: int, payload: str) -> str:
    """Send in the first packet, which opens the connection without ``connect``."""
    with socket.socket(_family(address), socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        try:
            connection.sendto(payload.encode("latin-1"), socket.MSG_FASTOPEN, _target(address, port))
        except OSError as error:
            if error.errno != errno.EINPROGRESS:
                raise
            select.select([], [connection], [], PATIENCE)  # without a cookie the data follows the handshake
            failed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if failed:
                raise OSError(failed, os.strerror(failed)) from None
            connection.sendall(payload.encode("latin-1"))
        return f"sent; {_answer(connection)[:80]!r}"


@attempt("udp")
def udp(address: str, port: int, payload: str, expect_answer: bool = False) -> str:
    """Send a datagram; with ``expect_answer`` a missing answer is a refusal."""
    with socket.socket(_family(address), socket.SOCK_DGRAM) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        connection.sendto(payload.encode("latin-1"), _target(address, port))
        if not expect_answer:
            return "the kernel took the datagram"
        connection.settimeout(PATIENCE)
        return repr(connection.recv(512)[:80])


def _question(name: str) -> bytes:
    labels = b"".join(bytes([len(part)]) + part.encode() for part in name.split("."))
    return struct.pack(">HHHHHH", 0x5157, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", 1, 1)


@attempt("dns")
def dns(address: str, name: str, over: str, port: int = 53) -> str:
    """Ask a name server of our choice by UDP or TCP."""
    kind = socket.SOCK_DGRAM if over == "udp" else socket.SOCK_STREAM
    with socket.socket(_family(address), kind) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(_target(address, port))
        question = _question(name)
        connection.sendall(question if over == "udp" else struct.pack(">H", len(question)) + question)
        return f"answered with {len(connection.recv(512))} bytes"


@attempt("resolve")
def resolve(name: str) -> str:
    """Look a name up by the system's own resolver."""
    try:
        found = socket.getaddrinfo(name, 443)
    except socket.gaierror as error:
        raise Refused(str(error), reason=f"gaierror:{error.errno}") from None
    return str(found[0][4][0])


@attempt("icmp")
def icmp(address: str, payload: str, kind: str) -> str:
    """Send an echo request by a raw socket or a ping socket."""
    six = ":" in address
    raw = socket.SOCK_RAW if kind == "raw" else socket.SOCK_DGRAM
    body = struct.pack(">BBHHH", 128 if six else 8, 0, 0, 0x5157, 1) + payload.encode()
    if not six:
        words = sum(struct.unpack(f">{len(body + bytes(len(body) % 2)) // 2}H", body + bytes(len(body) % 2)))
        words = (words & 0xFFFF) + (words >> 16)
        words = (words & 0xFFFF) + (words >> 16)
        body = body[:2] + struct.pack(">H", ~words & 0xFFFF) + body[4:]
    with socket.socket(_family(address), raw, socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP) as connection:
        connection.settimeout(PATIENCE)
        connection.sendto(body, (address, 0))
        return "the kernel took the packet"


@attempt("socket")
def make_socket(family: int, kind: int, protocol: int = 0) -> str:
    """Create a socket of a family, type and protocol."""
    socket.socket(family, kind, protocol).close()
    return "the socket was made"


@attempt("netlink-write")
def netlink_write() -> str:
    """Change the network configuration: add an address to loopback by rtnetlink, and remove it again."""
    with socket.socket(16, socket.SOCK_RAW, 0) as link:
        for kind, flags in ((20, 0x405), (21, 0x5)):  # RTM_NEWADDR (create, ack), RTM_DELADDR (ack)
            body = struct.pack("BBBBi", socket.AF_INET, 32, 0, 254, 1)
            for name in (1, 2):  # IFA_ADDRESS, IFA_LOCAL
                body += struct.pack("HH", 8, name) + socket.inet_aton("127.31.7.9")
            link.send(struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0) + body)
            code = struct.unpack_from("i", link.recv(4096), 16)[0]
            if code:
                raise OSError(-code, os.strerror(-code))
    return "an address was added and removed"


@attempt("unix")
def unix(path: str, payload: str, kind: str = "stream") -> str:
    """Connect to a Unix socket and send; a leading ``@`` means an abstract name."""
    name = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM if kind == "dgram" else socket.SOCK_STREAM) as connection:
        connection.settimeout(PATIENCE)
        connection.connect(name)
        connection.sendall(payload.encode())
        return "connected and sent"


@attempt("unix-pair")
def unix_pair(nonce: str) -> str:
    """Talk over a Unix socket of our own."""
    left, right = socket.socketpair()
    with left, right:
        left.sendall(nonce.encode())
        return right.recv(64).decode()


@attempt("loopback")
def loopback(kind: str, nonce: str) -> str:
    """Talk over loopback inside the sandbox."""
    if kind == "udp":
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as two,
        ):
            two.bind(("127.0.0.1", 0))
            two.settimeout(PATIENCE)
            one.sendto(nonce.encode(), two.getsockname())
            return two.recv(64).decode()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        with socket.socket() as one:
            one.settimeout(PATIENCE)
            one.connect(listener.getsockname())
            two, _ = listener.accept()
            with two:
                one.sendall(nonce.encode())
                return two.recv(64).decode()


@attempt("tcp-socket")
def tcp_socket() -> str:
    """Make an ordinary TCP and an ordinary UDP socket."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        socket.socket(socket.AF_INET, kind).close()
    return "made"


@attempt("listen")
def listen(port: int, kind: str, seconds: float) -> str:
    """Wait to be reached from outside; the kit knocks at every address it knows."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", port))
        listener.settimeout(seconds)
        if kind == "udp":
            return f"reached: {listener.recv(64)!r}"
        listener.listen(4)
        connection, peer = listener.accept()
        connection.close()
        return f"reached from {peer[0]}"


@attempt("interfaces")
def interfaces(marks: list[str]) -> str:
    """Find an interface of the host by name."""
    found = [name for _, name in socket.if_nameindex()]
    seen = [mark for mark in marks if mark in found]
    if not marks:
        raise NotPossible("no interface of the host is known")
    if not seen:
        raise Refused(f"only {', '.join(found)}", reason="absent")
    return f"sees {', '.join(seen)}"


@attempt("promiscuous")
def promiscuous() -> str:
    """Set loopback to promiscuous mode by ioctl, and back."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = bytearray(struct.pack("16sh22x", b"lo", 0))
        fcntl.ioctl(control, 0x8913, request)  # SIOCGIFFLAGS
        flags = struct.unpack_from("h", request, 16)[0]
        fcntl.ioctl(control, 0x8914, struct.pack("16sh22x", b"lo", flags | 0x100))
        fcntl.ioctl(control, 0x8914, struct.pack("16sh22x", b"lo", flags))
    return "changed"


@attempt("relay")
def relay(address: str, port: int, nonce: str) -> str:
    """Let another program make the connection: bash, by its own ``/dev/tcp``."""
    if not os.path.exists("/bin/bash"):
        raise NotPossible("bash is not installed")
    script = f"exec 3<>/dev/tcp/{address}/{port} && echo {nonce} >&3"
    done = subprocess.run(["timeout", "2", "/bin/bash", "-c", script], capture_output=True, check=False)
    if done.returncode:
        text = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit {done.returncode}"]
        code = next((number for number in SAID if os.strerror(number) in text[0]), errno.ETIMEDOUT)
        raise OSError(code, "timed out" if code == errno.ETIMEDOUT else text[0])
    return "bash connected and sent"
