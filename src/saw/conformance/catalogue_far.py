"""Cases that need a far end which plays a part: it shows what it got, takes WebSockets, or is not whom its name says.

``--placeholder`` names the variable inside that holds what stands for a credential, ``--echo-url`` an allowed address at which
that credential is put in and whose service shows the headers that it got, ``--websocket-url`` an allowed WebSocket for texts.
``--inside-url``, ``--mixed-url`` and ``--forged-url`` are allowed addresses whose name leads inside, leads inside and outside,
and leads to a service with a certificate that no authority vouches for.
"""

from __future__ import annotations

import base64
from functools import partial
from typing import Any

from saw.conformance.case import Case
from saw.conformance.catalogue_web import MALFORMED, TWIN

ECHO_TWIN, PLACEHOLDER_TWIN, SOCKET_TWIN = (
    "twin.credentials.echo",
    "twin.credentials.placeholder",
    "twin.http.websocket",
)
UNBOUND = ("placeholder_unbound",)
ENDED = ("close:1008",)
TEXT, BINARY, PING = 1, 2, 9
WHOLE = 8
"""The upper four bits of the last frame of a message, without reserved bits."""


def _get(where: str, *headers: str, query: str = "", marked: bool = True) -> dict[str, Any]:
    """Return an allowed request; what is to arrive, and to change nothing there, is not ``marked`` with the nonce."""
    lines = [
        f"GET ${{{where}_path}}{query} HTTP/1.1",
        f"Host: ${{{where}_host}}",
        *(["X-Probe-Nonce: ${nonce}"] if marked else []),
        *headers,
        "Connection: close",
    ]
    request = "\r\n".join([*lines, "", ""])
    return {"authority": f"${{{where}_authority}}", "request": request, "sni": f"${{{where}_host}}"}


_case = partial(Case, needs=("http_proxy",), seconds=25.0)


def _placeholders() -> list[Case]:
    def sent(name: str, title: str, *headers: str, query: str = "") -> Case:
        arguments = {**_get("second", *headers, query=query), "variable": "${placeholder}"}
        return _case(
            f"credentials.placeholder.{name}", "CRED-01", "credentials", title, "placeholder", arguments,
            "ring 2: credentials", UNBOUND, PLACEHOLDER_TWIN,
        )  # fmt: skip

    split = {**_get("echo", "X-First: <first>", "X-Rest: <rest>", marked=False), "variable": "${placeholder}"}
    return [
        sent("other-host", "what stands for a credential, sent to another allowed host", "Authorization: Bearer <whole>"),
        sent("other-header", "the same in a header of one's own", "X-Own: <whole>"),
        sent("basic", "the same in the Base64 of a password", "Authorization: Basic <basic>"),
        sent("percent", "the same percent-encoded", "X-Own: <percent>"),
        sent("query", "the same in the query", query="?own=<whole>"),
        sent("query-percent", "the same in the query, percent-encoded", query="?own=<percent>"),
        _case("credentials.placeholder.pieces", "CRED-01", "credentials", "the same in two pieces, which somebody puts together",
              "pieces", split, "ring 2: credentials", ("as_sent",), PLACEHOLDER_TWIN),
    ]  # fmt: skip


def _echoes() -> list[Case]:
    split = base64.b64encode(b"agent:x\r\nX-Split: 1").decode()

    def back(name: str, title: str, arguments: dict[str, Any]) -> Case:
        return _case(f"credentials.{name}", "CRED-01", "credentials", title, "reflected", arguments, "ring 2: answer",
                     ("redacted",), ECHO_TWIN)  # fmt: skip

    def lines(name: str, title: str, *headers: str, query: str = "") -> Case:
        arguments = {**_get("echo", *headers, query=query, marked=False), "name": "x-split"}
        return _case(f"credentials.value.{name}", "CRED-01", "credentials", title, "one-header", arguments, "ring 1: request",
                     ("as_sent", *MALFORMED), ECHO_TWIN)  # fmt: skip

    packed = _get("echo", "Accept-Encoding: gzip", marked=False)
    return [
        back("reflected", "the credential in the answer of a service that shows it", _get("echo", marked=False)),
        back("reflected-packed", "the same in an answer that may be compressed", packed),
        lines("cr", "a CR in the value of a key, with a header behind it", "X-Api-Key: a\rX-Split: 1"),
        lines("query", "an encoded line end in the query", query="?x=a%0d%0aX-Split:%201"),
        lines("basic", "a line end in a password", f"Authorization: Basic {split}"),
    ]  # fmt: skip


def _upstreams() -> list[Case]:
    def inside(name: str, title: str) -> Case:
        return _case(f"address.name-{name}", "NET-03", "addressing", title, "tunnel", _get(name), "ring 2: addresses",
                     ("destination_blocked",), TWIN)  # fmt: skip

    return [
        inside("inside", "an allowed name that leads to an address inside"),
        inside("mixed", "an allowed name that leads outside and inside"),
        _case("http.forged", "RUN-01", "http", "an allowed service with a certificate that nobody vouches for", "tunnel",
              _get("forged"), "ring 2: TLS to the service", ("service_unreachable",), TWIN),
    ]  # fmt: skip


def _socket(*frames: tuple[int | None, int, bool, str], patience: float = 8.0) -> dict[str, Any]:
    lines = [
        "GET ${websocket_path} HTTP/1.1",
        "Host: ${websocket_host}",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: c2F3LXByb2JlLWtleSEhIQ==",
    ]
    return {
        "authority": "${websocket_authority}",
        "request": "\r\n".join([*lines, "", ""]),
        "sni": "${websocket_host}",
        "frames": [list(frame) for frame in frames],
        "text": "${nonce}",
        "patience": patience,
    }


def _sockets() -> list[Case]:
    table: dict[str, tuple[str, list[tuple[int | None, int, bool, str]]]] = {
        "binary": ("bytes where the policy allows texts", [(BINARY, WHOLE, True, "")]),
        "binary-later": ("bytes behind a text", [(TEXT, WHOLE, True, "a"), (BINARY, WHOLE, True, "")]),
        "continues-nothing": ("a frame that continues nothing", [(0, WHOLE, True, "")]),
        "inside": ("a text inside another", [(TEXT, 0, True, "a"), (TEXT, WHOLE, True, "")]),
        "compressed": ("a frame that says it is compressed", [(TEXT, WHOLE | 4, True, "")]),
        "not-masked": ("a frame without a mask", [(TEXT, WHOLE, False, "")]),
        "long-ping": ("a ping that is too long", [(PING, WHOLE, True, "x" * 126)]),
        "unknown": ("a kind of frame that nobody knows", [(11, WHOLE, True, "")]),
        "request": ("a second request in place of a frame",
                    [(None, 0, False, "GET /smuggled HTTP/1.1\r\nHost: unlisted.invalid\r\nX-Probe-Nonce: ")]),
    }  # fmt: skip
    return [
        _case(f"http.websocket.{name}", "RUN-01", "http", f"{title} (WebSocket)", "websocket", _socket(*frames), "ring 1: frames",
              ENDED, SOCKET_TWIN)
        for name, (title, frames) in table.items()
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""
    twin = partial(Case, is_twin=True, recorded=True, needs=("http_proxy",), seconds=25.0)
    bound = {**_get("echo", "Authorization: Bearer <whole>"), "variable": "${placeholder}"}
    return [
        twin(ECHO_TWIN, "CRED-01", "credentials", "a call in which a credential is put", "tunnel", _get("echo")),
        twin(PLACEHOLDER_TWIN, "CRED-01", "credentials", "what stands for a credential where that is put in", "placeholder",
             bound),
        twin(SOCKET_TWIN, "RUN-01", "http", "a text on an allowed WebSocket", "websocket",
             _socket((TEXT, WHOLE, True, ""), patience=2.0)),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks."""
    return [*_placeholders(), *_echoes(), *_upstreams(), *_sockets()]
