"""The recovery key is for whoever has the operator's private key, and for one volume."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from saw.cli import data_disk as cli
from saw.datadisk import recovery
from saw.datadisk.errors import DataDiskError
from saw.errors import ConfigError

KEY = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return recovery.make_keys(tmp_path_factory.mktemp("keys") / "folder", "disks")


def test_what_was_sealed_is_opened_with_the_private_key_alone(keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    escrow = recovery.Escrow("u-1", recovery.seal(KEY, "u-1", public.read_text()))
    assert recovery.unseal(escrow, private.read_bytes()) == KEY
    assert KEY not in msgspec.json.encode(escrow).decode()
    other, _ = recovery.make_keys(tmp_path, "other")
    with pytest.raises(DataDiskError, match="sealed for another key"):
        recovery.unseal(escrow, other.read_bytes())


def test_a_token_of_another_volume_or_a_changed_one_is_refused(keys: tuple[Path, Path]) -> None:
    private, public = keys
    token = recovery.seal(KEY, "u-1", public.read_text())
    spoilt = msgspec.structs.replace(
        token, sealed="A" + token.sealed[1:] if token.sealed[0] != "A" else "B" + token.sealed[1:]
    )
    for escrow in (recovery.Escrow("u-2", token), recovery.Escrow("u-1", spoilt)):
        with pytest.raises(DataDiskError, match="damaged or of another volume"):
            recovery.unseal(escrow, private.read_bytes())


def test_keys_are_private_and_never_overwritten(keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes()
    with pytest.raises(ConfigError, match="is there already"):
        recovery.make_keys(private.parent, "disks")
    assert private.read_bytes() == before
    assert recovery.load_public(public.read_text()).key_size == 4096


def pem_of(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, form).decode()


def test_other_kinds_of_keys_are_refused(keys: tuple[Path, Path]) -> None:
    small = pem_of(rsa.generate_private_key(public_exponent=65537, key_size=2048))
    for pem in ("", "no key", keys[0].read_text(), small, pem_of(ec.generate_private_key(ec.SECP256R1()))):
        with pytest.raises(ConfigError, match="recovery key of the data disk is no"):
            recovery.load_public(pem)


def test_the_escrow_is_the_token_in_the_header(keys: tuple[Path, Path]) -> None:
    token = recovery.seal(KEY, "u-1", keys[1].read_text())
    plain = msgspec.to_builtins(token)
    assert recovery.escrow_of("u-1", {"0": {"type": "systemd-tpm2"}, "1": plain}) == recovery.Escrow("u-1", token)
    with pytest.raises(DataDiskError, match="no recovery token"):
        recovery.escrow_of("u-1", {"0": {"type": "systemd-tpm2"}})
    with pytest.raises(DataDiskError, match="not valid"):
        recovery.escrow_of("u-1", {"0": {**plain, "more": 1}})


def test_the_command_prints_the_key_and_nothing_else_but_a_lines_end_for_a_person(
    keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "escrow"
    file.write_bytes(msgspec.json.encode(recovery.Escrow("u", recovery.seal(KEY, "u", keys[1].read_text()))))
    assert cli.main(["recovery-key", "--escrow", str(file), "--key", str(keys[0])]) == 0
    assert capsys.readouterr().out == KEY
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.main(["recovery-key", "--escrow", str(file), "--key", str(keys[0])]) == 0
    assert capsys.readouterr().out == KEY + "\n"
    file.write_text('{"uuid": "u"}')
    with pytest.raises(ConfigError, match="escrow is not valid"):
        cli.main(["recovery-key", "--escrow", str(file), "--key", str(keys[0])])
    with pytest.raises(ConfigError, match="cannot read"):
        cli.main(["recovery-key", "--escrow", str(file), "--key", str(tmp_path / "none")])
