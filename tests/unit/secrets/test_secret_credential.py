"""The key of sealed secrets: handed over by systemd, made with the real ``systemd-creds``, refused when others may read it."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest

from saw.cli.broker import main
from saw.errors import ConfigError, SawError
from saw.secrets.credential import handed_over, make_credential, read_key
from saw.secrets.settings import SecretsSettings, open_store
from saw.secrets.store import SecretError

PROGRAM = shutil.which("systemd-creds")
KEY = bytes(range(32))
WRONG = 'if [ "$1" = encrypt ]; then cat >"$5"; else echo another; fi'


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A secret of the host of this test's own, so that the machine's is neither used nor made."""
    if PROGRAM is None or os.geteuid() != 0:
        pytest.skip("needs root and systemd-creds of systemd 250 or later")
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(tmp_path / "host.secret"))
    return tmp_path


def opened(out: Path, name: str = "saw-secrets") -> bytes | None:
    """What systemd hands over to the unit; None when it refuses."""
    import subprocess

    command = [PROGRAM or "", "decrypt", f"--name={name}", str(out), "-"]
    done = subprocess.run(command, capture_output=True, check=False)
    return done.stdout if done.returncode == 0 else None


def test_the_key_is_made_once_and_opens_on_this_host_under_its_name_alone(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = host / "credstore/saw-secrets"
    assert make_credential(out, "saw-secrets", "host", random=lambda size: KEY[:size])
    assert (stat.S_IMODE(out.stat().st_mode), stat.S_IMODE(out.parent.stat().st_mode)) == (0o600, 0o700)
    first = out.read_bytes()
    assert KEY not in first and [path.name for path in out.parent.iterdir()] == [out.name]
    assert not make_credential(out, "saw-secrets", "host", random=os.urandom), "a second time nothing is done"
    assert out.read_bytes() == first
    assert (opened(out), opened(out, "another")) == (KEY, None)
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(host / "another.secret"))
    assert opened(out) is None, "on another host it opens nothing"


def test_a_recovery_copy_brings_the_same_key_to_another_host(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other, copy = host / "one", host / "other", host / "copy"
    assert make_credential(one, "saw-secrets", "host", random=os.urandom, recovery=copy)
    assert (opened(one), stat.S_IMODE(copy.stat().st_mode)) == (copy.read_bytes(), 0o600)
    monkeypatch.setenv("SYSTEMD_CREDENTIAL_SECRET", str(host / "another.secret"))
    assert make_credential(other, "saw-secrets", "host", random=os.urandom, given=copy)
    assert opened(other) == copy.read_bytes()
    with pytest.raises(SecretError, match="copy is there already"):
        make_credential(host / "third", "saw-secrets", "host", random=os.urandom, recovery=copy)
    copy.write_bytes(b"short")
    with pytest.raises(ConfigError, match="not a key of 32 bytes"):
        make_credential(host / "third", "saw-secrets", "host", random=os.urandom, given=copy)
    assert not (host / "third").exists()


def test_the_command_makes_a_key_that_a_broker_opens_its_secrets_with(
    host: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, credentials = host / "credstore/saw-secrets", host / "credentials"
    command = ["secrets", "key", "--out", str(out), "--with-key", "host", "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "changed": True}
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["changed"] is False
    credentials.mkdir()
    (credentials / "saw-secrets").write_bytes(opened(out) or b"")
    (credentials / "saw-secrets").chmod(0o400)
    places = {"files": host / "keys", "sealed": host / "sealed"}
    for _ in range(2):
        store = open_store(
            SecretsSettings("sealed"), "sealed", places, environ={"CREDENTIALS_DIRECTORY": str(credentials)}
        )
        store.write("server.pem", b"value")
        assert store.read("server.pem") == b"value"


@pytest.mark.parametrize("script", ["exit 1", "cat >/dev/null; echo no TPM >&2; exit 1", "cat >/dev/null", WRONG, None])
def test_a_program_that_fails_leaves_no_credential(tmp_path: Path, script: str | None) -> None:
    program = tmp_path / "systemd-creds"
    if script is not None:
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    out, copy = tmp_path / "store/saw-secrets", tmp_path / "copy"
    with pytest.raises((SawError, OSError)):
        make_credential(
            out, "saw-secrets", "auto", random=lambda size: KEY[:size], recovery=copy, program=[str(program)]
        )
    assert list(out.parent.iterdir()) == [] and not copy.exists()
    # the twin: one that gives back what it was given
    program.write_text('#!/bin/sh\nif [ "$1" = encrypt ]; then cat >"$5"; else cat "$3"; fi\n')
    program.chmod(0o755)
    assert make_credential(
        out, "saw-secrets", "auto", random=lambda size: KEY[:size], recovery=copy, program=[str(program)]
    )
    assert copy.read_bytes() == KEY


def test_a_key_is_taken_from_whoever_may_hand_it_over(tmp_path: Path) -> None:
    key = tmp_path / "saw-secrets"
    key.write_bytes(KEY)
    for mode in (0o400, 0o600, 0o440):
        key.chmod(mode)
        assert handed_over("saw-secrets", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == KEY
    for mode in (0o404, 0o420, 0o401):
        key.chmod(mode)
        with pytest.raises(ConfigError, match="open to others"):
            read_key(key)
    with pytest.raises(ConfigError, match=r"no credential saw-secrets .*LoadCredentialEncrypted=saw-secrets:FILE"):
        handed_over("saw-secrets", {})
    with pytest.raises(ConfigError, match="cannot read the key"):
        handed_over("another", {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    for name in ("../saw-secrets", "", "a/b", ".a"):
        with pytest.raises(ConfigError, match="not the name of a credential"):
            make_credential(tmp_path / "out", name, "host", random=os.urandom)
