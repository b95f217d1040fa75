"""A small, strict RELP client over TLS: syslog messages of which each is acknowledged by the receiver.

RELP (the protocol of rsyslog's ``imrelp``, version 0) sends frames ``TXNR SP COMMAND SP DATALEN [SP DATA] LF``; the
receiver answers each with a frame ``rsp`` of the same number, once it has taken the message into its care. A message without
an answer is sent again over the next connection, so delivery is at least once.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from saw.audit.chain import ChainedEvent
from saw.audit.receiver import WINDOW, DeliveryError, Receiver, tls_context
from saw.audit.syslog import message

_LAST_NUMBER = 999_999_999
_LONGEST_ANSWER = 65_536
_HEADER = re.compile(rb"(\d{1,9}) ([A-Za-z]{1,32}) (\d{1,9})([ \n])")
_LONGEST_HEADER = 54


class Messages:
    """The way of shipping: messages of RFC 5424 over RELP and TLS."""

    def message(self, item: ChainedEvent, position: int, mark: str, host: str, longest: int) -> bytes:
        """Return one message of syslog."""
        return message(item, position, mark, host, longest)

    def open(self, receiver: Receiver) -> AbstractContextManager[Session]:
        """Connect and begin a session."""
        return Session.open(receiver)


class Session:
    """One open RELP session. Not for several threads."""

    def __init__(self, connection: socket.socket, address: str) -> None:
        self._connection = connection
        self._address = address
        self._buffer = bytearray()
        self._number = 0

    @classmethod
    @contextmanager
    def open(cls, receiver: Receiver) -> Iterator[Session]:
        """Connect, check the receiver's certificate and name, and begin a session; it is closed with the block.

        Raises :class:`DeliveryError` naming the reason, and :class:`ConfigError` for files that cannot be used.
        """
        context = tls_context(receiver)
        with contextlib.ExitStack() as stack:
            try:
                plain = socket.create_connection((receiver.host, receiver.port), timeout=receiver.timeout_s)
                stack.callback(plain.close)
                wrapped = context.wrap_socket(plain, server_hostname=receiver.name or receiver.host)
                stack.callback(wrapped.close)
            except ssl.SSLCertVerificationError as error:
                raise DeliveryError(
                    f"{receiver.address} is not the receiver that was named: {error.verify_message or error}",
                    cure="check receiver.name and receiver.ca_file, and who answers there",
                ) from error
            except OSError as error:
                raise DeliveryError(
                    f"{receiver.address} cannot be reached over TLS: {error.strerror or error}",
                    cure="check that the receiver runs, and speaks RELP over TLS",
                ) from error
            session = cls(wrapped, receiver.address)
            with session._broken():
                session._begin()
            yield session
            with contextlib.suppress(OSError, DeliveryError):
                session._send("close", b"")

    def deliver(self, messages: Sequence[bytes], acknowledged: Callable[[int], None]) -> None:
        """Send ``messages`` in order; ``acknowledged(n)`` is called as the first n of them have been taken.

        Raises :class:`DeliveryError` when one is not, or the connection ends; what was acknowledged stays so.
        """
        waiting: deque[int] = deque()
        done = 0
        with self._broken():
            for message in messages:
                waiting.append(self._send("syslog", message))
                while len(waiting) >= WINDOW or (waiting and self._pending()):
                    done = self._take(waiting, done, acknowledged)
            while waiting:
                done = self._take(waiting, done, acknowledged)

    def check(self) -> None:
        """Raise :class:`DeliveryError` when the receiver has ended the session meanwhile."""
        with self._broken():
            if self._pending():
                number, command, _ = self._frame()
                raise DeliveryError(
                    f"{self._address} sent {command} {number} unasked", cure="it is tried again by itself"
                )

    def _begin(self) -> None:
        offers = b"relp_version=0\nrelp_software=saw,0,-\ncommands=syslog"
        number = self._send("open", offers)
        answer = self._answer(number)
        lines = answer.decode("ascii", "replace").splitlines()[1:]
        offered = dict(line.partition("=")[::2] for line in lines)
        if offered.get("relp_version") != "0" or "syslog" not in offered.get("commands", "").split(","):
            raise DeliveryError(
                f"{self._address} does not take syslog over RELP version 0", cure="check the receiver's configuration"
            )

    def _take(self, waiting: deque[int], done: int, acknowledged: Callable[[int], None]) -> int:
        self._answer(waiting[0])
        waiting.popleft()
        acknowledged(done + 1)
        return done + 1

    def _answer(self, number: int) -> bytes:
        """Return the data of the answer to ``number``, which has to be next: receivers answer in order."""
        found, command, data = self._frame()
        if command == "serverclose":
            raise DeliveryError(f"{self._address} ended the session", cure="it is tried again by itself")
        if command != "rsp" or found != number:
            raise DeliveryError(
                f"{self._address} sent {command} {found} where the answer to {number} was due",
                cure="check that the receiver speaks RELP",
            )
        if not re.match(rb"200( |\n|$)", data):
            said = data[:200].decode("ascii", "replace").strip()
            raise DeliveryError(f"{self._address} refuses a message: {said}", cure="see the receiver's log")
        return data

    def _send(self, command: str, data: bytes) -> int:
        self._number = self._number + 1 if self._number < _LAST_NUMBER else 1
        head = f"{self._number} {command} {len(data)}".encode()
        self._connection.sendall(head + (b" " + data if data else b"") + b"\n")
        return self._number

    def _frame(self) -> tuple[int, str, bytes]:
        while (head := _HEADER.match(bytes(self._buffer[:_LONGEST_HEADER]))) is None:
            if len(self._buffer) >= _LONGEST_HEADER or (self._buffer and not self._buffer[:1].isdigit()):
                raise DeliveryError(
                    f"{self._address} does not speak RELP", cure="point receiver.port at an imrelp listener"
                )
            self._receive()
        size = int(head[3])
        if size > _LONGEST_ANSWER:
            raise DeliveryError(f"{self._address} answers with {size} bytes", cure="check that it speaks RELP")
        # No data: the header's last byte is the end of the frame.
        end = head.end() + size if head[4] == b" " else head.end() - 1
        while len(self._buffer) <= end:
            self._receive()
        if self._buffer[end] != 0x0A or (head[4] == b"\n" and size):
            raise DeliveryError(f"{self._address} sent a frame without its end", cure="check that it speaks RELP")
        data = bytes(self._buffer[head.end() : end])
        del self._buffer[: end + 1]
        return int(head[1]), head[2].decode(), data

    def _receive(self) -> None:
        chunk = self._connection.recv(16_384)
        if not chunk:
            raise DeliveryError(f"{self._address} closed the connection", cure="it is tried again by itself")
        self._buffer += chunk

    def _pending(self) -> bool:
        """Tell whether something can be read now: in our buffer, in TLS, or on the wire."""
        if self._buffer or (isinstance(self._connection, ssl.SSLSocket) and self._connection.pending()):
            return True
        return bool(select.select([self._connection], [], [], 0)[0])

    @contextmanager
    def _broken(self) -> Iterator[None]:
        """Turn what a broken connection raises into a :class:`DeliveryError`."""
        try:
            yield
        except OSError as error:
            raise DeliveryError(
                f"the connection to {self._address} broke: {error.strerror or error}",
                cure="it is tried again by itself; a receiver that asks for a certificate needs certificate_file",
            ) from error
