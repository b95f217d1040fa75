"""Keys that a program keeps sign like keys in files; what such a program gets wrong is noticed before it is used."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from tuf_world import STABLE, Officers, World, code_of

from saw.cli.main import main
from saw.policy.bundle import build_manifest, sign, verify_bundle
from saw.policy.errors import KeyFileError
from saw.policy.keys import create_key, key_id, key_kind, parse_public_key, public_pem, signature_holds
from saw.policy.loader import Bundle
from saw.policy.signers import CommandSigner, open_signer, signature_of
from saw.policy.tuf_metadata import Root, check_root, parse, sign_metadata, signing_key
from saw.policy.tuf_repository import init_repository

pytestmark = pytest.mark.control("POL-01")
ROOT = Path(__file__).parents[3]
CODING = str(ROOT / "policies" / "coding")

SCRIPT = """#!{python}
import sys
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
key = serialization.load_pem_private_key(open({key!r}, "rb").read(), None)
if sys.argv[1:] == ["--public"]:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    sys.stdout.buffer.write(key.public_key().public_bytes(serialization.Encoding.PEM, form))
else:
    data = sys.stdin.buffer.read()
    signature = key.sign(data, ec.ECDSA(hashes.SHA256())) if isinstance(key, ec.EllipticCurvePrivateKey) else key.sign(data)
    sys.stdout.buffer.write({answer})
"""
Program = Callable[..., Path]


def pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey | rsa.RSAPrivateKey) -> bytes:
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, form, none)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """A signing program around a key; ``answer`` is what it prints for a signature."""

    def make(key: object, answer: str = "signature", name: str = "signer") -> Path:
        (tmp_path / f"{name}.pem").write_bytes(pem(key))  # type: ignore[arg-type]
        path = tmp_path / name
        path.write_text(SCRIPT.format(python=sys.executable, key=str(tmp_path / f"{name}.pem"), answer=answer))
        path.chmod(0o700)
        return path

    return make


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


@pytest.mark.parametrize("key", [Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP256R1())])
def test_a_program_signs_and_the_bundle_verifies(
    key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey,
    program: Program,
    coding: Bundle,
    officers: Officers,
    now: datetime,
) -> None:
    signer = open_signer(f"exec:{program(key)}")
    assert signer.public_key() == key.public_key()
    raw = sign(build_manifest(coding, 1, now, now + timedelta(days=1)), coding.members, [officers[0], signer])
    trusted = {key_id(k.public_key()): k.public_key() for k in (officers[0], key)}
    assert len(verify_bundle(raw, trusted, 2, now).signers) == 2


def test_officers_with_tokens_make_a_root_and_publish(tmp_path: Path, program: Program, world: World) -> None:
    token = open_signer(f"exec:{program(ec.generate_private_key(ec.SECP256R1()))}")
    officers = [token, *world.officers[1:]]
    world = World(tmp_path / "tokens", world.content, officers, world.online, world.now)  # type: ignore[arg-type]
    raw = world.release(1)
    assert world.fetch(STABLE) == raw
    assert {key_kind(token.public_key()), key_kind(officers[1].public_key())} == {"ecdsa-p256", "ed25519"}


@pytest.mark.parametrize(
    "answer", ["signature[:-1]", "signature[::-1]", "bytes(64)", "key.sign(data + b'x')", "b''", "b'x' * 100000"]
)
def test_a_signature_that_does_not_verify_is_never_used(program: Program, answer: str) -> None:
    key = Ed25519PrivateKey.generate()
    with pytest.raises(KeyFileError):
        signature_of(CommandSigner(program(key, answer)), b"payload")
    assert signature_of(CommandSigner(program(key)), b"payload") == key.sign(b"payload")


def test_a_program_that_signs_with_another_key_is_noticed(program: Program, tmp_path: Path) -> None:
    signer = CommandSigner(program(Ed25519PrivateKey.generate()))
    (tmp_path / "signer.pem").write_bytes(pem(Ed25519PrivateKey.generate()))
    with pytest.raises(KeyFileError, match="does not verify"):
        signature_of(signer, b"payload")


def test_a_program_that_hangs_ends_in_bounded_time(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="did not answer"):
        CommandSigner(script(tmp_path, "exec tail -f /dev/null"), timeout_s=0.2)


@pytest.mark.parametrize(
    ("text", "match"), [("exit 3", "exit code 3"), ("true", "0 bytes"), ("echo hello", "cannot be read")]
)
def test_a_program_that_fails_is_named(tmp_path: Path, text: str, match: str) -> None:
    with pytest.raises(KeyFileError, match=match):
        CommandSigner(script(tmp_path, text))


def test_what_is_no_program_is_named(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    for name in ("exec:relative", f"exec:{tmp_path}", f"exec:{tmp_path / 'plain'}", f"exec:{tmp_path / 'absent'}"):
        with pytest.raises(KeyFileError):
            open_signer(name)
    with pytest.raises(KeyFileError) as caught:
        open_signer("pkcs11:token=officer;object=ada")
    assert "exec:" in caught.value.cure


def test_an_encrypted_key_file_is_the_same_interface(tmp_path: Path) -> None:
    made = create_key(tmp_path, "ada", b"correct horse")
    assert open_signer(str(tmp_path / "ada.key"), b"correct horse").public_key() == made.public_key()
    with pytest.raises(KeyFileError):
        open_signer(str(tmp_path / "ada.key"), b"wrong")


@pytest.mark.parametrize("key", [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)])
def test_other_kinds_of_keys_do_not_count(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> None:
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    with pytest.raises(KeyFileError, match="neither"):
        parse_public_key(public, "x.pub")


def test_a_root_with_a_key_in_another_form_is_refused(
    tmp_path: Path, officers: Officers, online: Ed25519PrivateKey, now: datetime
) -> None:
    point = ec.generate_private_key(ec.SECP256R1()).public_key()
    raw = init_repository(tmp_path, officers, online.public_key(), now=now, further_officers=[point], threshold=2)
    assert check_root(raw, now)
    for change in (
        {"scheme": "ecdsa-sha2-nistp384"},
        {"keytype": "rsa"},
        # The same point in another text would be a second officer.
        {"keyval": {"public": public_pem(point).decode() + "\n"}},
        {"keyval": {"public": "00" * 32}},
    ):
        document = json.loads(raw)
        document["signed"]["keys"][signing_key(point).keyid] |= change
        assert code_of(lambda document=document: check_root(signed_again(document, officers), now)) == "malformed"


def signed_again(document: object, officers: Officers) -> bytes:
    root = parse(Root, json.dumps(document).encode(), "root.json")
    root.signatures.clear()
    return sign_metadata(root, officers)


@given(st.binary(max_size=200), st.binary(max_size=80))
def test_no_made_up_signature_holds(data: bytes, signature: bytes) -> None:
    point = POINT.public_key()
    assert not signature_holds(point, signature, data)
    assert signature_holds(point, POINT.sign(data, ec.ECDSA(hashes.SHA256())), data)


POINT = ec.generate_private_key(ec.SECP256R1())


def test_the_command_signs_with_a_program(tmp_path: Path, program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    path = program(ec.generate_private_key(ec.SECP256R1()))
    out = str(tmp_path / "b.json")
    arguments = ["policy", "sign", CODING, "--key", f"exec:{path}", "--revision", "1", "--out", out, "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["signatures"] == 1
    path.write_text("#!/bin/sh\nexit 1\n")
    Path(out).unlink()
    assert main(arguments) == 1
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "key_file"
    assert not Path(out).exists()


def test_a_refused_signature_leaves_nothing_behind(tmp_path: Path, program: Program, world: World) -> None:
    broken = CommandSigner(program(Ed25519PrivateKey.generate(), "bytes(64)"))
    assert code_of(lambda: world.staged(world.bundle(1), signers=[broken])) == "key_file"
    assert world.staged(world.bundle(1), signers=[world.officers[0]]).targets
