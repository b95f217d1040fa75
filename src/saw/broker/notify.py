"""Tells systemd that the broker is ready or stopping (sd_notify(3))."""

from __future__ import annotations

import socket


def notify(message: str, address: str | None) -> None:
    """Send ``message`` (``READY=1``) to the socket ``address`` of ``NOTIFY_SOCKET``; nothing happens without one."""
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            client.connect("\0" + address[1:] if address.startswith("@") else address)
            client.sendall(message.encode())
