"""Cases of the suites ``addressing`` and ``http``: what a proxy with a policy must refuse.

``${allowed_host}`` is a host that the policy allows, ``${sibling}`` another one, ``${allowed_path}`` an allowed path. Requests
are sent byte by byte as they stand here.
"""

from __future__ import annotations

from typing import Any

from saw.conformance.case import Case

NOT_ALLOWED = ("host_not_allowed", "destination_blocked", "not_canonical", "port_not_allowed", "status:400")
"""Reasons of a refused destination; what is no well-formed HTTP at all is refused with 400 before anything is decided."""
MALFORMED = ("not_canonical", "status:400", "closed")
RULE = ("method_or_path_not_allowed", "deny_rule", "not_canonical", "status:400")
RING = "ring 1: destination"
TWIN = "twin.http.get"


def _connect(
    name: str, title: str, authority: str, *, control: str = "NET-03", expected: tuple[str, ...] = NOT_ALLOWED
) -> Case:
    return Case(
        f"address.{name}", control, "addressing", title, "connect", {"authority": authority, "mark": "${nonce}"}, RING,
        expected, TWIN,
        needs=("http_proxy",), seconds=25.0,
    )  # fmt: skip


def _addresses() -> list[Case]:
    return [
        _connect("ipv4", "an IPv4 address", "192.0.2.10:443", control="RUN-01"),
        _connect("ipv6", "an IPv6 address", "[2001:db8::10]:443", control="RUN-01"),
        _connect("loopback", "loopback", "127.0.0.1:443"),
        _connect("loopback-name", "localhost", "localhost:443"),
        _connect("loopback-dot", "localhost with a trailing dot", "localhost.:443"),
        _connect("loopback-admin", "the proxy's administrative port", "127.0.0.1:9901"),
        _connect("zero", "the address 0.0.0.0", "0.0.0.0:443"),
        _connect("zero-short", "the address 0", "0:443"),
        _connect("loopback6", "IPv6 loopback", "[::1]:443"),
        _connect("metadata", "the metadata address", "169.254.169.254:80"),
        _connect("metadata-decimal", "the metadata address as one number", "2852039166:80"),
        _connect("metadata-octal", "the metadata address in octal", "0251.0376.0251.0376:80"),
        _connect("metadata-hex", "the metadata address in hexadecimal", "0xa9fea9fe:80"),
        _connect("metadata-hex-parts", "the metadata address, its parts in hexadecimal", "0xa9.0xfe.0xa9.0xfe:80"),
        _connect("metadata-short", "the metadata address in short form", "169.254.43518:80"),
        _connect("metadata-mapped", "the metadata address mapped to IPv6", "[::ffff:169.254.169.254]:80"),
        _connect("metadata-nat64", "the metadata address in NAT64 form", "[64:ff9b::a9fe:a9fe]:80"),
        _connect("metadata-6to4", "the metadata address in 6to4 form", "[2002:a9fe:a9fe::1]:80"),
        _connect("metadata-name", "a metadata name", "metadata.google.internal:80"),
        _connect("metadata-name-dot", "a metadata name with a trailing dot", "metadata.google.internal.:80"),
        _connect("loopback-short", "loopback in short form", "127.1:443"),
        _connect("zone", "a link-local address with a zone", "[fe80::1%25eth0]:443"),
        _connect("unlisted", "a host that the policy does not name", "unlisted.invalid:443", control="RUN-01"),
        _connect("sub-domain", "below an allowed host", "deeper.${allowed_host}:443", control="RUN-01"),
        _connect("prefix", "an allowed host begins another", "${allowed_host}.unlisted.invalid:443", control="RUN-01"),
        _connect("suffix", "an allowed host as the end of another", "not${allowed_host}:443", control="RUN-01"),
        _connect("port", "another port of an allowed host", "${allowed_host}:22", control="RUN-01"),
        _connect("port-missing", "no port", "${allowed_host}", control="RUN-01"),
        _connect("port-zero", "port 0", "${allowed_host}:0", control="RUN-01"),
        _connect("port-large", "a port that does not exist", "${allowed_host}:65979", control="RUN-01"),
        _connect("user-info", "an allowed host as user info", "${allowed_host}:443@unlisted.invalid:443", control="RUN-01"),
        _connect("backslash", "a backslash in the authority", "unlisted.invalid\\.${allowed_host}:443", control="RUN-01"),
        _connect("tab", "a tab in the authority", "unlisted.invalid\t.${allowed_host}:443", control="RUN-01"),
        _connect("nul", "a NUL in the authority", "unlisted.invalid\0.${allowed_host}:443", control="RUN-01"),
        _connect("hash", "a fragment in the authority", "unlisted.invalid#.${allowed_host}:443", control="RUN-01"),
        _connect("percent", "a percent-encoded authority", "unlisted%2einvalid:443", control="RUN-01"),
        _connect("full-width-dot", "a full-width dot", "unlisted\xef\xbc\x8einvalid:443", control="RUN-01"),
        _connect("idn", "a letter that looks like another", "\xd0\xb0pi.invalid:443", control="RUN-01"),
        _connect("empty", "an empty host", ":443", control="RUN-01"),
        _connect("outside", "an address at which somebody listens", "${v4}:443", control="RUN-01"),
        _connect("outside-number", "the same as one number", "${v4_number}:443", control="RUN-01"),
        _connect("outside-hex", "the same in hexadecimal", "${v4_hex}:443", control="RUN-01"),
        _connect("outside-mapped", "the same mapped to IPv6", "[::ffff:${v4}]:443", control="RUN-01"),
        _connect("outside6", "an IPv6 address at which somebody listens", "[${v6}]:443", control="RUN-01"),
    ]  # fmt: skip


def _request(line: str, *headers: str, host: str = "${allowed_host}", body: str = "") -> str:
    lines = [line, f"Host: {host}", "X-Probe-Nonce: ${nonce}", *headers]
    return "\r\n".join([*lines, "", body])


def _inside(
    name: str, title: str, request: str, *, expected: tuple[str, ...] = RULE, sni: str = "${allowed_host}",
    control: str = "RUN-01", authority: str = "${allowed_authority}", **more: Any,
) -> Case:  # fmt: skip
    arguments = {"authority": authority, "request": request, "sni": sni, **more}
    return Case(
        f"http.{name}", control, "http", title, "tunnel", arguments, "ring 1: request", expected, TWIN,
        needs=("http_proxy",), seconds=25.0,
    )  # fmt: skip


def _names() -> list[Case]:
    get = "GET ${allowed_path} HTTP/1.1"
    mismatch = (
        "destination_mismatch",
        "not_canonical",
        "host_not_allowed",
        "tls",
        "closed",
        "status:400",
        "status:421",
    )
    return [
        _inside("host-unlisted", "another host in an allowed tunnel", _request(get, host="unlisted.invalid"), expected=mismatch),
        _inside("host-sibling", "another allowed host in the tunnel", _request(get, host="${sibling}"), expected=mismatch),
        _inside("sni-unlisted", "another server name inside an allowed tunnel", _request(get), sni="unlisted.invalid",
                expected=mismatch),
        _inside("sni-sibling", "another allowed host as server name", _request(get), sni="${sibling}", expected=mismatch),
        _inside("host-policy", "another host in a tunnel to the one that tells policy", _request(get, host="unlisted.invalid"),
                authority="policy.local:443", sni="policy.local", expected=mismatch),
        _inside("host-port", "another port in Host", _request(get, host="${allowed_host}:8443"), expected=mismatch),
        _inside("host-twice", "two Host headers", _request(get, "Host: unlisted.invalid"), expected=(*mismatch, *MALFORMED)),
        _inside("host-missing", "no Host at all", "GET ${allowed_path} HTTP/1.1\r\nX-Probe-Nonce: ${nonce}\r\n\r\n",
                expected=(*mismatch, *MALFORMED)),
        _inside("absolute-inside", "another host in absolute form inside the tunnel",
                _request("GET https://unlisted.invalid${allowed_path} HTTP/1.1"), expected=(*mismatch, *MALFORMED)),
        _inside("raw", "bytes that are no HTTP", "\x16\x00raw ${nonce}\r\n\r\n", expected=MALFORMED, control="RUN-01"),
        _inside("plain", "no TLS in the tunnel, another host", _request(get, host="unlisted.invalid"), tls=False,
                expected=(*mismatch, *MALFORMED)),
        _inside("connect-inside", "a tunnel inside the tunnel", _request("CONNECT unlisted.invalid:443 HTTP/1.1"),
                expected=(*mismatch, *RULE, "closed", "status:404")),
    ]  # fmt: skip


def _methods() -> list[Case]:
    def method(name: str, title: str, line: str, *headers: str, **more: Any) -> Case:
        more.setdefault("expected", (*RULE, "closed"))
        return _inside(f"method.{name}", title, _request(line, *headers), **more)

    path = "${allowed_path}"
    length = "Content-Length: 0"
    return [
        method("delete", "a method that is not allowed", f"DELETE {path} HTTP/1.1"),
        method("put", "a write that is not allowed", f"PUT {path} HTTP/1.1", length),
        method("patch", "a change that is not allowed", f"PATCH {path} HTTP/1.1", length),
        method("trace", "TRACE", f"TRACE {path} HTTP/1.1"),
        method("lower", "a method in lower case", f"get {path} HTTP/1.1"),
        method("mixed", "a refused method in mixed case", f"DeLeTe {path} HTTP/1.1"),
        method("unknown", "a method that nobody knows", f"FROB {path} HTTP/1.1"),
        method("override-delete", "a refused method with an allowed override", f"DELETE {path} HTTP/1.1",
               "X-HTTP-Method-Override: GET"),
        method("upgrade", "a WebSocket where the rule is for requests", f"GET {path} HTTP/1.1", "Connection: Upgrade",
               "Upgrade: websocket", "Sec-WebSocket-Key: c2F3LXByb2JlLWtleQ==", "Sec-WebSocket-Version: 13",
               expected=(*RULE, "closed", "status:403", "status:426", "upgrade_not_allowed")),
        method("upgrade-postgres", "a session of a database where the rule is for requests", f"GET {path} HTTP/1.1",
               "Connection: Upgrade", "Upgrade: postgres", control="CRED-01",
               expected=(*RULE, "closed", "status:403", "status:426", "upgrade_not_allowed")),
    ]  # fmt: skip


def _paths() -> list[Case]:
    def path(name: str, title: str, text: str) -> Case:
        return _inside(f"path.{name}", title, _request(f"GET {text} HTTP/1.1"))

    base = "${allowed_path}"
    return [
        path("dots", "dots that leave the allowed path", f"{base}/../../../secret"),
        path("dots-encoded", "percent-encoded dots", f"{base}/%2e%2e/%2e%2e/secret"),
        path("slash-encoded", "an encoded slash", f"{base}/..%2fsecret"),
        path("backslash", "a backslash for a slash", f"{base}\\..\\secret"),
        path("backslash-encoded", "an encoded backslash", f"{base}/..%5csecret"),
        path("double-slash", "two slashes at the beginning", f"//..{base}/../../../secret"),
        path("parameter", "a path parameter with dots", f"{base}/..;/..;/..;/secret"),
        path("nul", "an encoded NUL", f"{base}%00.txt"),
        path("overlong", "overlong UTF-8 for a slash", f"{base}/..%c0%afsecret"),
        path("overlong-dot", "overlong UTF-8 for a dot", f"{base}/%c0%ae%c0%ae/secret"),
        path("bad-percent", "a percent sign that encodes nothing", f"{base}/%zz"),
        path("letter-encoded", "another path in needless encoding", "/%73%61%77-probe-not-allowed"),
        path("fragment", "a fragment", f"{base}#/secret"),
        path("space", "a space in the path", f"{base}/a b"),
        path("unlisted", "a path that the policy does not allow", "/saw-probe-not-allowed"),
    ]


def _framing() -> list[Case]:
    first = "GET ${allowed_path} HTTP/1.1\r\nHost: ${allowed_host}\r\n\r\n"
    second = "GET /smuggled-${nonce} HTTP/1.1\r\nHost: ${allowed_host}\r\n\r\n"
    post = "POST ${allowed_path} HTTP/1.1"

    def framing(name: str, title: str, request: str, **more: Any) -> Case:
        more.setdefault("expected", (*MALFORMED, *RULE))
        return _inside(f"framing.{name}", title, request, control="RUN-01", **more)

    return [
        framing("cl-te", "length and chunks, length first",
                _request(post, "Content-Length: 6", "Transfer-Encoding: chunked", body="0\r\n\r\nG" + second)),
        framing("te-cl", "length and chunks, chunks first",
                _request(post, "Transfer-Encoding: chunked", "Content-Length: 3", body="1\r\nA\r\n0\r\n\r\n" + second)),
        framing("te-twice", "two transfer encodings",
                _request(post, "Transfer-Encoding: chunked", "Transfer-Encoding: identity", body="0\r\n\r\n"),
                expected=(*MALFORMED, "status:501")),
        framing("te-obscured", "a transfer encoding in disguise",
                _request(post, "Transfer-Encoding: xchunked", body="0\r\n\r\n"), expected=(*MALFORMED, "status:501")),
        framing("cl-twice", "two different lengths",
                _request(post, "Content-Length: 1", "Content-Length: 30", body="A" + second)),
        framing("cl-sign", "a length with a sign", _request(post, "Content-Length: +1", body="A")),
        framing("bare-lf", "header lines that end in LF alone",
                "DELETE ${allowed_path} HTTP/1.1\nHost: ${allowed_host}\nX-Probe-Nonce: ${nonce}\n\n"),
        framing("obs-fold", "a folded header", _request(post, "X-Folded: a\r\n Host: unlisted.invalid", "Content-Length: 0")),
        framing("space-colon", "a space before the colon", _request(post, "Content-Length : 1", body="A")),
        framing("chunk-size", "a chunk size that overflows",
                _request(post, "Transfer-Encoding: chunked", body="FFFFFFFFFFFFFFFFF\r\nA\r\n0\r\n\r\n")),
        framing("cr-in-value", "a CR in a header's value", _request(post, "X-Split: a\rX-Saw-Ring1: allow", "Content-Length: 0")),
        framing("nul-in-value", "a NUL in a header's value", _request(post, "X-Nul: a\0b", "Content-Length: 0")),
        framing("headers", "thousands of headers",
                _request("GET ${allowed_path} HTTP/1.1", *[f"X-Many-{number}: 1" for number in range(4000)]),
                expected=(*MALFORMED, "status:431")),
        framing("pipelined", "a refused request behind an allowed one",
                first + _request("DELETE ${allowed_path} HTTP/1.1"), count=2),
        framing("prior-knowledge", "HTTP/2 where HTTP/1.1 was agreed",
                "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + second, expected=(*MALFORMED, "status:426", "status:404")),
    ]  # fmt: skip


def _absolute() -> list[Case]:
    def absolute(name: str, title: str, request: str, **more: Any) -> Case:
        more.setdefault("expected", (*NOT_ALLOWED, *RULE, *MALFORMED, "plaintext_not_allowed", "destination_mismatch"))
        return Case(f"http.absolute.{name}", "RUN-01", "http", title, "absolute", {"request": request}, RING,
                    twin=TWIN, needs=("http_proxy",), **more)  # fmt: skip

    return [
        absolute("unlisted", "plain HTTP to a host that is not allowed",
                 _request("GET http://unlisted.invalid/${nonce} HTTP/1.1", host="unlisted.invalid")),
        absolute("metadata", "plain HTTP to the metadata address",
                 _request("GET http://169.254.169.254/latest/meta-data/ HTTP/1.1", host="169.254.169.254")),
        absolute("allowed", "plain HTTP to a host that is allowed by TLS only",
                 _request("GET http://${allowed_host}${allowed_path} HTTP/1.1")),
        absolute("https", "an https address in absolute form",
                 _request("GET https://${allowed_host}${allowed_path} HTTP/1.1", host="unlisted.invalid"),
                 expected=(*NOT_ALLOWED, *RULE, "status:403")),
        absolute("ftp", "another scheme", _request("GET ftp://unlisted.invalid/ HTTP/1.1", host="unlisted.invalid")),
        absolute("host-differs", "an address and a Host that differ",
                 _request("GET http://unlisted.invalid/ HTTP/1.1")),
        absolute("origin", "no destination but Host", _request("GET /${nonce} HTTP/1.1", host="unlisted.invalid")),
        absolute("upgrade-h2c", "an upgrade to HTTP/2 without TLS",
                 _request("GET http://unlisted.invalid/ HTTP/1.1", "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c",
                          "HTTP2-Settings: AAMAAABkAAQAAP__", host="unlisted.invalid")),
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""
    arguments = {
        "authority": "${allowed_authority}",
        "request": _request("GET ${allowed_path} HTTP/1.1", "Connection: close"),
        "sni": "${allowed_host}",
    }
    return [
        Case("twin.http.get", "RUN-01", "addressing", "an allowed request", "tunnel", arguments, is_twin=True,
             recorded=True, needs=("http_proxy",), seconds=25.0)
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks of both suites."""
    return [*_addresses(), *_names(), *_methods(), *_paths(), *_framing(), *_absolute()]
