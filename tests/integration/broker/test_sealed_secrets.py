"""A broker whose own keys are sealed: it starts, serves, signs and starts again; without the key of systemd it does not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from broker_rig import Lab, cli, running_broker

from saw.identity.ssh import parse_public_key
from saw.identity.x509 import new_key_and_csr
from saw.secrets.settings import SealedSettings, SecretsSettings

SEALED = SecretsSettings("sealed", SealedSettings())


@pytest.fixture
def credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which systemd hands the key to the unit."""
    key = tmp_path / "saw-secrets"
    key.write_bytes(os.urandom(32))
    key.chmod(0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    return key


@pytest.fixture
def lab(credentials: Path) -> Iterator[Lab]:
    with running_broker(secrets=SEALED) as lab:
        yield lab


def signed(lab: Lab) -> tuple[str, str]:
    """A certificate of each authority that the broker signs with."""
    with lab.tls("perimeter", "edge") as client:
        assert client.get("/healthz").status_code == 200
    _, csr = new_key_and_csr("edge")
    body = {"csr_pem": csr.decode(), "kind": "perimeter", "name": "edge"}
    x509 = lab.operator.request("POST", "/v1/certificates/x509", body)["certificate"]
    trust = lab.operator.request("GET", "/v1/trust")
    parse_public_key(trust["ssh_user_ca"])
    return x509, trust["ca_pem"]


def begin(lab: Lab) -> subprocess.CompletedProcess[str]:
    """Start it as its unit does, for as long as it takes to refuse."""
    for step in ("init", "serve"):
        command = [sys.executable, "-m", "saw.cli.main", "broker", step, "--config", str(lab.config_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode:
            return done
    raise AssertionError("it served")


def test_it_signs_and_goes_on_after_a_crash_and_nothing_of_it_lies_open(lab: Lab) -> None:
    before = signed(lab)[1]
    lab.workspace("ws-sealed", to="attesting")
    issue = ("delegation", "issue", "ws-sealed", "--task", "tidy up", "--for", "1h", "--resource", "git.example.com")
    first = cli(lab, *issue)
    assert lab.process is not None
    lab.process.send_signal(signal.SIGKILL)
    lab.process.wait(60)
    lab.start()
    assert signed(lab)[1] == before
    again = cli(lab, *issue)
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    verified = cli(lab, "audit", "verify")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    plain = [path.name for path in lab.config.keys.rglob("*") if path.is_file()]
    assert sorted(plain) == ["ca.pem", "tuf-online.pub"]
    raw = b"".join(path.read_bytes() for path in lab.config.state.rglob("*") if path.is_file())
    assert b"PRIVATE KEY" not in raw and b"BEGIN CERTIFICATE" in raw


@pytest.mark.thorough
def test_with_another_key_or_none_it_refuses_and_names_what_is_missing(lab: Lab, credentials: Path) -> None:
    before = signed(lab)[1]
    lab.stop()
    kept = credentials.read_bytes()
    for content, reason in ((bytes(32), "was sealed under another key"), (None, "cannot read the key")):
        credentials.unlink()
        if content is not None:
            credentials.write_bytes(content)
            credentials.chmod(0o400)
        refused = begin(lab)
        assert refused.returncode == 1 and reason in refused.stderr, refused.stderr
        credentials.write_bytes(kept)
    credentials.chmod(0o400)
    lab.start()
    assert signed(lab)[1] == before


@pytest.mark.thorough
def test_an_installation_on_files_moves_when_its_unit_starts_and_serves_as_before(credentials: Path) -> None:
    with running_broker() as lab:
        before = signed(lab)[1]
        lab.stop()
        lab.config = msgspec.structs.replace(lab.config, secrets=SEALED)
        lab.config_file.write_bytes(msgspec.json.encode(lab.config))
        assert "move --to sealed" in begin(lab).stderr, "nothing is moved by itself"
        assert cli(lab, "broker", "secrets", "move", "--to", "sealed", "--config", str(lab.config_file)).returncode == 0
        lab.start()
        assert signed(lab)[1] == before
        refused = cli(
            lab, "broker", "secrets", "put", "tuf-online.key", "--from", "/x", "--config", str(lab.config_file)
        )
        assert (refused.returncode, "a broker serves" in refused.stderr) == (1, True)
        told = [entry["event"]["api"]["operation"] for entry in lab.events() if "api" in entry["event"]]
        assert told.count("secrets.move") == 2
