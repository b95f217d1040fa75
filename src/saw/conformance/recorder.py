"""The recorder outside the sandbox: listens, and writes down which nonces arrived, where.

``python -m saw.conformance.recorder`` reads one JSON object (:class:`Plan`) as the first line of standard input and answers
``{"bound": […], "failed": […]}``; later, per arrival, ``{"nonce", "via", "source"}``. A line ``sync N`` is answered with
``{"synced": N}`` once nothing has arrived for a while. It ends with its standard input.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from pathlib import Path

import msgspec

from saw import jsontext

NONCE = b"saw-"
QUIET_S = 0.15
LONGEST_S = 1.0
HEAD = 65536


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to listen on: ``tcp`` and ``udp`` as (address, port), Unix socket paths (``@`` abstract), ICMP, and where to knock."""

    tcp: tuple[tuple[str, int], ...] = ()
    udp: tuple[tuple[str, int], ...] = ()
    unix: tuple[str, ...] = ()
    unix_datagram: tuple[str, ...] = ()
    icmp: bool = False
    multicast: str = ""
    knock: tuple[tuple[str, int], ...] = ()


class Recorder:
    """Listens on everything of a plan until its standard input ends."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.selector = selectors.DefaultSelector()
        self.bound: list[str] = []
        self.failed: list[str] = []
        self._seen: set[tuple[str, str]] = set()

    def say(self, **words: object) -> None:
        """Write one line of JSON."""
        sys.stdout.write(json.dumps(words) + "\n")
        sys.stdout.flush()

    def open(self) -> None:
        """Bind what can be bound; the rest is named in the answer."""
        for address, port in self.plan.tcp:
            self._bind(f"tcp {address} {port}", address, port, socket.SOCK_STREAM)
        for address, port in self.plan.udp:
            self._bind(f"udp {address} {port}", address, port, socket.SOCK_DGRAM)
        for path in self.plan.unix:
            self._unix(path, socket.SOCK_STREAM)
        for path in self.plan.unix_datagram:
            self._unix(path, socket.SOCK_DGRAM)
        if self.plan.icmp:
            for family, protocol, name in (
                (socket.AF_INET, socket.IPPROTO_ICMP, "icmp"),
                (socket.AF_INET6, socket.IPPROTO_ICMPV6, "icmp6"),
            ):
                try:
                    listener = socket.socket(family, socket.SOCK_RAW, protocol)
                except OSError as error:
                    self.failed.append(f"{name}: {error.strerror}")
                    continue
                self._watch(listener, name, "datagram")
        self.say(bound=self.bound, failed=self.failed)

    def _bind(self, name: str, address: str, port: int, kind: socket.SocketKind) -> None:
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if ":" in address:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if kind == socket.SOCK_STREAM:
                with contextlib.suppress(OSError):
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
            if address == "224.0.0.251":
                group = socket.inet_aton(address) + socket.inet_aton(self.plan.multicast or "0.0.0.0")  # noqa: S104
                listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            scope = _link_scope() if address.lower().startswith("fe80:") else 0
            listener.bind((address, port, 0, scope) if ":" in address else (address, port))
            if kind == socket.SOCK_STREAM:
                listener.listen(64)
        except OSError as error:
            listener.close()
            self.failed.append(f"{name}: {error.strerror}")
            return
        self._watch(listener, name, "accept" if kind == socket.SOCK_STREAM else "datagram")

    def _unix(self, path: str, kind: socket.SocketKind) -> None:
        listener = socket.socket(socket.AF_UNIX, kind)
        try:
            if not path.startswith("@"):
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            listener.bind("\0" + path[1:] if path.startswith("@") else path)
            if not path.startswith("@"):
                Path(path).chmod(0o666)  # whoever can see it may use it: only being hidden protects it
            if kind == socket.SOCK_STREAM:
                listener.listen(16)
        except OSError as error:
            listener.close()
            self.failed.append(f"unix {path}: {error.strerror}")
            return
        self._watch(listener, f"unix {path}", "accept" if kind == socket.SOCK_STREAM else "datagram")

    def _watch(self, listener: socket.socket, name: str, kind: str) -> None:
        listener.setblocking(False)
        self.bound.append(name)
        self.selector.register(listener, selectors.EVENT_READ, (kind, name))

    def step(self, wait: float) -> bool:
        """Serve what is ready within ``wait`` seconds; tell whether anything was."""
        ready = self.selector.select(wait)
        for key, _ in ready:
            if key.data is None:
                continue
            kind, name = key.data
            with contextlib.suppress(OSError):
                self._serve(key.fileobj, kind, name)  # type: ignore[arg-type]
        return any(key.data is not None for key, _ in ready)

    def _serve(self, one: socket.socket, kind: str, name: str) -> None:
        if kind == "accept":
            connection, _ = one.accept()
            connection.setblocking(False)
            self.selector.register(connection, selectors.EVENT_READ, ("stream", name))
            return
        try:
            data, source = one.recvfrom(HEAD)
        except OSError:
            data, source = b"", None
        self._record(data, name, source)
        if kind == "datagram" and name.endswith(" 53") and len(data) > 12:
            one.sendto(_no_such_name(data), source)
        if kind == "stream":
            if data:
                answer = _no_such_name(data[2:]) if name.endswith(" 53") else b""
                reply = struct.pack(">H", len(answer)) + answer if answer else _RECORDED
                with contextlib.suppress(OSError):
                    one.send(reply)
            else:
                self.selector.unregister(one)
                one.close()

    def _record(self, data: bytes, name: str, source: object) -> None:
        start = 0
        while (start := data.find(NONCE, start)) >= 0:
            word = data[start : start + 24].decode("ascii", "replace")
            start += 4
            if len(word) == 24 and (word, name) not in self._seen:
                self._seen.add((word, name))
                self.say(nonce=word, via=name, source=str(source or ""))

    def knock(self) -> None:
        """Try to reach the sandbox's addresses from outside, over and over."""
        while True:
            for address, port in self.plan.knock:
                with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
                    one.sendto(b"knock", (address, port))
                with contextlib.suppress(OSError), socket.socket() as one:
                    one.settimeout(0.2)
                    one.connect((address, port))
            time.sleep(0.1)

    def run(self) -> None:
        """Serve until standard input ends."""
        self.open()
        if self.plan.knock:
            threading.Thread(target=self.knock, daemon=True).start()
        self.selector.register(sys.stdin.fileno(), selectors.EVENT_READ, None)
        pending = b""
        while True:
            events = [key for key, _ in self.selector.select(None) if key.data is None]
            self.step(0)
            if not events:
                continue
            piece = os.read(sys.stdin.fileno(), 4096)
            if not piece:
                return
            pending += piece
            while b"\n" in pending:
                line, _, pending = pending.partition(b"\n")
                self._settle()
                self.say(synced=int(line.split()[1]))

    def _settle(self) -> None:
        begin = time.monotonic()
        quiet = begin + QUIET_S
        while (left := min(quiet, begin + LONGEST_S) - time.monotonic()) > 0:
            if self.step(left):  # what the knocking itself brings back never ends, so there is a bound
                quiet = time.monotonic() + QUIET_S


_RECORDED = b"HTTP/1.0 200 OK\r\nContent-Length: 9\r\n\r\nrecorded\n"


def _no_such_name(question: bytes) -> bytes:
    return question[:2] + b"\x81\x83" + question[4:6] + b"\0\0\0\0\0\0" + question[12:]


def _link_scope() -> int:
    names = {name: index for index, name in socket.if_nameindex() if name != "lo"}
    return names.get("sawc0") or next(iter(names.values()), 0)


def main() -> int:
    """Read the plan and run."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the kit ends it, by closing its standard input
    raw = b""
    while not raw.endswith(b"\n"):
        piece = os.read(0, 1)
        if not piece:
            return 1
        raw += piece
    Recorder(jsontext.decode(raw, kind=Plan)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
