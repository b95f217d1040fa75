"""A signed bundle of Agent Policy Fabric: nothing of it is read before its signature, window and digests are right."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from saw.cli.main import main
from saw.policy.loader import load_bundle_folder

KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
P256 = ec.derive_private_key(7, ec.SECP256R1())
SANDBOX = """apiVersion: nvidia.agent-policy-fabric.sandbox/v1alpha1
kind: SandboxPolicy
metadata: {name: default}
spec:
  filesystem: {include_workdir: true, read_only: [/usr], read_write: [/tmp]}
  landlock: {compatibility: hard_requirement}
  process: {run_as_user: sandbox, run_as_group: sandbox}
  network_policies:
    api:
      binaries: [{path: /usr/bin/curl}]
      endpoints: [{host: api.example.com, port: 443, protocol: rest, access: read-only, enforcement: enforce}]
"""
RULE = """apiVersion: nvidia.agent-policy-fabric.rule/v1alpha1
kind: PolicyRule
metadata: {name: no-deletes}
spec: {}
"""


def encoded(signature: bytes) -> str:
    return base64.urlsafe_b64encode(signature).rstrip(b"=").decode()


class Made:
    """A bundle folder with its trust roots; ``change`` alters the signed manifest before, ``signed`` after the signature."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "sandbox").mkdir()
        (folder / "sandbox/default-policy.yaml").write_text(SANDBOX)
        (folder / "rules").mkdir()
        (folder / "rules/no-deletes.yaml").write_text(RULE)
        raw = KEY.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        (folder / "signer.pub").write_text(f"# the signer\ned25519:{base64.b64encode(raw).decode()}\n")
        pem = P256.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        (folder / "signer.pem").write_bytes(pem)
        other = Ed25519PrivateKey.from_private_bytes(b"\x08" * 32).public_key()
        raw = other.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        (folder / "other.pub").write_text(f"ed25519:{base64.b64encode(raw).decode()}\n")

    def manifest(self, **changes: str) -> bytes:
        paths = ("sandbox/default-policy.yaml", "rules/no-deletes.yaml")
        members = "".join(
            f"- path: {path}\n  sha256: {hashlib.sha256((self.folder / path).read_bytes()).hexdigest()}\n"
            for path in paths
        )
        values = {
            "id": "team-bundle",
            "policy_revision": "7",
            "not_before": '"2026-01-01T00:00:00Z"',
            "expires_at": '"2099-01-01T00:00:00Z"',
            **changes,
        }
        head = "apiVersion: nvidia.agent-policy-fabric.policy/v1alpha1\nkind: PolicyBundle\nmetadata: {}\n"
        return (head + "".join(f"{key}: {value}\n" for key, value in values.items()) + f"manifest:\n{members}").encode()

    def write(
        self, payload: bytes, signature: bytes | None = None, alg: str = "ED25519_PUREEDDSA_RAW_RS64_CANONICAL"
    ) -> Path:
        text = encoded(KEY.sign(payload) if signature is None else signature)
        carrier = f"---\nschema: YamlSigilSignature.v1alpha1\nalg: {alg}\nkeyid: signer\nsignature: {text}\n"
        (self.folder / "bundle.yaml").write_bytes(payload + carrier.encode())
        return self.folder / "bundle.yaml"


@pytest.fixture
def made(tmp_path: Path) -> Made:
    (tmp_path / "bundle").mkdir()
    return Made(tmp_path / "bundle")


def take(
    capsys: pytest.CaptureFixture[str], made: Made, path: Path, root: str = "signer.pub", **options: str
) -> tuple[int, dict[str, Any]]:
    more = [part for key, value in options.items() for part in (f"--{key}", value)]
    trust = ["--trust-root", str(made.folder / root)] if root else []
    out = str(made.folder.parent / "out")
    code = main(["policy", "import", str(path), "--out", out, "--owner", "team-x", *trust, *more, "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.control("INT-01")
def test_the_sandbox_policy_of_a_good_bundle_is_imported_and_the_rest_is_named(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = take(capsys, made, made.write(made.manifest()))
    assert code == 1, "the Cedar rule is lost, so the import is not whole"
    assert (answer["bundle_id"], answer["revision"], answer["signed_by"]) == ("team-bundle", 7, "signer")
    lost = [finding for finding in answer["findings"] if finding["effect"] == "lost"]
    assert [finding["field"] for finding in lost] == ["rules/no-deletes.yaml"] and "Cedar" in lost[0]["reason"]
    policy = load_bundle_folder(made.folder.parent / "out").policy
    assert policy.network_policies["api"].endpoints[0].host == "api.example.com"
    assert policy.filesystem_policy.read_write == ("/tmp",)


def test_a_p256_signature_counts_as_well(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    payload = made.manifest()
    r, s = decode_dss_signature(P256.sign(payload, ec.ECDSA(hashes.SHA256())))
    path = made.write(payload, r.to_bytes(32, "big") + s.to_bytes(32, "big"), "ECDSA_SECP256R1_SHA256_RAW_RS64")
    assert take(capsys, made, path, "signer.pem")[1]["signed_by"] == "signer"
    path.write_bytes(path.read_bytes().replace(b"team-bundle", b"evil-bundle"))
    assert take(capsys, made, path, "signer.pem")[1]["error"]["code"] == "unsigned"


def refused(
    capsys: pytest.CaptureFixture[str], made: Made, path: Path, root: str = "signer.pub", **options: str
) -> str:
    code, answer = take(capsys, made, path, root, **options)
    assert code == 1 and not (made.folder.parent / "out").exists()
    return str(answer["error"]["code"])


@pytest.mark.control("INT-01")
def test_a_bad_bundle_is_refused_and_nothing_is_written(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    good = made.write(made.manifest())
    assert refused(capsys, made, good, "") == "unsigned", "whose signature counts must be said"
    assert refused(capsys, made, good, "other.pub") == "unsigned"
    assert refused(capsys, made, made.write(made.manifest(), b"\x00" * 64)) == "unsigned"
    assert refused(capsys, made, made.write(made.manifest(), b"\x00" * 63)) == "malformed"
    assert refused(capsys, made, made.write(made.manifest(), alg="NONE")) == "unsigned"
    assert refused(capsys, made, made.write(made.manifest(expires_at='"2026-02-01T00:00:00Z"'))) == "expired"
    assert refused(capsys, made, made.write(made.manifest(not_before='"2098-01-01T00:00:00Z"'))) == "not_yet_valid"
    assert refused(capsys, made, made.write(made.manifest(not_before='"2026-01-01"'))) == "malformed"
    assert refused(capsys, made, made.write(made.manifest(policy_revision="0"))) == "malformed"
    assert refused(capsys, made, made.write(made.manifest()), document="other") == "malformed"
    outside = made.manifest().replace(b"path: rules/no-deletes.yaml", b"path: ../signer.pub")
    assert refused(capsys, made, made.write(outside)) == "malformed"
    unsigned = made.manifest()
    (made.folder / "bundle.yaml").write_bytes(unsigned)
    assert refused(capsys, made, made.folder / "bundle.yaml") == "unsigned"
    good = made.write(made.manifest())
    good.write_bytes(good.read_bytes().replace(b"policy_revision: 7", b"policy_revision: 8"))
    assert refused(capsys, made, good) == "unsigned"
    good = made.write(made.manifest())
    member = made.folder / "sandbox/default-policy.yaml"
    member.write_text(SANDBOX.replace("read-only", "full"))
    assert refused(capsys, made, good) == "member_mismatch"
    member.write_text(SANDBOX)
    assert take(capsys, made, good)[1]["revision"] == 7, "the twin: the same bundle untouched"


def test_a_lone_member_is_not_taken_for_a_policy(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, made, made.folder / "sandbox/default-policy.yaml") == "unsigned"
