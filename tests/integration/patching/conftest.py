"""A scratch host for each test; the key and the packages are made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from patching_rig import ACME, SECURITY, Host, Signer, package

NAMES = ("plain", "other", "kept")


@pytest.fixture(scope="session")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Signer]:
    """The key of the archive."""
    made = Signer(tmp_path_factory.mktemp("signer") / "gpg")
    yield made
    made.close()


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Three packages in two versions, by name and version."""
    folder = tmp_path_factory.mktemp("packages")
    return {(name, version): package(folder, name, version) for name in NAMES for version in ("1", "2")}


@pytest.fixture
def make_host(tmp_path: Path, signer: Signer, packages: dict[tuple[str, str], Path]) -> Iterator[Callable[[str], Host]]:
    """Make hosts with old versions. The security archive has newer ones of ``plain`` and ``kept``, a vendor's of ``other``."""
    hosts: list[Host] = []

    def make(name: str) -> Host:
        made = Host(tmp_path / name, signer)
        hosts.append(made)
        made.install(*(packages[name, "1"] for name in NAMES))
        for one in ("plain", "kept"):
            made.publish("security", SECURITY, packages[one, "2"])
        made.publish("acme", ACME, packages["other", "2"])
        return made

    yield make
    for one in hosts:
        one.close()


@pytest.fixture
def host(make_host: Callable[[str], Host]) -> Host:
    """One of them."""
    return make_host("host")
