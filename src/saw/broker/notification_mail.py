"""Sends a message to a mail server (SMTP, RFC 5321), over TLS that names the server, or to one on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import smtplib
import socket
import ssl
import threading
from typing import Any

from saw import jsontext
from saw.broker.notification_files import read_secret, tls_context
from saw.broker.notification_queue import Claimed, NotDelivered
from saw.broker.notification_settings import Email
from saw.broker.notification_words import Message, mail

STEP_S = 10.0
"""How long one step of a delivery may take."""
WHOLE_S = 45.0
"""How long all of it may take, however little comes how slowly."""


class _Line:
    """The connection of one delivery, which another thread can end; a copy of it, because TLS takes its socket over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: socket.socket | None = None
        self.ended = False

    def hold(self, connection: socket.socket) -> None:
        """Remember ``connection``; end it when that was asked for already."""
        with self._lock:
            self._held = connection.dup()
        if self.ended:
            self.end()

    def end(self) -> None:
        """End the connection: whoever reads from it reads its end."""
        self.ended = True
        with self._lock, contextlib.suppress(OSError):
            if self._held is not None:
                self._held.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the copy."""
        with self._lock:
            if self._held is not None:
                self._held.close()
                self._held = None


class _Connection(smtplib.SMTP):
    """A connection to the server of ``channel`` that can be ended, over TLS from its beginning where that is so."""

    def __init__(self, channel: Email, line: _Line, context: ssl.SSLContext | None, local_name: str) -> None:
        self._line = line
        self._implicit = context if channel.tls == "implicit" else None
        super().__init__(channel.host, channel.port, local_name, STEP_S)

    def _get_socket(self, host: str, port: int, timeout: float) -> socket.socket:
        connection = socket.create_connection((host, port), timeout)
        self._line.hold(connection)
        return connection if self._implicit is None else self._implicit.wrap_socket(connection, server_hostname=host)


class MailSender:
    """Sends to one channel; ``local_name`` is the name by which this machine greets."""

    def __init__(self, channel: Email, local_name: str) -> None:
        self._channel = channel
        self._local_name = local_name

    async def send(self, claimed: Claimed) -> None:
        """Deliver a message; raise :class:`NotDelivered`."""
        line = _Line()
        try:
            await asyncio.to_thread(self._send, claimed, line)
        except asyncio.CancelledError:
            line.end()
            raise

    def _send(self, claimed: Claimed, line: _Line) -> None:
        timer = threading.Timer(WHOLE_S, line.end)
        timer.daemon = True
        timer.start()
        try:
            self._deliver(claimed, line)
        except (smtplib.SMTPException, OSError) as error:
            if line.ended:
                raise NotDelivered(f"it took longer than {WHOLE_S:.0f} s", code="timed_out") from error
            raise _not_delivered(error) from error
        finally:
            timer.cancel()
            line.close()

    def _deliver(self, claimed: Claimed, line: _Line) -> None:
        channel = self._channel
        letter = mail(jsontext.decode(claimed.body, kind=Message), channel, claimed.recipient, claimed.id)
        context = None if channel.tls == "none" else tls_context(channel.ca_file)
        password = None if channel.password_file is None else read_secret(channel.password_file)
        connection = _Connection(channel, line, context, self._local_name)
        try:
            if channel.tls == "starttls":
                connection.starttls(context=context)  # raises unless the connection is encrypted then
            if channel.username is not None and password is not None:
                connection.login(channel.username, password)
            connection.send_message(letter, channel.sender, [claimed.recipient])
            with contextlib.suppress(smtplib.SMTPException, OSError):
                connection.quit()  # it was taken, however the end goes
        finally:
            connection.close()


def _not_delivered(error: Exception) -> NotDelivered:
    """Say what went wrong. Of the server's own words its number is told, and no more."""
    if isinstance(error, ssl.SSLCertVerificationError):
        words = f"it is not the server that was named: {error.verify_message}"
        return NotDelivered(words, code="certificate_refused", cure="check host and ca_file, and who answers there")
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return NotDelivered(
            "it offers no TLS, or no way to log in, that was asked for",
            code="not_offered",
            cure="check port, tls and username",
        )
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        status = max((_status(found) for found in error.recipients.values()), default=0)
        return NotDelivered(
            f"it refuses the address: {status}", code="address_refused", cure="correct to", gives_up=500 <= status < 600
        )
    if isinstance(error, smtplib.SMTPAuthenticationError):
        words = f"it refuses the login: {error.smtp_code}"
        return NotDelivered(words, code="login_refused", cure="check username and password_file")
    if isinstance(error, smtplib.SMTPResponseException):
        final = isinstance(error, smtplib.SMTPDataError) and 500 <= error.smtp_code < 600
        words = f"it answered {error.smtp_code}"
        return NotDelivered(words, code="refused", cure="see the mail server's log", gives_up=final)
    if isinstance(error, TimeoutError):
        return NotDelivered(f"it did not answer within {STEP_S:.0f} s", code="timed_out")
    words = error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__
    return NotDelivered(f"it cannot be reached: {words}", code="unreachable", cure="it is tried again by itself")


def _status(found: Any) -> int:
    return int(found[0]) if isinstance(found, tuple) and found else 0
