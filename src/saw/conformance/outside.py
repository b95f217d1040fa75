"""What stands outside the sandbox during a run: a recorder, a canary process and, for local targets, a network of their own.

A :class:`Ground` is a private network namespace, with a private ``/run``, in which the target runs. Its addresses are those that
an attacker would call (metadata, private and public ones), and the recorder holds them all. Nothing in it reaches the machine's
own network, and all of it ends with its holder process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import msgspec

from saw import jsontext
from saw.conformance.recorder import Plan
from saw.errors import SawError, UnavailableError

OUT4, OUT6 = "192.0.2.10", "2001:db8::10"
ADDRESSES = (
    f"{OUT4}/24", "169.254.169.254/32", "100.100.100.200/32", "168.63.129.16/32", "10.20.30.40/32", "192.168.77.1/32",
    f"{OUT6}/64", "fd00:ec2::254/128", "64:ff9b::a9fe:a9fe/128", "2002:a9fe:a9fe::1/128", "fe80::5157/64",
)  # fmt: skip
KNOCK_PORT = 46157
TCP_PORTS = (22, 25, 53, 80, 443, 853, 3128, 8080)
UDP_PORTS = (53, 123, 443, 5353)
RUN_SOCKETS = (
    "/run/docker.sock",
    "/run/containerd/containerd.sock",
    "/run/dbus/system_bus_socket",
    "/run/systemd/private",
)
RUN_DATAGRAM = ("/run/systemd/notify", "/run/systemd/journal/socket")
ANSWER_S = 20.0


class OutsideError(SawError):
    """What must stand outside the sandbox does not."""

    code = "recorder_failed"


def _finish(reader: threading.Thread, process: subprocess.Popen[bytes]) -> None:
    """End a process by the end of its input, or by force, and then the thread that reads it."""
    with contextlib.suppress(OSError):
        if process.stdin:
            process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if reader.is_alive():
        reader.join(5)
    if process.stdout and not reader.is_alive():
        process.stdout.close()


class RecorderProcess:
    """The recorder as a child process; :attr:`arrived` maps each nonce to the places where it was seen."""

    def __init__(self, plan: Plan, prefix: list[str]) -> None:
        self.arrived: dict[str, list[str]] = {}
        self._changed = threading.Condition()
        self._synced, self._asked, self._ended = 0, 0, False
        self._reader = threading.Thread(target=self._read, daemon=True)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "saw.conformance.recorder"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd="/",
        )  # fmt: skip
        self._write(msgspec.json.encode(plan) + b"\n")
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        try:
            told = jsontext.decode(self._process.stdout.readline() or b"null")
            self.bound: list[str] = told["bound"]
            self.failed: list[str] = told["failed"]
        except (msgspec.DecodeError, TypeError, KeyError):
            self.close()
            raise OutsideError("the recorder did not start", cure="see the messages above") from None
        self._reader.start()

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None  # noqa: S101 - a pipe was asked for
        self._process.stdin.write(data)
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        for line in self._process.stdout:
            told = jsontext.decode(line)
            with self._changed:
                if "synced" in told:
                    self._synced = told["synced"]
                else:
                    self.arrived.setdefault(told["nonce"], []).append(f"{told['via']} from {told['source']}")
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def sync(self) -> None:
        """Wait until everything that has arrived is known; raise :class:`OutsideError` when the recorder is gone."""
        self._asked += 1
        try:
            self._write(f"sync {self._asked}\n".encode())
        except OSError:
            self._ended = True
        with self._changed:
            done = self._changed.wait_for(lambda: self._ended or self._synced >= self._asked, ANSWER_S)
        if self._ended or not done:
            raise OutsideError("the recorder ended during the run", cure="run it again; nothing was proved")

    def close(self) -> None:
        """End it."""
        _finish(self._reader, self._process)


class Canary:
    """The process of the host that the sandbox must not touch."""

    def __init__(self, prefix: list[str]) -> None:
        self.mark, self.key = f"saw-{secrets.token_hex(10)}", 0x5A570000 | secrets.randbelow(65536)
        self.folders = ["/tmp", "/dev/shm", "/var/tmp"]  # noqa: S108 - what a private /tmp is for
        self.signals = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        source = Path(__file__).with_name("canary.py").read_text(encoding="utf-8")
        words = [self.mark, str(self.key), *self.folders]
        self._process = subprocess.Popen(
            [*prefix, "/usr/bin/env", f"SAW_CANARY={self.mark}", "python3", "-I", "-c", source, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        told = self._process.stdout.readline().split()
        if len(told) != 2:
            self.close()
            raise OutsideError("the canary process did not start", cure="see the messages above")
        self.pid = int(told[1])
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - a pipe was asked for
        for _ in self._process.stdout:
            self.signals += 1

    def close(self) -> None:
        """End it; it removes what it made."""
        _finish(self._reader, self._process)


class Ground:
    """A private network for local targets; see the module."""

    def __init__(self) -> None:
        if os.geteuid() != 0:
            raise UnavailableError(
                "a local target needs root: it runs in a network of its own", cure="run it with sudo"
            )
        self._socket = Path(f"/tmp/saw-conformance-{os.getpid()}.sock")  # noqa: S108 - a socket in /tmp is the case
        self._abstract = f"@saw-conformance-{os.getpid()}"
        self.resolver = Path(tempfile.mkdtemp(prefix="saw-conformance-")) / "resolv.conf"
        self.resolver.write_text(f"nameserver {OUT4}\noptions timeout:1 attempts:1\n", encoding="ascii")
        self.resolver.parent.chmod(0o755)
        setup = (
            "mount -t tmpfs none /run && mkdir -p /run/netns && mount --bind \"$1\" \"$(readlink -f /etc/resolv.conf)\" && "
            "ip link set lo up && ip link add sawc0 type veth peer name sawc1 && "
            "for end in all default sawc0 sawc1; do echo 0 >/proc/sys/net/ipv6/conf/$end/accept_dad; done && "
            f"for address in {' '.join(ADDRESSES)}; do ip address add $address dev sawc0; done && "
            "ip link set sawc1 up && ip link set sawc0 up && ip route add 224.0.0.0/4 dev sawc0 && "
            "echo '0 2147483647' >/proc/sys/net/ipv4/ping_group_range && echo ready && exec cat"
        )  # fmt: skip
        flags = ["--mount", "--net", "--propagation", "private"]
        self._holder = subprocess.Popen(
            ["unshare", *flags, "sh", "-ec", setup, "sh", str(self.resolver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None  # noqa: S101 - a pipe was asked for
        if self._holder.stdout.readline() != b"ready\n":
            self.close()
            raise UnavailableError("the private network could not be made", cure="see the messages above")

    @property
    def pid(self) -> int:
        """Return the process whose namespaces these are."""
        return self._holder.pid

    def prefix(self) -> list[str]:
        """Return the words that run a command in the ground."""
        return ["nsenter", "-t", str(self.pid), "-m", "-n"]

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the ground to its end."""
        return subprocess.run(
            [*self.prefix(), *words], capture_output=True, text=True, check=False, timeout=120, cwd="/"
        )

    def plan(self, *, more: tuple[tuple[str, int], ...] = (), knock: tuple[str, ...] = (), run: bool = True) -> Plan:
        """Return what the recorder listens on; ``more`` are further TCP endpoints, ``knock`` addresses of the sandbox."""
        hosts = [address.split("/")[0] for address in ADDRESSES]
        return Plan(
            tcp=(*((host, port) for host in hosts for port in TCP_PORTS), ("127.0.0.1", 8080), ("::1", 8080), *more),
            udp=(*((host, port) for host in (OUT4, OUT6) for port in UDP_PORTS), ("224.0.0.251", 5353),
                 *((address, 53) for address in {address for address, _ in more})),
            unix=(self._abstract, str(self._socket), *(RUN_SOCKETS if run else ())),
            unix_datagram=RUN_DATAGRAM if run else (),
            icmp=True,
            multicast=OUT4,
            knock=tuple((address, KNOCK_PORT) for address in knock),
        )  # fmt: skip

    def facts(self, *, run: bool = True) -> dict[str, object]:
        """Return the facts that a target in the ground can be tried with."""
        return {
            "ground": True,
            "v4": OUT4,
            "v6": OUT6,
            "link6": "fe80::5157",
            "metadata": "169.254.169.254",
            "dns": True,
            "unix_abstract": self._abstract,
            "unix_path": str(self._socket),
            "unix_run": True if run else None,
            "knock": KNOCK_PORT,
            "host_interfaces": ["sawc0", "sawc1"],
        }

    def close(self) -> None:
        """End the holder and with it the network."""
        with contextlib.suppress(OSError):
            if self._holder.stdin:
                self._holder.stdin.close()
        self._holder.kill()
        self._holder.wait()
        if self._holder.stdout:
            self._holder.stdout.close()
        self._socket.unlink(missing_ok=True)
        self.resolver.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.resolver.parent.rmdir()
