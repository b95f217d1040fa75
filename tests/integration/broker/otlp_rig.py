"""A receiver of OpenTelemetry logs: HTTPS, the messages of OTLP's own definition, and a file as collectors write it."""

from __future__ import annotations

import json
import os
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from siem_rig import CLIENT, SERVER, Certificates

from saw.audit import ChainedEvent
from saw.audit.otlp import parse_export

TOKEN = "a-token-of-the-test"


class Collector:
    """Takes requests at ``/v1/logs`` from who has the client certificate and the token; ``answers`` come before its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.file = folder / "logs.json"
        self.file.touch()
        self.certificates = Certificates(folder / "saw")
        self.server_files = self.certificates.issue(SERVER)
        self.client_files = self.certificates.issue(CLIENT)
        (folder / "token").write_text(TOKEN + "\n")
        self.answers: list[tuple[int, dict[str, str], bytes]] = []
        self.refused: list[int] = []
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        """Listen, on the port of the first start."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.server_files)
        context.load_verify_locations(self.folder / "saw/ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status, headers, said = collector.take(self.path, self.headers, body)
                self.send_response(status)
                for name, value in {"content-length": str(len(said)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name that http.server has
                """Keep quiet."""

        ThreadingHTTPServer.allow_reuse_address = True
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Listen no more; connections end with their next request."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def take(self, path: str, headers: Any, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Answer one request, after what it holds is on disk."""
        if self._server is None:
            return 503, {"connection": "close"}, b""
        if path != "/v1/logs":
            return 404, {}, b""
        if headers["authorization"] != f"Bearer {TOKEN}":
            return 401, {}, b'{"code": 16, "message": "who are you?"}'
        if self.answers:
            status, more, said = self.answers.pop(0)
            self.refused.append(status)
            return status, more, said
        request = json_format.Parse(body, ExportLogsServiceRequest())  # refuses what OTLP does not know
        line = json_format.MessageToJson(request, indent=None, ensure_ascii=False)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return 200, {"content-type": "application/json"}, b"{}"

    def lines(self) -> list[str]:
        """One request in each."""
        return self.file.read_text(encoding="utf-8").splitlines()

    def records(self) -> list[dict[str, Any]]:
        """Every record, in the order in which it came."""
        logs = [one for line in self.lines() for one in json.loads(line)["resourceLogs"]]
        return [record for one in logs for scope in one["scopeLogs"] for record in scope["logRecords"]]

    def events(self) -> list[ChainedEvent]:
        """What it has, in the order in which it came."""
        return [event for line in self.lines() for event in parse_export(line)]

    def settings(self, lab: Any, state: Path, **receiver: Any) -> dict[str, Any]:
        """The configuration of a forwarder to it."""
        given = {"protocol": "otlp", "host": "127.0.0.1", "port": self.port, "name": SERVER, "timeout_s": 10}
        given |= {"ca_file": str(self.folder / "saw/ca.pem"), "token_file": str(self.folder / "token")}
        given |= {"certificate_file": str(self.client_files[0]), "key_file": str(self.client_files[1])}
        return {"socket": lab.config.audit_socket, "state_dir": str(state), "receiver": {**given, **receiver}}
