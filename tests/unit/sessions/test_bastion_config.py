"""The configuration of a bastion: what the page shows loads, and what is wrong is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from saw.broker.client import load_context
from saw.errors import ConfigError
from saw.sessions.config import BastionConfig, load_config

ROOT = Path(__file__).resolve().parents[3]
SHOWN: dict[str, Any] = json.loads(
    "{" + re.findall(r'`("ingress": \{[^`]+\})`', (ROOT / "docs/scale.md").read_text("utf-8"))[0] + "}"
)


def written(tmp_path: Path, **fields: Any) -> Path:
    path = tmp_path / "bastion.json"
    files = {"ca_file": "/ca", "cert_file": "/cert", "key_file": "/key"}
    path.write_text(json.dumps({"broker_url": "https://192.0.2.1:8443", **files, **fields}))
    return path


def loaded(tmp_path: Path, **fields: Any) -> BastionConfig:
    return load_config(written(tmp_path, **fields))


def test_the_ingress_that_the_page_shows_loads_in_both_files_and_names_the_same_ports(tmp_path: Path) -> None:
    bastion = loaded(tmp_path, **SHOWN)
    context = tmp_path / "context.json"
    context.write_text(json.dumps(SHOWN))
    ingress = load_context(str(context)).ingress
    for number, place in ((1, ("192.0.2.7", 22001)), (10_001, ("192.0.2.8", 22001))):
        assert bastion.address(number) == place
        assert ingress.of(number) == place


def test_without_an_ingress_a_bastion_goes_to_the_vm_itself(tmp_path: Path) -> None:
    assert loaded(tmp_path).address(251) == ("10.210.1.6", 22)


@pytest.mark.parametrize(
    ("ingress", "words"),
    [
        ({"base_port": 22000}, "host"),
        ({"host": "edge"}, "ingress.host"),
        ({"host": "192.0.2.7", "base_port": 80}, "ingress.base_port"),
        ({"host": "192.0.2.7", "blocks": {"7": "192.0.2.8"}}, "ingress.blocks"),
    ],
)
def test_an_ingress_that_cannot_be_is_refused_by_its_field(tmp_path: Path, ingress: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        loaded(tmp_path, ingress=ingress)
