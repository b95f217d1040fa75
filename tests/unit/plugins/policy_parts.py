"""Policies, keys and roots that the tests of the policy plugins share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.policy.keys import create_key, key_id
from saw.policy.tuf_repository import init_repository

POLICY = """\
version: 1
network_policies:
  git:
    name: git
    endpoints:
      - {host: git.example.com, port: 443, protocol: rest, access: ACCESS}
    binaries:
      - {path: "/usr/bin/**"}
"""
GOVERNANCE = """\
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: platform}
lease: {ttl: 90s}
actions:
  - {match: {host: git.example.com}, class: auto}
"""
CASES = """\
schema: 1
cases:
  - name: reading is allowed
    request: {url: "https://git.example.com/x", binary: /usr/bin/git}
    expect: {verdict: allow}
"""


def write_bundle(folder: Path, access: str = "read-only", cases: str = CASES) -> str:
    """A small bundle folder; ``read-write`` reaches more than ``read-only``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "policy.yaml").write_text(POLICY.replace("ACCESS", access))
    (folder / "governance.yaml").write_text(GOVERNANCE)
    (folder / "tests.yaml").write_text(cases)
    return str(folder)


class Officers:
    """Three officers with key files, two of whom must sign, and the root that says so."""

    def __init__(self, base: Path) -> None:
        self.directory = base / "keys"
        self.private = {name: create_key(self.directory, name) for name in ("ada", "ben", "cleo")}
        online = Ed25519PrivateKey.generate().public_key()
        init_repository(base / "copy", [*self.private.values()], online, 2, now=datetime.now(UTC))
        self.root = str(base / "copy/metadata/1.root.json")

    def keys(self, *names: str) -> list[str]:
        """The key files of these officers."""
        return [str(self.directory / f"{name}.key") for name in names]

    def ids(self, *names: str) -> list[str]:
        """Their key ids, sorted."""
        return sorted(key_id(self.private[name].public_key()) for name in names)


def documented(module: object) -> Callable[[dict[str, object]], None]:
    """Return a check that a result holds everything that the module says it always returns, in the types it says."""
    kinds = {"str": str, "int": int, "bool": bool, "dict": dict, "list": list}
    promised = {
        name: kinds[entry["type"]]
        for name, entry in yaml.safe_load(module.RETURN).items()  # type: ignore[attr-defined]
        if entry["returned"] in {"success", "always"}
    }

    def check(result: dict[str, object]) -> None:
        for name, kind in promised.items():
            assert isinstance(result[name], kind), name

    return check


@pytest.fixture
def officers(tmp_path: Path) -> Officers:
    return Officers(tmp_path)
