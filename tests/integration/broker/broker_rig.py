"""A real broker process on private paths and ports, with officers, a signed policy and clients for every side."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import msgspec
import rfc8785
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

# Molecule, benchmarks and soaks use this rig without the tests' conftest.
sys.path += [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from databases import installed
from saw.attest.image_record import PAYLOAD_TYPE
from saw.attest.verifier import RELEASED_PCRS
from saw.broker.client import BrokerContext, Context, OperatorClient
from saw.broker.config import BrokerConfig, Listen, RolloutSettings, SessionRules, TufSettings
from saw.broker.sso_settings import SsoSettings
from saw.cli.main import main as saw_command
from saw.identity.x509 import new_key_and_csr
from saw.policy.bundle import build_manifest, policy_digest, sign
from saw.policy.envelope import seal
from saw.policy.loader import load_bundle_folder
from saw.policy.tuf_reach import bundle_diff
from saw.policy.tuf_repository import Publication, cosign_publication, init_repository, stage_publication
from saw.policy.tuf_statements import state_reach

NAME = "broker.saw.internal"
PCRS = {str(pcr): f"{pcr:064x}" for pcr in RELEASED_PCRS}

POLICY = """\
version: 1
network_policies:
  git:
    name: git
    endpoints:
      - {host: git.example.com, port: 443, protocol: rest, access: read-only}
    binaries:
      - {path: "/usr/bin/**"}
"""
GOVERNANCE = """\
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: platform}
lease: {ttl: 90s}
"""


def image_record(name: str = "workspace", digest: str = "1" * 64, pcrs: dict[str, str] | None = None) -> dict[str, Any]:
    return {
        "format": "saw-image-release/2",
        "name": name,
        "image_sha256": digest,
        "inputs_digest": "inputs",
        "created": "2026-11-23T00:00:00Z",
        "not_after": (datetime.now(UTC) + timedelta(days=30)).strftime("%Y-%m-%dT00:00:00Z"),
        "boot": {"pcrs": pcrs or PCRS},
    }


def signed_record(record: dict[str, Any], keys: Sequence[Ed25519PrivateKey]) -> dict[str, Any]:
    """The body of ``PUT /v1/images``: ``record`` in an envelope that ``keys`` signed."""
    return dict(json.loads(seal(rfc8785.dumps(record), PAYLOAD_TYPE, keys)))


def encode(publication: Publication) -> dict[str, Any]:
    """The body of ``POST /v1/policy/publish``."""
    b64 = {path: base64.b64encode(raw).decode() for path, raw in publication.targets.items()}
    return {
        "metadata": {name: base64.b64encode(raw).decode() for name, raw in publication.metadata.items()},
        "targets": b64,
    }


class Officers:
    """Three officers, two of whom sign, with their copy of the repository."""

    def __init__(self, directory: Path, online_pem: bytes) -> None:
        self.keys = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.directory = directory / "officers"
        self.directory.mkdir()
        online = serialization.load_pem_public_key(online_pem)
        self.root = init_repository(
            self.directory, self.keys, online, threshold=2, now=datetime.now(UTC) - timedelta(minutes=1)
        )

    def bundle(self, revision: int, content: str = POLICY, governance: str = GOVERNANCE) -> tuple[str, bytes]:
        """Return digest and signed file of a bundle."""
        with tempfile.TemporaryDirectory() as name:
            (Path(name) / "policy.yaml").write_text(content)
            (Path(name) / "governance.yaml").write_text(governance)
            bundle = load_bundle_folder(Path(name))
        now = datetime.now(UTC).replace(microsecond=0)
        manifest = build_manifest(bundle, revision, now - timedelta(minutes=1), now + timedelta(days=30))
        return policy_digest(manifest), sign(manifest, bundle.members, self.keys[:2])

    def publication(
        self, revision: int, ring: str = "stable", base: Path | None = None, **text: str
    ) -> tuple[str, Publication]:
        """Return digest and publication of a bundle whose change of reach two officers state."""
        digest, raw = self.bundle(revision, **text)
        copy, path = base or self.directory, f"rings/{ring}/coding.bundle.json"
        reach = state_reach(copy, path, raw, bundle_diff())[1]
        staged = stage_publication(copy, path, raw, self.keys[:1], datetime.now(UTC), reach=reach)
        return digest, cosign_publication(staged, self.keys[1:2])


class Lab:
    """One broker process. ``directory`` is readable by others so that another user can reach the socket."""

    def __init__(
        self,
        directory: Path,
        operator_group: str | None = None,
        rollout: RolloutSettings | None = None,
        sso: SsoSettings | None = None,
        sessions: SessionRules | None = None,
        **settings: Any,
    ) -> None:
        self.directory = directory
        directory.chmod(0o755)
        (directory / "run").mkdir()
        self.config = BrokerConfig(
            trust_domain="saw.example",
            state_dir=str(directory / "state"),
            operator_socket=str(directory / "run" / "operator.sock"),
            server_names=(NAME, *(["localhost"] if sso else [])),
            listen=Listen("127.0.0.1", 0),
            operator_group=operator_group,
            tuf=TufSettings(3600),
            rollout=rollout or RolloutSettings(),
            sso=sso,
            audit_socket=str(directory / "run" / "audit.sock"),
            audit_group=operator_group,
            sessions=sessions or SessionRules(),
            **settings,
        )
        self.config = installed(self.config, datetime.now(UTC))
        self.config_file = directory / "broker.json"
        self.config_file.write_bytes(msgspec.json.encode(self.config))
        self.officers = Officers(directory, (self.config.keys / "tuf-online.pub").read_bytes())
        self.ca_file = self.config.keys / "x509" / "ca.pem"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.enter: tuple[str, ...] = ()
        """What stands before the broker's command, for one that runs in a namespace."""
        self.operator = OperatorClient(Context(BrokerContext(socket=self.config.operator_socket)))

    def start(self) -> None:
        """Start the broker and wait until it tells (sd_notify) that it serves."""
        with ready_socket(self.directory / "run" / "notify.sock") as (name, wait):
            self.process = subprocess.Popen(
                [
                    *self.enter,
                    sys.executable,
                    "-m",
                    "saw.cli.main",
                    "broker",
                    "serve",
                    "--config",
                    str(self.config_file),
                ],
                env={**os.environ, "NOTIFY_SOCKET": name},
                stderr=(self.directory / "broker.log").open("ab"),
            )
            self.port = wait(self.process)

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            assert self.process.wait(15) == 0, self.log()
            self.process = None

    def log(self) -> str:
        return (self.directory / "broker.log").read_text()

    @contextmanager
    def tls(
        self,
        kind: str | None = None,
        name: str = "",
        pair: tuple[bytes, bytes] | None = None,
        local: str | None = None,
    ) -> Iterator[httpx.Client]:
        """A client of the TLS side; with ``kind`` it holds a certificate of that kind issued by the operator API.

        ``local`` is the address that it calls from.
        """
        context = ssl.create_default_context(cafile=str(self.ca_file))
        if kind is not None:
            key, csr = new_key_and_csr(name)
            body = {"csr_pem": csr.decode(), "kind": kind, "name": name}
            pair = (key, self.operator.request("POST", "/v1/certificates/x509", body)["certificate"].encode())
        if pair is not None:
            with tempfile.NamedTemporaryFile() as file:
                file.write(pair[1] + pair[0])
                file.flush()
                context.load_cert_chain(file.name)
        # The server's name is not in DNS: connect by address, check the certificate against the name.
        transport = httpx.HTTPTransport(verify=context, trust_env=False, local_address=local)
        url = f"https://127.0.0.1:{self.port}"
        with httpx.Client(transport=transport, timeout=40, trust_env=False, base_url=url) as client:
            client.event_hooks = {"request": [_server_name]}
            yield client

    def register_image(self, record: dict[str, Any] | None = None, *, promoted: bool = True) -> dict[str, Any]:
        """Register an image that two officers signed for, installing their root where there is none; promote it."""
        record = record or image_record()
        root = base64.b64encode(self.officers.root).decode()
        self.operator.request("PUT", "/v1/policy/root", {"root": root})
        answer = self.operator.request("PUT", "/v1/images", signed_record(record, self.officers.keys[:2]))
        if promoted:
            self.move_image(record["name"], "stable")
        return answer

    def move_image(self, name: str, to: str) -> dict[str, Any]:
        return self.operator.request("POST", f"/v1/images/{name}/state", {"to": to, "reason": "test"})

    def workspace(
        self,
        name: str,
        *,
        to: str | None = None,
        ring: str = "stable",
        image: str = "workspace",
        blueprint: str = "coding",
        sponsor: str = "ada@example.com",
    ) -> dict[str, Any]:
        """Register a workspace and, with ``to``, walk it there."""
        self.register_image(image_record(image))
        body = {"id": name, "sponsor": sponsor, "blueprint": blueprint, "ring": ring, "image": image}
        answer = self.operator.request("POST", "/v1/workspaces", body)
        for state in {None: [], "attesting": ["provisioning", "attesting"]}[to]:
            answer = self.step(name, state)
        return answer

    def step(self, name: str, to: str) -> dict[str, Any]:
        return self.operator.request("POST", f"/v1/workspaces/{name}/transition", {"to": to, "reason": "test"})

    def events(self, source: str = "broker") -> list[dict[str, Any]]:
        """Every stored event of a chain."""
        events: list[dict[str, Any]] = []
        with self.operator.session() as client:
            while True:
                after = events[-1]["seq"] if events else 0
                page = client.request("GET", f"/v1/audit/events?source={source}&after={after}&limit=1000")["events"]
                events += page
                if len(page) < 1000:
                    return events


def _server_name(request: httpx.Request) -> None:
    request.extensions["sni_hostname"] = NAME


@contextmanager
def ready_socket(path: Path) -> Iterator[tuple[str, Any]]:
    """A socket for sd_notify; gives its name and a function that waits for readiness and returns the port."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(path))
        listener.settimeout(0.2)

        def wait(process: subprocess.Popen[bytes]) -> int:
            for _ in range(300):
                try:
                    lines = listener.recv(4096).decode().splitlines()
                except TimeoutError:
                    assert process.poll() is None, "the broker ended while starting"
                    continue
                assert lines[0] == "READY=1"
                return int(lines[1].rpartition(" ")[2])
            raise AssertionError("the broker was not ready in time")

        yield str(path), wait


@contextmanager
def running_broker(**settings: Any) -> Iterator[Lab]:
    """A broker of its own in a directory of its own, ended and removed afterwards; ``settings`` as :class:`Lab` takes them."""
    directory = Path(tempfile.mkdtemp(prefix="saw-broker-"))
    lab = Lab(directory, **settings)
    try:
        lab.start()
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)


def cli(lab: Lab, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``saw`` against the lab's broker."""
    context = lab.directory / "context.json"
    context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
    return subprocess.run(
        [sys.executable, "-m", "saw.cli.main", *arguments],
        env={**os.environ, "SAW_CONTEXT": str(context)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def cli_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``saw`` as the command does, within this process: much faster where many are run."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = saw_command(list(arguments))
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())
