"""Cases of the suite ``http`` that need more than one request, or more than HTTP/1.1 can say.

``--redirect-url`` names an allowed address that answers with a redirect to where its query ``url`` says.
"""

from __future__ import annotations

from functools import partial
from urllib.parse import quote

from saw.conformance.case import Case
from saw.conformance.catalogue_web import NOT_ALLOWED, RULE

H2_TWIN, REDIRECT_TWIN = "twin.http.h2", "twin.http.redirect"
ENDED = ("closed", "status:400", "not_canonical")
"""What is no well-formed HTTP/2 request ends the request or the connection before anything is decided."""
MISMATCH = ("destination_mismatch", "host_not_allowed", *ENDED)


def _h2(
    *more: str, expected: tuple[str, ...] = ENDED, body: str = "", **changed: str
) -> tuple[list[str], tuple[str, ...], str]:
    pseudo = {"method": "GET", "scheme": "https", "authority": "${allowed_host}", "path": "${allowed_path}", **changed}
    flat = [word for name, value in pseudo.items() if value for word in (f":{name}", value)]
    return [*flat, "x-probe-nonce", "${nonce}", *more], expected, body


def _over_h2() -> list[Case]:
    length = ("content-length", "3")
    table = {
        "authority": ("another host as authority", _h2(authority="unlisted.invalid", expected=MISMATCH)),
        "authority-sibling": ("another allowed host as authority", _h2(authority="${sibling}", expected=MISMATCH)),
        "authority-twice": ("two authorities", _h2(":authority", "unlisted.invalid")),
        "authority-only-host": ("no authority, and another host in Host",
                                _h2("host", "unlisted.invalid", authority="", expected=MISMATCH)),
        "path-twice": ("two paths", _h2(":path", "/saw-probe-not-allowed")),
        "path-late": ("a path behind other headers", _h2(":path", "${allowed_path}", path="")),
        "path-missing": ("no path", _h2(path="")),
        "path-line": ("a second request in the path", _h2(path="${allowed_path} HTTP/1.1\r\nHost: unlisted.invalid\r\n\r\n")),
        "path-space": ("a space in the path", _h2(path="${allowed_path} /secret", expected=(*ENDED, *RULE))),
        "path-absolute": ("an address for a path", _h2(path="https://unlisted.invalid/", expected=(*ENDED, *RULE))),
        "method": ("a method that is not allowed", _h2(method="DELETE", expected=RULE)),
        "method-line": ("a second request in the method", _h2(method="GET /smuggled HTTP/1.1\r\nX: GET")),
        "method-connect": ("a tunnel inside the tunnel", _h2(method="CONNECT", path="", scheme="",
                                                             authority="unlisted.invalid:443", expected=(*MISMATCH, *RULE))),
        "method-protocol": ("a WebSocket by an extended CONNECT",
                            _h2(":protocol", "websocket", method="CONNECT", expected=(*ENDED, *RULE, "upgrade_not_allowed"))),
        "unknown-pseudo": ("a pseudo-header that nobody knows", _h2(":saw", "allow")),
        "status": ("the pseudo-header of an answer", _h2(":status", "200")),
        "transfer-encoding": ("chunks, which HTTP/2 does not have",
                              _h2("transfer-encoding", "chunked", method="POST", body="0\r\n\r\n")),
        "connection": ("a header of the connection", _h2("connection", "x-probe-nonce")),
        "upgrade": ("an upgrade, which HTTP/2 does not have", _h2("upgrade", "websocket", "connection", "upgrade")),
        "upper-case": ("a header's name in capitals", _h2("X-Upper", "1")),
        "name-line": ("a line end in a header's name", _h2("x-split\r\nhost", "unlisted.invalid")),
        "value-line": ("a line end in a header's value", _h2("x-split", "a\r\nx-saw-ring1: allow")),
        "value-nul": ("a NUL in a header's value", _h2("x-nul", "a\0b")),
        "length-short": ("less body than the length says", _h2("content-length", "30", method="POST", body="abc",
                                                               expected=(*ENDED, *RULE))),
        "length-long": ("more body than the length says", _h2(*length, method="POST", body="abcdef", expected=(*ENDED, *RULE))),
        "length-twice": ("two different lengths", _h2(*length, "content-length", "6", method="POST", body="abcdef",
                                                      expected=(*ENDED, *RULE))),
    }  # fmt: skip
    return [
        Case(f"http.h2.{name}", "RUN-01", "http", f"{title} (HTTP/2)", "http2", _request(headers, body), "ring 1: request",
             expected, H2_TWIN, needs=("http_proxy",), seconds=25.0)
        for name, (title, (headers, expected, body)) in table.items()
    ]  # fmt: skip


def _request(headers: list[str], body: str = "") -> dict[str, object]:
    return {"authority": "${allowed_authority}", "sni": "${allowed_host}", "headers": headers, "body": body}


def _redirect(target: str) -> dict[str, str]:
    request = f"GET ${{redirect_path}}?url={quote(target, safe='${}_')} HTTP/1.1\r\nHost: ${{redirect_host}}\r\n\r\n"
    return {"authority": "${redirect_authority}", "request": request, "sni": "${redirect_host}", "mark": "${nonce}"}


def _redirects() -> list[Case]:
    def case(name: str, title: str, target: str, control: str = "NET-03") -> Case:
        return Case(
            f"http.redirect.{name}", control, "http", title, "redirect", _redirect(target), "ring 1: destination",
            (*NOT_ALLOWED, "plaintext_not_allowed"), REDIRECT_TWIN, needs=("http_proxy",), seconds=40.0,
        )  # fmt: skip

    return [
        case(
            "metadata",
            "an allowed service that redirects to the metadata address",
            "http://169.254.169.254/latest/meta-data/",
        ),
        case("metadata-tls", "the same over TLS", "https://169.254.169.254/latest/meta-data/"),
        case(
            "metadata-name", "an allowed service that redirects to a metadata name", "http://metadata.google.internal/"
        ),
        case(
            "loopback",
            "an allowed service that redirects to the proxy's own machine",
            "http://127.0.0.1:9901/config_dump",
        ),
        case("unlisted", "an allowed service that redirects to another host", "https://unlisted.invalid/", "RUN-01"),
    ]


def _slow() -> list[Case]:
    begun = "GET ${allowed_path} HTTP/1.1\r\nHost: ${allowed_host}\r\nX-Probe-Nonce: ${nonce}\r\n"
    other = "GET ${allowed_path} HTTP/1.1\r\nHost: ${allowed_host}\r\nConnection: close\r\n\r\n"
    where = {"authority": "${allowed_authority}", "sni": "${allowed_host}"}
    return [
        Case("http.slow.headers", "RUN-01", "http", "a request whose headers never end, while another one passes", "slow-headers",
             {**where, "begun": begun, "other": other}, "ring 1: time limits", ("closed", "status:408"), "twin.http.get",
             needs=("http_proxy",), seconds=90.0)
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""
    twin = partial(Case, is_twin=True, recorded=True, needs=("http_proxy",))
    return [
        twin(H2_TWIN, "RUN-01", "http", "an allowed request over HTTP/2", "http2", _request(_h2()[0]), seconds=25.0),
        twin(REDIRECT_TWIN, "RUN-01", "http", "an allowed service that redirects to an allowed one", "redirect",
             _redirect("https://${allowed_host}${allowed_path}"), seconds=40.0),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks."""
    return [*_over_h2(), *_redirects(), *_slow()]
