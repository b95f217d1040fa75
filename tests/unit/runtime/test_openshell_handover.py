"""The handover to OpenShell, over its published protocol and mutual TLS: read back, or the sandbox is stopped."""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from openshell._proto import openshell_pb2, openshell_pb2_grpc, sandbox_pb2

from saw.cli.main import main
from saw.errors import ConfigError, UnavailableError
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.policy.openshell_runtime import SUPERVISOR
from saw.runtime import generation, ring1
from saw.runtime.leaf import LeafAuthority
from saw.runtime.openshell import HandoverFailed, OpenShellConfig, check, config_of, hand_over
from saw.runtime.openshell_gateway import GatewayRefused, SdkGateway

pytestmark = pytest.mark.control("INT-01")
IMAGE = "registry.example.com/sandbox@sha256:" + "a" * 64
GOVERNANCE = "schema: 1\nblueprint: {name: x, version: 1.0.0, owner: team-x}\nlandlock: {minimum_abi: 4}\n"


def policy(access: str = "read-only", read_only: str = "[/usr]") -> str:
    return (
        f"version: 1\nfilesystem_policy: {{read_only: {read_only}, read_write: [/tmp]}}\nnetwork_policies:\n  one:\n"
        f"    binaries: [{{path: /usr/bin/curl}}, {{path: {SUPERVISOR}}}]\n    endpoints:\n"
        f"      - {{host: a.example.com, port: 443, protocol: rest, access: {access}}}\n"
    )


class FarEnd(openshell_pb2_grpc.OpenShellServicer):
    """A gateway's part of the protocol, with the state of one sandbox; ``becomes`` is what a new policy becomes there."""

    def __init__(self) -> None:
        self.revisions: list[Any] = []
        self.image, self.stopped, self.updates, self.stops = "", False, 0, 0
        self.becomes = openshell_pb2.POLICY_STATUS_LOADED
        self.source, self.on_invalid = sandbox_pb2.POLICY_SOURCE_SANDBOX, "fail_closed"
        self.changes: Callable[[Any], None] = lambda _: None

    def GetSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name != "agent" or request.workspace_scope.workspace != "default" or not self.revisions:
            context.abort(grpc.StatusCode.NOT_FOUND, "no such sandbox")
        phase = openshell_pb2.SANDBOX_PHASE_STOPPED if self.stopped else openshell_pb2.SANDBOX_PHASE_READY
        return openshell_pb2.SandboxResponse(sandbox={"status": {"phase": phase}})

    def CreateSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.image = request.spec.template.image
        self.revisions.append(request.spec.policy)
        return openshell_pb2.SandboxResponse()

    def UpdateConfig(self, request: Any, context: Any) -> Any:  # noqa: N802
        if any(not endpoint.host for rule in request.policy.network_policies.values() for endpoint in rule.endpoints):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "host is missing")
        self.updates += 1
        self.revisions.append(request.policy)
        return openshell_pb2.UpdateConfigResponse(version=len(self.revisions))

    def GetSandboxPolicyStatus(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        version = request.version or len(self.revisions)
        loaded = self.becomes == openshell_pb2.POLICY_STATUS_LOADED and not self.stopped
        return openshell_pb2.GetSandboxPolicyStatusResponse(
            revision={
                "version": version,
                "status": openshell_pb2.POLICY_STATUS_PENDING if self.stopped else self.becomes,
                "load_error": "" if loaded else "landlock said no",
            },
            active_version=version if loaded else version - 1,
        )

    def GetSandboxConfig(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        held = sandbox_pb2.SandboxPolicy()
        held.CopyFrom(self.revisions[-1])
        self.changes(held)
        return sandbox_pb2.GetSandboxConfigResponse(
            policy=held, version=len(self.revisions), policy_hash="h", policy_source=self.source,
            policy_validation_failure_mode=self.on_invalid,
        )  # fmt: skip

    def StopSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.stopped = True
        self.stops += 1
        return openshell_pb2.SandboxResponse()

    def StartSandbox(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        self.stopped = False
        return openshell_pb2.SandboxResponse()


def certificates(folder: Path) -> None:
    """Make what ``openshell-gateway generate-certs`` makes: an authority, a server's and a client's certificate."""
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server", "client")}
    now, issuer = datetime.now(UTC), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "openshell")])
    for name, key in keys.items():
        place = folder if name == "ca" else folder / name
        place.mkdir(parents=True, exist_ok=True)
        made = (
            x509.CertificateBuilder()
            .subject_name(issuer if name == "ca" else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=name == "ca", path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .sign(keys["ca"], hashes.SHA256())
        )
        stem = "ca" if name == "ca" else "tls"
        (place / f"{stem}.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
        private = serialization.PrivateFormat.PKCS8
        (place / f"{stem}.key").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, private, serialization.NoEncryption())
        )


class Place:
    """A workspace's generations, and the far end behind mutual TLS."""

    def __init__(self, base: Path, tls: Path, port: int, far_end: FarEnd) -> None:
        self.far_end, self.tls = far_end, tls
        self.root = base / "generations"
        self.root.mkdir()
        self.settings = ring1.Ring1(
            ring2_address="127.0.0.1", ring2_port=8443, decide_socket=base / "d", sds_file=base / "s", ca_file=base / "c",
            generations=self.root,
        )  # fmt: skip
        self.authority = LeafAuthority.ensure(base / "ca", datetime.now(UTC))
        self.config = OpenShellConfig(
            image=IMAGE, endpoint=f"127.0.0.1:{port}", tls=str(tls), accept=("governance.persistence",),
            generations=str(self.root), state=str(base / "run/state.json"),
        )  # fmt: skip
        self.gateway = SdkGateway(self.config.endpoint, tls, "default", "agent")

    def activate(self, text: str, governance: str = GOVERNANCE) -> str:
        members = {"policy.yaml": text.encode(), "governance.yaml": governance.encode()}
        bundle = load_members(members)
        listed = {name: {"sha256": hashlib.sha256(raw).hexdigest()} for name, raw in members.items()}
        manifest = json.dumps({"members": listed}).encode()
        digest = hashlib.sha256(manifest).hexdigest()
        content = generation.Content(
            digest=digest, revision=3, blueprint="x", manifest=manifest, members=members,
            matcher=Matcher.compile(bundle.policy, bundle.governance),
        )  # fmt: skip
        made = generation.compile_generation(
            content, self.root, self.settings, self.authority, datetime.now(UTC), group=None
        )
        generation.place(self.root, made, digest)
        generation.switch(self.root, digest)
        return digest

    def hand_over(self, abi: int = 6, **clock: Any) -> Any:
        return hand_over(self.config, self.gateway, abi=lambda: abi, **clock)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openshell-tls")
    certificates(folder)
    return folder


@pytest.fixture
def place(tmp_path: Path, tls: Path) -> Iterator[Place]:
    far_end = FarEnd()
    server = grpc.server(ThreadPoolExecutor(2))
    openshell_pb2_grpc.add_OpenShellServicer_to_server(far_end, server)
    pair = ((tls / "server/tls.key").read_bytes(), (tls / "server/tls.crt").read_bytes())
    credentials = grpc.ssl_server_credentials([pair], (tls / "ca.crt").read_bytes(), require_client_auth=True)
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    made = Place(tmp_path, tls, port, far_end)
    yield made
    made.gateway.close()
    server.stop(None).wait(60)


def test_the_first_policy_creates_the_sandbox_and_the_next_one_is_read_back(place: Place) -> None:
    first = place.activate(policy())
    handed = place.hand_over()
    assert (handed.policy_digest, handed.revision, handed.version, handed.changed) == (first, 3, 1, True)
    assert place.far_end.image == IMAGE
    assert json.loads(Path(place.config.state).read_text())["policy_digest"] == first
    assert place.hand_over().changed is False and place.far_end.updates == 0, "what is there already is not sent again"
    second = place.activate(policy("full"))
    handed = place.hand_over()
    assert (handed.policy_digest, handed.version, handed.changed) == (second, 2, True)
    endpoint = place.far_end.revisions[-1].network_policies["one"].endpoints[0]
    assert endpoint.access == sandbox_pb2.NETWORK_ACCESS_PRESET_FULL
    assert check(place.config, place.gateway) == [] and not place.far_end.stopped


def fails(far_end: FarEnd) -> None:
    far_end.becomes = openshell_pb2.POLICY_STATUS_FAILED


def hangs(far_end: FarEnd) -> None:
    far_end.becomes = openshell_pb2.POLICY_STATUS_PENDING


def global_policy(far_end: FarEnd) -> None:
    far_end.source = sandbox_pb2.POLICY_SOURCE_GLOBAL


def keeps_the_last_one(far_end: FarEnd) -> None:
    far_end.on_invalid = "retain_last_valid"


def adds_a_rule(far_end: FarEnd) -> None:
    far_end.changes = lambda held: held.network_policies["_provider_x"].endpoints.add(host="b.example.com", port=443)


def adds_a_switch(far_end: FarEnd) -> None:
    def change(held: Any) -> None:
        held.network_policies["one"].endpoints[0].allow_uninspected_credentials = True

    far_end.changes = change


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (fails, "is failed there: landlock said no"),
        (hangs, "is still pending there"),
        (global_policy, "a global policy of the gateway is in force instead"),
        (keeps_the_last_one, "retain_last_valid"),
        (adds_a_rule, "it holds another policy"),
        (adds_a_switch, "allow_uninspected_credentials"),
    ],
)
def test_a_sandbox_that_does_not_hold_the_policy_is_stopped(
    place: Place, fault: Callable[[FarEnd], None], words: str
) -> None:
    place.activate(policy())
    place.hand_over()
    place.activate(policy("full"))
    fault(place.far_end)
    clock = iter(range(0, 10_000, 50))
    with pytest.raises(HandoverFailed, match=words) as caught:
        place.hand_over(monotonic=lambda: float(next(clock)), sleep=lambda _: None)
    assert place.far_end.stopped and "its sandbox was stopped" in caught.value.message


def test_what_the_handover_stopped_it_starts_again_with_the_policy_and_what_a_person_stopped_stays_so(
    place: Place,
) -> None:
    place.activate(policy())
    place.hand_over()
    place.activate(policy("full"))
    fails(place.far_end)
    with pytest.raises(HandoverFailed):
        place.hand_over()
    assert place.far_end.stopped
    place.far_end.becomes = openshell_pb2.POLICY_STATUS_LOADED
    again = place.activate(policy("read-write"))
    assert place.hand_over().policy_digest == again and not place.far_end.stopped
    place.far_end.stopped = True
    updates, stops = place.far_end.updates, place.far_end.stops
    for _ in range(2):
        place.activate(policy())
        with pytest.raises(HandoverFailed, match="is stopped, and not by the handover"):
            place.hand_over()
    assert place.far_end.stopped and (place.far_end.updates, place.far_end.stops) == (updates, stops)


def test_what_openshell_takes_at_creation_alone_is_not_changed_behind_its_back(place: Place) -> None:
    place.activate(policy())
    place.hand_over()
    place.activate(policy(read_only="[/usr, /etc]"))
    with pytest.raises(HandoverFailed, match="filesystem_policy changed") as caught:
        place.hand_over()
    assert place.far_end.stopped and place.far_end.updates == 0 and "delete it" in caught.value.cure


@pytest.mark.parametrize(
    ("text", "abi", "words"),
    [
        (policy(), 3, "Landlock ABI 4 is required"),
        (policy().replace(f", {{path: {SUPERVISOR}}}", ""), 6, "ring 1 would refuse"),
    ],
)
def test_what_cannot_be_held_there_is_not_sent_and_the_sandbox_is_stopped(
    place: Place, text: str, abi: int, words: str
) -> None:
    place.activate(policy("full"))
    place.hand_over()
    place.activate(text)
    with pytest.raises(HandoverFailed, match=words):
        place.hand_over(abi=abi)
    assert place.far_end.stopped and place.far_end.updates == 0


def test_a_generation_that_was_changed_on_disk_is_not_handed_over(place: Place) -> None:
    digest = place.activate(policy())
    (place.root / digest / "policy.yaml").write_text(policy("full"))
    with pytest.raises(generation.GenerationInvalid, match="changed after it was verified"):
        place.hand_over()
    assert not place.far_end.revisions


def test_without_a_policy_or_a_gateway_nothing_is_claimed(place: Place, tls: Path) -> None:
    with pytest.raises(UnavailableError, match="no policy is in force"):
        place.hand_over()
    place.activate(policy())
    absent = SdkGateway("127.0.0.1:1", tls, "default", "agent")
    with pytest.raises(UnavailableError, match="does not answer"):
        hand_over(place.config, absent, abi=lambda: 6)
    absent.close()
    assert not Path(place.config.state).exists()


def test_the_gateway_is_asked_under_mutual_tls_alone(place: Place, tmp_path: Path) -> None:
    certificates(tmp_path / "others")
    stranger = SdkGateway(place.config.endpoint, tmp_path / "others", "default", "agent")
    with pytest.raises(UnavailableError):
        stranger.phase()
    stranger.close()
    assert place.gateway.phase() is None
    with pytest.raises(ConfigError, match="certificates cannot be read"):
        SdkGateway(place.config.endpoint, tmp_path / "none", "default", "agent")


def test_a_refusal_of_the_gateway_is_told_in_its_words(place: Place) -> None:
    place.activate(policy())
    place.hand_over()
    with pytest.raises(GatewayRefused, match="INVALID_ARGUMENT: host is missing"):
        place.gateway.update({"version": 1, "network_policies": {"one": {"endpoints": [{"port": 443}]}}})


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ('{"image": "sandbox:latest"}', "not named by its digest"),
        (json.dumps({"image": IMAGE, "endpont": "x"}), "endpont"),
        ("{}", "image"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(raw: str, words: str) -> None:
    assert config_of(json.dumps({"image": IMAGE}).encode(), "f").sandbox == "agent"
    with pytest.raises(ConfigError, match=words):
        config_of(raw.encode(), "f")


def test_apply_and_status_as_commands(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "openshell.json"
    names = ("image", "endpoint", "tls", "accept", "generations", "state")
    config.write_text(json.dumps({name: getattr(place.config, name) for name in names}))
    digest = place.activate(policy(), GOVERNANCE.replace("4", "1"))

    def run(command: str) -> tuple[int, dict[str, Any]]:
        code = main(["openshell", command, "--config", str(config), "--json"])
        return code, json.loads(capsys.readouterr().out)

    assert run("status") == (1, {"ok": False, "differences": ["there is no sandbox agent"]})
    code, answer = run("apply")
    assert code == 0 and answer["policy_digest"] == digest
    assert run("status") == (0, {"ok": True, "differences": []})
    place.far_end.stopped = True
    adds_a_rule(place.far_end)
    code, answer = run("status")
    assert code == 1 and answer["differences"] == [
        "the sandbox is stopped",
        "it holds another policy (network_policies)",
    ]
