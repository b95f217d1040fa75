"""Far ends that people are told at: a webhook's receiver over HTTPS, and a mail server over TLS, with certificates made here."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import http.client
import json
import ssl
import threading
from dataclasses import dataclass
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult
from siem_rig import Certificates

from saw.broker.notification_settings import Email, Webhook

HOST = "localhost"
SECRET = "whsec_" + base64.b64encode(b"a key of the tests, 32 bytes long").decode()
USER, PASSWORD = "saw", "a-password-of-the-test"


@dataclass(frozen=True)
class Got:
    """One request."""

    path: str
    id: str
    timestamp: int
    signature: str
    body: bytes
    headers: dict[str, str]

    @property
    def said(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    def verified(self, secret: str = SECRET) -> bool:
        """As a receiver does it, with nothing of ours."""
        key = base64.b64decode(secret.split("_", 1)[1])
        signed = b".".join([self.id.encode(), str(self.timestamp).encode(), self.body])
        made = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
        return f"v1,{made}" in self.signature.split(" ")


def private(path: Path, text: str) -> Path:
    path.touch(mode=0o600)
    path.write_text(text)
    return path


class Hooks:
    """Takes requests; ``answers`` (status and headers) come before 204. Nothing is answered until ``hold`` is set."""

    def __init__(self, folder: Path, *, name: str = HOST, plain: bool = False) -> None:
        folder.mkdir()
        self.folder = folder
        self.certificates = Certificates(folder / "ca")
        self.files = self.certificates.issue(name)
        self.secret = private(folder / "secret", f"{SECRET}\n")
        self.got: list[Got] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.hold: threading.Event | None = None
        self.arrived = threading.Condition()
        self.port = 0
        self._plain = plain
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Listen, on the port of the first start."""
        hooks = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, headers = hooks.take(self.path, self.headers, body)
                self.send_response(status)
                for name, value in {"content-length": "0", **headers}.items():
                    self.send_header(name, value)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server has
                """Keep quiet."""

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that refuse us
        self.port = self._server.server_address[1]
        if not self._plain:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*self.files)
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def take(self, path: str, headers: http.client.HTTPMessage, body: bytes) -> tuple[int, dict[str, str]]:
        """Note a request and say what is answered."""
        plain = {name.lower(): value for name, value in headers.items()}
        found = Got(path, plain["webhook-id"], int(plain["webhook-timestamp"]), plain["webhook-signature"], body, plain)
        with self.arrived:
            self.got.append(found)
            answer = self.answers.pop(0) if self.answers else (204, {})
            self.arrived.notify_all()
        if self.hold is not None:
            assert self.hold.wait(60)
        return answer

    def wait(self, count: int) -> list[Got]:
        """Return everything once ``count`` requests have come."""
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.got) >= count, 60), f"{len(self.got)} of {count} came"
            return list(self.got)

    def channel(self, name: str = "chat", **changes: Any) -> Webhook:
        scheme, host = ("http", "127.0.0.1") if self._plain else ("https", HOST)
        fields = {"url": f"{scheme}://{host}:{self.port}/saw", "insecure_loopback": self._plain}
        fields |= {"secret_file": str(self.secret), "ca_file": str(self.folder / "ca/ca.pem")}
        return Webhook(name=name, **{**fields, **changes})


class Mails:
    """A mail server: STARTTLS or TLS from the beginning, with a login where that is asked for. ``refuse``: address → status."""

    def __init__(self, folder: Path, *, tls: str = "starttls", name: str = HOST, login: bool = False) -> None:
        folder.mkdir()
        self.folder = folder
        self.certificates = Certificates(folder / "ca")
        self.files = self.certificates.issue(name)
        self.password = private(folder / "password", f"{PASSWORD}\n")
        self.got: list[tuple[str, list[str], bytes]] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self.refuse: dict[str, str] = {}
        self.refuse_data: list[str] = []
        self.tls = tls
        self._login = login
        self.port = 0

    async def handle_RCPT(  # noqa: N802 - the name that aiosmtpd calls
        self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any
    ) -> str:
        if address in self.refuse:
            return f"{self.refuse[address]} not here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - the same
        if self.refuse_data:
            return f"{self.refuse_data.pop(0)} not now"
        self.got.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
        return "250 taken"

    def _authenticate(self, _server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        self.logins.append((data.login, data.password))
        good = (data.login, data.password) == (USER.encode(), PASSWORD.encode())
        return AuthResult(success=good, handled=False)

    def start(self) -> None:
        """Listen, on the port of the first start."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.files)
        how: dict[str, Any] = {"hostname": HOST, "timeout": 60}
        if self.tls == "starttls":
            how |= {"tls_context": context, "require_starttls": True}
        if self._login:
            upgraded = self.tls == "starttls"  # else all is encrypted already, which aiosmtpd does not know
            how |= {"authenticator": self._authenticate, "auth_required": upgraded, "auth_require_tls": upgraded}
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, daemon=True)
        self._thread.start()
        made = loop.create_server(
            lambda: SMTP(self, loop=loop, **how),
            "127.0.0.1",
            self.port,
            ssl=context if self.tls == "implicit" else None,
        )
        self._server = asyncio.run_coroutine_threadsafe(made, loop).result(60)
        self.port = self._server.sockets[0].getsockname()[1]

    def stop(self) -> None:
        async def end() -> None:
            self._server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    def letters(self) -> list[Any]:
        return [message_from_bytes(raw) for _, _, raw in self.got]

    def channel(self, name: str = "mail", **changes: Any) -> Email:
        fields: dict[str, Any] = {
            "host": HOST,
            "port": self.port,
            "tls": self.tls,
            "ca_file": str(self.folder / "ca/ca.pem"),
        }
        fields |= {"sender": "saw@example.com", "to": ("ops@example.com",)}
        if self._login:
            fields |= {"username": USER, "password_file": str(self.password)}
        return Email(name=name, **{**fields, **changes})
