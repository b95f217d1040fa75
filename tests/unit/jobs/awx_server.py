"""AWX as far as its contract goes: an HTTPS server that answers what ``awx_contract.json`` has, and nothing else."""

from __future__ import annotations

import copy
import json
import re
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from saw.identity.x509 import Authority, new_key_and_csr

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent / "awx_contract.json").read_text())
TOKEN = "a-token-of-the-worker"


class Awx:
    """Its jobs go through ``statuses``, one for each look; ``before`` may answer a call otherwise."""

    def __init__(self, base: Path) -> None:
        now = datetime.now(UTC)
        authority = Authority.create(base / "ca", "awx.example", now)
        key, csr = new_key_and_csr("localhost", ("localhost",))
        certificate = authority.issue_server(csr, ("localhost",), now, timedelta(days=1), spiffe_path="service/awx")
        (base / "server.pem").write_bytes(certificate + key)
        self.ca_file = base / "ca/ca.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(base / "server.pem")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"https://localhost:{self.server.server_port}"
        self.reset()

    def reset(self) -> None:
        self.templates = [copy.deepcopy(CONTRACT["template"])]
        self.jobs: dict[int, dict[str, Any]] = {}
        self.statuses: list[str] = ["pending", "waiting", "running", "successful"]
        self.events: list[dict[str, Any]] = [*CONTRACT["events"], CONTRACT["done"]]
        self.cancelled: list[int] = []
        self.calls: list[str] = []
        self.outside: list[str] = []
        self.before: Callable[[str, str], tuple[int, Any] | None] = lambda _method, _path: None
        self.lose_launch = False

    def launches(self) -> list[str]:
        return [call for call in self.calls if call.endswith("/launch/")]

    def job(self, extra_vars: dict[str, Any], status: str = "pending") -> int:
        """A job that AWX has."""
        number = 40 + len(self.jobs)
        self.jobs[number] = {
            **copy.deepcopy(CONTRACT["job"]),
            "id": number,
            "status": status,
            "extra_vars": json.dumps(extra_vars),
        }
        return number

    def answer(self, method: str, target: str, token: str, body: Any) -> tuple[int, Any]:
        """What AWX answers; a call outside the contract is remembered and refused."""
        place = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(place.query).items()}
        self.calls.append(f"{method} {place.path}")
        found = None
        for call in CONTRACT["calls"]:
            if call["method"] == method and (match := re.fullmatch(call["path"], place.path)):
                found = (call, {name: int(value) for name, value in match.groupdict().items()})
        if (
            found is None
            or set(query) - set(found[0]["query"])
            or (isinstance(body, dict) and set(body) - set(found[0].get("body", [])))
        ):
            self.outside.append(f"{method} {target} {body}")
            return 400, {"detail": "outside of the contract"}
        if token != f"Bearer {TOKEN}":
            return 401, {"detail": "Authentication credentials were not provided."}
        if (instead := self.before(method, place.path)) is not None:
            return instead
        return self._answer(place.path.rstrip("/").rpartition("/")[2], found[1], query, body)

    def _answer(self, last: str, given: dict[str, int], query: dict[str, str], body: Any) -> tuple[int, Any]:
        if last == "job_templates":
            return 200, _page([one for one in self.templates if one["name"] == query["name"]])
        if last == "launch":
            number = self.job(body["extra_vars"])
            return 201, {**self.jobs[number], "job": number, "ignored_fields": {}}
        if last == "jobs":
            return 200, _page(sorted(self.jobs.values(), key=lambda one: -one["id"]))
        job = self.jobs.get(given["job"])
        if job is None:
            return 404, {"detail": "Not found."}
        if last == "cancel":
            self.cancelled.append(job["id"])
            self.statuses = ["canceled"]
            return 202, {}
        if last == "job_events":
            seen = self.events if job["status"] in {"successful", "failed"} else self.events[:3]
            return 200, _page([one for one in seen if one["counter"] > int(query["counter__gt"])])
        job["status"] = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        return 200, job


def _page(results: list[Any]) -> dict[str, Any]:
    return {"count": len(results), "next": None, "previous": None, "results": results}


def _handler(awx: Awx) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, said = awx.answer(self.command, self.path, self.headers.get("authorization", ""), body)
            if awx.lose_launch and self.path.endswith("/launch/"):
                self.close_connection = True
                self.connection.close()
                return
            raw = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = _do  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def handle(self) -> None:
            """Serve; a client that goes away is nobody's error."""
            try:
                super().handle()
            except OSError:
                self.close_connection = True

    return Handler
