"""A client for the HTTPS API of another service, such as AWX or a vault: only what its authorities vouch for is talked to."""

from __future__ import annotations

import ssl

import httpx

from saw.errors import ConfigError


def https_client(url: str, ca_file: str | None, timeout_s: float, setting: str) -> httpx.Client:
    """Return a client for ``url``, TLS 1.2 and later, that takes no proxy from the environment and follows no redirect.

    ``ca_file``: authorities (PEM) of the far end, None for the system's; ``setting`` is its name in the configuration, for the
    :class:`ConfigError` when it cannot be used. ``timeout_s`` counts for each step, seconds.
    """
    context = https_context(ca_file, setting)
    return httpx.Client(verify=context, base_url=url, timeout=timeout_s, trust_env=False, follow_redirects=False)


def https_async_client(context: ssl.SSLContext, timeout_s: float) -> httpx.AsyncClient:
    """Return the same as :func:`https_client` for asynchronous use and for any server that ``context`` vouches for.

    Use one per exchange where names of servers are told apart: connections are kept by address.
    """
    return httpx.AsyncClient(verify=context, timeout=timeout_s, trust_env=False, follow_redirects=False)


def https_context(ca_file: str | None, setting: str) -> ssl.SSLContext:
    """Return what vouches for servers; see :func:`https_client`. It takes tens of milliseconds: keep it."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ConfigError(f"{setting} cannot be used: {error.strerror or error}", cure="check the file") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
