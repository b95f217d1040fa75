"""A certificate with its key, from memory into a TLS context, which takes files alone."""

from __future__ import annotations

import os
import ssl


def load_cert_chain(context: ssl.SSLContext, pem: bytes) -> None:
    """Load ``pem`` (certificates and their key) by an anonymous file of this process (memfd_create(2)); nothing is on a disk.

    Raise ``ssl.SSLError`` when it cannot be used.
    """
    descriptor = os.memfd_create("saw-certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as stream:
            stream.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
