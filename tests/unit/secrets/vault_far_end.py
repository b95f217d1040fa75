"""Far ends of the provider ``vault``: a small server with the documented contract of KV version 2, and a real OpenBao."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from saw.identity.x509 import Authority, new_key_and_csr
from saw.secrets.vault_settings import AppRole, VaultSettings

ROOT_TOKEN = "root-of-the-test"
POLICY = """\
path "secret/data/saw/broker/*" { capabilities = ["create", "read", "update"] }
path "secret/metadata/saw/broker" { capabilities = ["list"] }
path "secret/metadata/saw/broker/*" { capabilities = ["list", "delete"] }
"""


class FarEnd:
    """What both offer to tests: where it is, and how somebody else works there."""

    url: str
    ca_file: Path
    base: Path

    def settings(self, **more: Any) -> VaultSettings:
        token = self.base / "token"
        token.write_text(f"{ROOT_TOKEN}\n")
        told = {"token_file": str(token), "prefix": "saw/broker"} | more
        return VaultSettings(url=self.url, ca_file=str(self.ca_file), **told)

    def by_role(self) -> VaultSettings:
        """Settings of a role that may no more than it has to."""
        secret = self.base / "secret-id"
        secret.write_text(self.new_secret_id())
        return self.settings(token_file=None, approle=AppRole(self.role_id, str(secret)))

    def call(self, method: str, path: str, body: Any = None, token: str | None = ROOT_TOKEN) -> httpx.Response:
        """A call of somebody else."""
        context = ssl.create_default_context(cafile=str(self.ca_file))
        headers = {} if token is None else {"x-vault-token": token}
        with httpx.Client(verify=context, base_url=self.url, trust_env=False, timeout=30) as client:
            return client.request(method, f"/v1/{path}", json=body, headers=headers)

    role_id = "role-of-the-broker"

    def new_secret_id(self) -> str:
        raise NotImplementedError

    def forget_tokens(self) -> None:
        raise NotImplementedError

    def clear(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Contract(FarEnd):
    """KV version 2 as its pages describe it, on its own; ``before`` may answer a call otherwise."""

    def __init__(self, base: Path) -> None:
        self.base = base
        now = datetime.now(UTC)
        authority = Authority.create(base / "ca", "vault.example", now)
        key, csr = new_key_and_csr("localhost", ("localhost",))
        certificate = authority.issue_server(csr, ("localhost",), now, timedelta(days=1), spiffe_path="service/vault")
        (base / "server.pem").write_bytes(certificate + key)
        self.ca_file = base / "ca/ca.pem"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(base / "server.pem")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"https://localhost:{self.server.server_port}"
        self.clear()

    def clear(self) -> None:
        self.held: dict[str, list[dict[str, str] | None]] = {}
        self.tokens = {ROOT_TOKEN}
        self.secret_ids: set[str] = set()
        self.calls: list[str] = []
        self.before: Callable[[str, str], tuple[int, Any] | None] = lambda _method, _path: None
        self.lose_answers_to = ""

    def new_secret_id(self) -> str:
        self.secret_ids.add(f"secret-id-{len(self.secret_ids)}")
        return f"secret-id-{len(self.secret_ids) - 1}"

    def forget_tokens(self) -> None:
        self.tokens = {ROOT_TOKEN}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, method: str, target: str, token: str, body: Any) -> tuple[int, Any]:
        place = urlsplit(target)
        path = place.path.removeprefix("/v1/")
        self.calls.append(f"{method} {path}")
        if (instead := self.before(method, path)) is not None:
            return instead
        if path == "auth/approle/login":
            if body["role_id"] != self.role_id or body["secret_id"] not in self.secret_ids:
                return 400, {"errors": ["invalid role or secret ID"]}
            self.tokens.add(f"token-{len(self.calls)}")
            return 200, {"auth": {"client_token": f"token-{len(self.calls)}", "lease_duration": 60}}
        if token not in self.tokens:
            return 403, {"errors": ["permission denied"]}
        mount, _, rest = path.partition("/")
        kind, _, name = rest.partition("/")
        if mount != "secret":
            return 404, {"errors": [f'no handler for route "{path}"']}
        if kind == "metadata":
            return self._metadata(method, place.query, name)
        return self._data(method, name, body)

    def _metadata(self, method: str, query: str, name: str) -> tuple[int, Any]:
        if method == "DELETE":
            self.held.pop(name, None)
            return 204, None
        assert (method, query) == ("GET", "list=true")
        below = [held.removeprefix(f"{name}/") for held in self.held if held.startswith(f"{name}/")]
        keys = sorted({key.partition("/")[0] + ("/" if "/" in key else "") for key in below})
        return (200, {"data": {"keys": keys}}) if keys else (404, {"errors": []})

    def _data(self, method: str, name: str, body: Any) -> tuple[int, Any]:
        versions = self.held.get(name, [])
        if method == "POST":
            if body["options"]["cas"] != len(versions):
                return 400, {"errors": ["check-and-set parameter did not match the current version"]}
            self.held[name] = [*versions, body["data"]]
            return 200, {"data": {"version": len(versions) + 1}}
        if method == "DELETE":
            versions[-1] = None
            return 204, None
        if not versions:
            return 404, {"errors": []}
        told = {"data": {"data": versions[-1], "metadata": {"version": len(versions)}}}
        return (404 if versions[-1] is None else 200), told


def _handler(far: Contract) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _do(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            status, said = far.answer(self.command, self.path, self.headers.get("x-vault-token", ""), body)
            if self.command == far.lose_answers_to:
                self.close_connection = True
                self.connection.close()
                return
            raw = b"" if said is None else json.dumps(said).encode()
            self.send_response(status)
            if status == 307:
                self.send_header("location", "/v1/secret/data/elsewhere")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        do_GET = do_POST = do_DELETE = _do  # noqa: N815 - names of http.server

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def handle(self) -> None:
            """Serve; a client that goes away is nobody's error."""
            try:
                super().handle()
            except OSError:
                self.close_connection = True

    return Handler


def bao_program() -> str:
    """The program of OpenBao, which the virtual environment has."""
    beside = Path(sys.executable).with_name("bao")
    found = str(beside) if beside.exists() else shutil.which("bao")
    assert found is not None, "run scripts/bootstrap.sh: it installs OpenBao"
    return found


class OpenBao(FarEnd):
    """A real server in memory."""

    def __init__(self, base: Path, program: str) -> None:
        self.base = base
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            port = place.getsockname()[1]
        self.url = f"https://127.0.0.1:{port}"
        self.ca_file = base / "vault-ca.pem"
        options = ["-dev", "-dev-tls", f"-dev-tls-cert-dir={base}", "-dev-no-store-token"]
        options += [f"-dev-root-token-id={ROOT_TOKEN}", f"-dev-listen-address=127.0.0.1:{port}"]
        self.process = subprocess.Popen(
            [program, "server", *options],
            stdout=(base / "log").open("wb"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOME": str(base)},
        )
        try:
            self._wait()
            assert self.call("POST", "sys/auth/approle", {"type": "approle"}).is_success
            assert self.call("PUT", "sys/policies/acl/saw-broker", {"policy": POLICY}).is_success
            assert self.call("POST", "auth/approle/role/saw", {"token_policies": ["saw-broker"]}).is_success
            self.role_id = self.call("GET", "auth/approle/role/saw/role-id").json()["data"]["role_id"]
        except BaseException:
            self.close()
            raise

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.base / "log").read_text()
            try:
                if self.ca_file.exists() and self.call("GET", "sys/health").status_code == 200:
                    return
            except (httpx.HTTPError, OSError):
                pass
            time.sleep(0.1)
        raise AssertionError((self.base / "log").read_text())

    def new_secret_id(self) -> str:
        return str(self.call("POST", "auth/approle/role/saw/secret-id").json()["data"]["secret_id"])

    def forget_tokens(self) -> None:
        for accessor in self.call("LIST", "auth/token/accessors").json()["data"]["keys"]:
            found = self.call("POST", "auth/token/lookup-accessor", {"accessor": accessor}).json()["data"]
            if "saw-broker" in found["policies"]:
                assert self.call("POST", "auth/token/revoke-accessor", {"accessor": accessor}).is_success

    def clear(self) -> None:
        for folder in ("saw/broker", "saw/broker/x509"):
            listed = self.call("LIST", f"secret/metadata/{folder}")
            for key in listed.json()["data"]["keys"] if listed.is_success else []:
                if not key.endswith("/"):
                    assert self.call("DELETE", f"secret/metadata/{folder}/{key}").is_success

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
