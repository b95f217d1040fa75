"""The signing programs of docs/policy-release.md, run as they are written there: with a TPM and with a PKCS#11 token."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.policy.bundle import build_manifest, sign, verify_bundle
from saw.policy.errors import KeyFileError
from saw.policy.keys import key_id, key_kind
from saw.policy.loader import Bundle
from saw.policy.signers import Signer, open_signer, signature_of

pytestmark = pytest.mark.control("POL-01")
PAGE = Path(__file__).parents[3] / "docs" / "policy-release.md"
TPM_TOOLS = all(map(shutil.which, ("swtpm", "tpm2_sign")))
TOKEN_LIBRARY = next(
    (
        path
        for path in (os.environ.get("SOFTHSM2_LIBRARY", ""), "/usr/lib/softhsm/libsofthsm2.so")
        if Path(path).is_file()
    ),
    "",
)
TOKEN_TOOLS = all(map(shutil.which, ("pkcs11-tool", "openssl"))) and TOKEN_LIBRARY


def block(name: str) -> str:
    """The block of the page that carries ``# name``."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(text for text in blocks if f"# {name}\n" in text)


def installed(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text(block(name))
    path.chmod(0o755)
    return path


def proves(signer: Signer, coding: Bundle, now: datetime) -> None:
    """Bundle and counter-check: the device and a file key sign; the device's signature is its own and of exactly this."""
    assert key_kind(signer.public_key()) == "ecdsa-p256"
    other = Ed25519PrivateKey.generate()
    manifest = build_manifest(coding, 1, now, now + timedelta(days=1))
    keys = {key_id(one.public_key()): one.public_key() for one in (signer, other)}
    raw = sign(manifest, coding.members, [signer, other])
    assert len(verify_bundle(raw, keys, 2, now).signers) == 2
    assert signature_of(signer, b"x" * 100_000) != signature_of(signer, b"y")


@pytest.fixture
def tpm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A TPM in software with a fresh state, which the tools find in their environment."""
    state, place = tmp_path / "tpm", tmp_path / "tpm.sock"
    state.mkdir()
    process = subprocess.Popen(
        [
            *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}"),
            *("--server", f"type=unixio,path={place}", "--ctrl", f"type=unixio,path={place}.ctrl"),
            *("--flags", "not-need-init,startup-clear"),
        ],
        stderr=subprocess.DEVNULL,
    )
    try:
        monkeypatch.setenv("TPM2TOOLS_TCTI", f"swtpm:path={place}")
        deadline = time.monotonic() + 20
        while not (place.exists() and Path(f"{place}.ctrl").exists()):
            assert process.poll() is None and time.monotonic() < deadline, "swtpm did not start"
        yield
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.skipif(not TPM_TOOLS, reason="needs swtpm and tpm2-tools")
def test_an_officers_key_in_a_tpm(tpm: None, tmp_path: Path, coding: Bundle, now: datetime) -> None:
    program = installed(tmp_path, "tpm-signer")
    with pytest.raises(KeyFileError, match="failed with exit code"):
        open_signer(f"exec:{program}")
    subprocess.run(["sh", "-eu", "-c", block("tpm-key")], cwd=tmp_path, check=True, timeout=60)
    proves(open_signer(f"exec:{program}"), coding, now)


@pytest.mark.skipif(not TOKEN_TOOLS, reason="needs opensc, the library of softhsm2, and openssl")
def test_an_officers_key_in_a_token(
    tmp_path: Path, coding: Bundle, now: datetime, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("PKCS11_MODULE", TOKEN_LIBRARY)
    monkeypatch.setenv("OFFICER_PIN", "1234")
    tool = ("pkcs11-tool", "--module", TOKEN_LIBRARY)
    login = ("--login", "--pin", "1234")
    for step in (
        ("--init-token", "--slot-index", "0", "--label", "t", "--so-pin", "5678"),
        ("--init-pin", "--login", "--login-type", "so", "--so-pin", "5678", "--new-pin", "1234"),
        (*login, "--keypairgen", "--key-type", "EC:prime256v1", "--label", "officer"),
    ):
        subprocess.run([*tool, *step], check=True, capture_output=True, timeout=60)
    program = installed(tmp_path, "token-signer")
    proves(open_signer(f"exec:{program}"), coding, now)
    monkeypatch.setenv("OFFICER_PIN", "9999")
    with pytest.raises(KeyFileError, match="failed with exit code"):
        signature_of(open_signer(f"exec:{program}"), b"data")
