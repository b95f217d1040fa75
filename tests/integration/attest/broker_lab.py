"""A small broker for the agent's tests: the real verifier and authorities behind real TLS; only its registry is a dict."""

from __future__ import annotations

import base64
import os
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from saw.attest.messages import AK_UNKNOWN, ActivateRequest, EnrolRequest, Lease, parse_evidence
from saw.attest.verifier import Expectation, make_credential, verify_evidence
from saw.identity.ssh import SshAuthority
from saw.identity.x509 import Authority, new_key_and_csr

NAME = "broker.saw.internal"


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


class Broker:
    """One workspace's attestation. Attributes may be changed between calls; ``seen`` lists the calls made."""

    def __init__(self, directory: Path, ek_pem: str, pcrs: dict[int, str], server_name: str = NAME) -> None:
        now = datetime.now(UTC)
        self.authority = Authority.create(directory / "x509", "saw.example", now)
        self.ssh = SshAuthority.create(directory / "ssh")
        self.ek_pem, self.pcrs = ek_pem, pcrs
        self.released: list[str] = []
        self.ttl, self.offline, self.broken = 120, 0, False
        self.ak_pub = b""
        self.clock: dict[str, int] = {}
        self.challenges: dict[str, tuple[bytes, bytes]] = {}
        self.nonces: set[bytes] = set()
        self.seen: list[str] = []
        self.changed = threading.Condition()
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_bytes(self.authority.ca_pem)
        key, csr = new_key_and_csr("broker", dns=[server_name])
        (directory / "server.pem").write_bytes(key + self.authority.issue_server(csr, [server_name], now, 3600))
        routes = [
            Route(f"/v1/attest/{name}", getattr(self, name), methods=["POST"])
            for name in ("enrol", "activate", "nonce", "quote")
        ]
        config = uvicorn.Config(
            Starlette(routes=routes),
            ssl_certfile=str(directory / "server.pem"),
            log_level="warning",
            lifespan="off",
            http="httptools",
            ws="none",
            loop="asyncio",
            timeout_graceful_shutdown=2,
        )
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        with suppress(OSError):
            self._socket.close()

    def wait_for(self, count: int, call: str) -> None:
        """Wait until ``call`` was made ``count`` times."""
        with self.changed:
            assert self.changed.wait_for(lambda: self.seen.count(call) >= count, 20), self.seen

    def _note(self, call: str) -> None:
        with self.changed:
            self.seen.append(call)
            self.changed.notify_all()

    async def enrol(self, request: Request) -> Response:
        message = msgspec.json.decode(await request.body(), type=EnrolRequest)
        if message.ek_pub_pem != self.ek_pem:
            return refuse("ek_mismatch")
        secret = os.urandom(32)
        blob, encrypted = make_credential(self.ek_pem, message.ak_pub, secret)
        self.challenges["c1"] = (secret, message.ak_pub)
        self._note("enrol")
        return JSONResponse({"challenge_id": "c1", "credential_blob_b64": b64(blob), "secret_b64": b64(encrypted)})

    async def activate(self, request: Request) -> Response:
        message = msgspec.json.decode(await request.body(), type=ActivateRequest)
        secret, ak_pub = self.challenges.pop(message.challenge_id)
        if message.secret != secret:
            return refuse("activation_failed")
        self.ak_pub = ak_pub
        self._note("activate")
        return JSONResponse({"ak_id": "ak1"})

    async def nonce(self, _request: Request) -> Response:
        if self.broken:
            return Response(status_code=500)
        nonce = os.urandom(32)
        self.nonces.add(nonce)
        self._note("nonce")
        return JSONResponse({"nonce_b64": b64(nonce), "expires_in": 60})

    async def quote(self, request: Request) -> Response:
        evidence = parse_evidence(await request.body())
        if not self.ak_pub:
            self._note("refused")
            return refuse(AK_UNKNOWN)
        if evidence.nonce not in self.nonces:
            return refuse("nonce_unknown")
        self.nonces.remove(evidence.nonce)
        expected = Expectation(
            ak_pub=self.ak_pub,
            nonce=evidence.nonce,
            pcrs=self.pcrs,
            released=set(self.released),
            current=self.released[-1],
            **self.clock,
        )
        verdict = verify_evidence(evidence, expected)
        if not verdict.ok:
            self._note("refused")
            return refuse(*[failure.code for failure in verdict.failures])
        assert verdict.clock is not None
        assert verdict.policy_digest is not None
        self.clock = {
            "last_clock": verdict.clock.clock,
            "last_reset_count": verdict.clock.reset_count,
            "last_restart_count": verdict.clock.restart_count,
        }
        now = datetime.now(UTC)
        svid = self.authority.issue_svid(evidence.csr_pem, evidence.workspace_id, verdict.policy_digest, now, self.ttl)
        host = self.ssh.issue_host(evidence.ssh_host_pub, [evidence.workspace_id], now, 3600)
        self._note("quote")
        return JSONResponse(
            {
                "verdict": "attested",
                "svid_pem": svid.decode(),
                "ca_pem": self.authority.ca_pem.decode(),
                "lease": msgspec.to_builtins(Lease(self.ttl, now + timedelta(seconds=self.ttl), self.offline or None)),
                "policy_digest": verdict.policy_digest,
                "ssh_user_ca": self.ssh.user_ca,
                "ssh_host_cert": host,
            }
        )


def refuse(*codes: str) -> Response:
    failures = [{"code": code, "component": "test", "detail": ""} for code in codes]
    return JSONResponse({"error": "not_attested", "failures": failures}, status_code=403)
