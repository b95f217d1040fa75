"""What the VM was told at creation: laid out when good, refused with every wrong field when not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from saw.errors import ConfigError
from saw.identity.x509 import Authority
from saw.runtime.bootstrap import bootstrap, credential_path


@pytest.fixture(scope="module")
def seed(tmp_path_factory):
    authority = Authority.create(tmp_path_factory.mktemp("ca") / "x509", "saw.example", datetime.now(UTC))
    return {
        "workspace_id": "ws-demo",
        "number": 1,
        "trust_domain": "saw.example",
        "broker_url": "https://10.210.1.1:8444",
        "broker_name": "broker.saw.internal",
        "ring2": "10.210.1.1:8443",
        "ring2_name": "ring2.saw.internal",
        "ca_pem": authority.ca_pem.decode(),
        "tuf_root": {"signed": {"_type": "root"}, "signatures": []},
        "blueprint": "coding",
        "ring": "stable",
    }


def test_a_good_seed_is_laid_out_for_every_component(seed, tmp_path) -> None:
    (tmp_path / "saw.workspace").write_text(json.dumps(seed))
    source = credential_path({"CREDENTIALS_DIRECTORY": str(tmp_path)})
    written = bootstrap(source, tmp_path / "run")
    assert [path.name for path in written] == ["ca.pem", "workspace.json"]
    assert json.loads((tmp_path / "run" / "workspace.json").read_text()) == seed
    assert (tmp_path / "run" / "ca.pem").read_text() == seed["ca_pem"]
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in written)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("workspace_id", "../etc"),
        ("number", 64_001),
        ("trust_domain", "other.example"),
        ("broker_url", "http://10.210.1.1:8444"),
        ("broker_url", "https://user@10.210.1.1:8444"),
        ("broker_url", "https://broker.example:8444"),
        ("ring2", "10.210.1.1"),
        ("ring2_name", "Ring Two"),
        ("ca_pem", "nothing"),
        ("tuf_root", {"signed": {"_type": "targets"}}),
        ("extra", 1),
    ],
)
def test_a_wrong_field_is_refused_and_nothing_is_written(seed, tmp_path, field, value) -> None:
    source = tmp_path / "seed.json"
    source.write_text(json.dumps({**seed, field: value}))
    with pytest.raises(ConfigError, match=r"not valid"):
        bootstrap(source, tmp_path / "run")
    assert not Path(tmp_path / "run").exists()


def test_without_a_credential_the_cure_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="credentials directory"):
        credential_path({})
    with pytest.raises(ConfigError, match="cannot read"):
        bootstrap(tmp_path / "absent", tmp_path)
