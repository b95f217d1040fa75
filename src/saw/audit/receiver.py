"""Where the trail is shipped to, and what every way of shipping has in common: TLS with a named receiver, and its errors."""

from __future__ import annotations

import re
import ssl
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from saw.audit.chain import ChainedEvent
from saw.errors import ConfigError, UnavailableError

#: How many messages may be under way without an answer.
WINDOW = 128
_PATH = re.compile(r"/[A-Za-z0-9._~/-]{0,200}")


class DeliveryError(UnavailableError):
    """The receiver cannot be reached, is not the one that was named, or does not take a message.

    ``wait_s`` is how long the receiver wants to be left alone (seconds).
    """

    code = "delivery_failed"

    def __init__(self, message: str, *, cure: str = "", wait_s: float = 0.0) -> None:
        super().__init__(message, cure=cure)
        self.wait_s = wait_s


class Receiver(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where messages go. ``name`` is what the receiver's certificate must be for (default: ``host``).

    ``ca_file``: the authorities that may have issued it. ``certificate_file`` and ``key_file`` (PEM, both or none): what we
    show a receiver that asks. Times out after ``timeout_s`` seconds without progress. ``protocol``: ``relp`` (syslog) or
    ``otlp`` (OpenTelemetry logs over HTTPS); ``path`` and ``token_file`` (a bearer token) are for ``otlp`` alone.
    """

    host: str
    port: int
    ca_file: str
    name: str = ""
    certificate_file: str | None = None
    key_file: str | None = None
    timeout_s: float = 30.0
    protocol: Literal["relp", "otlp"] = "relp"
    path: str = "/v1/logs"
    token_file: str | None = None

    @property
    def address(self) -> str:
        """Host and port for people."""
        return f"{self.host}:{self.port}"


def problems_of(receiver: Receiver) -> list[str]:
    """Return what is wrong with the description of a receiver, by field."""
    files = (receiver.ca_file, receiver.certificate_file, receiver.key_file, receiver.token_file)
    return [
        text
        for bad, text in (
            (not receiver.host, "receiver.host must name a host"),
            (not 1 <= receiver.port <= 65535, "receiver.port must be 1 to 65535"),
            (not 1 <= receiver.timeout_s <= 600, "receiver.timeout_s must be 1 to 600"),
            (not _PATH.fullmatch(receiver.path), "receiver.path must be the path of a URL"),
            (
                receiver.protocol != "otlp" and (receiver.path, receiver.token_file) != ("/v1/logs", None),
                "receiver.path and receiver.token_file are for protocol otlp",
            ),
            (
                (receiver.certificate_file is None) != (receiver.key_file is None),
                "receiver.certificate_file and receiver.key_file go together",
            ),
            (not all(Path(name or "/").is_absolute() for name in files), "files of receiver must be absolute paths"),
        )
        if bad
    ]


class Outlet(Protocol):
    """An open connection to a receiver. Not for several threads."""

    def deliver(self, messages: Sequence[bytes], acknowledged: Callable[[int], None]) -> None:
        """Send ``messages`` in order; ``acknowledged(n)`` is called as the first n of them have been taken.

        Raises :class:`DeliveryError` when one is not, or the connection ends; what was acknowledged stays so.
        """
        ...

    def check(self) -> None:
        """Raise :class:`DeliveryError` when the receiver has ended the connection meanwhile."""
        ...


class Way(Protocol):
    """One way of shipping: how an event is written, and how a receiver is reached."""

    def message(self, item: ChainedEvent, position: int, mark: str, host: str, longest: int) -> bytes:
        """Return ``item`` as one message of at most ``longest`` bytes; a longer event is left out and its size is said."""
        ...

    def open(self, receiver: Receiver) -> AbstractContextManager[Outlet]:
        """Connect; raises :class:`DeliveryError`, and :class:`ConfigError` for files that cannot be used."""
        ...


def tls_context(receiver: Receiver) -> ssl.SSLContext:
    """Return a context that takes the named receiver and nobody else; raise :class:`ConfigError` for files that do not fit."""
    try:
        context = ssl.create_default_context(cafile=receiver.ca_file)
        if receiver.certificate_file is not None:
            context.load_cert_chain(receiver.certificate_file, receiver.key_file)
    except OSError as error:
        files = [receiver.ca_file, receiver.certificate_file, receiver.key_file]
        missing = [name for name in files if name is not None and not Path(name).exists()]
        raise ConfigError(
            f"certificates for {receiver.address} cannot be used: {', '.join(missing) or error.strerror or error}",
            cure="check ca_file, certificate_file and key_file of receiver",
        ) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


__all__ = ["WINDOW", "DeliveryError", "Outlet", "Receiver", "Way", "problems_of", "tls_context"]
