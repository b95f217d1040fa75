"""A collector of OpenTelemetry's logs over HTTPS, for the tests: it appends each batch to a file before it acknowledges."""

import http.server
import json
import os
import ssl
from pathlib import Path

FOLDER = Path("/root/collector")
TOKEN = (FOLDER / "token").read_text(encoding="utf-8").strip()


class Collector(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers["authorization"] != f"Bearer {TOKEN}" or self.path != "/v1/logs":
            self.answer(401, b"{}")
            return
        with (FOLDER / "received.jsonl").open("a", encoding="utf-8") as kept:
            kept.write(json.dumps(json.loads(body)) + "\n")
            kept.flush()
            os.fsync(kept.fileno())
        self.answer(200, b"{}")

    def answer(self, code, body):
        self.send_response(code)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 4318), Collector)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(FOLDER / "collector.pem", FOLDER / "collector.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
