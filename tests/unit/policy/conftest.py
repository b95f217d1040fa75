"""Keys, bundles and repositories that the policy tests share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from tuf_world import World

from saw.policy.bundle import build_manifest, sign
from saw.policy.keys import key_id
from saw.policy.loader import Bundle, load_bundle_folder
from saw.policy.matcher import Matcher

# gRPC would look into every fork of this process, and write about it to the standard error of whatever test forks.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
ROOT = Path(__file__).parents[3]
CODING = ROOT / "policies" / "coding"


@pytest.fixture(scope="session")
def coding() -> Bundle:
    """The bundle of the demonstration."""
    return load_bundle_folder(CODING)


@pytest.fixture(scope="session")
def matcher(coding: Bundle) -> Matcher:
    """Its matcher."""
    return Matcher.compile(coding.policy, coding.governance)


@pytest.fixture(scope="session")
def officers() -> list[Ed25519PrivateKey]:
    """Three officers' keys, always the same."""
    return [Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32) for number in (1, 2, 3)]


@pytest.fixture(scope="session")
def online() -> Ed25519PrivateKey:
    """The broker's online key."""
    return Ed25519PrivateKey.from_private_bytes(bytes([9]) * 32)


@pytest.fixture(scope="session")
def trusted(officers: list[Ed25519PrivateKey]) -> dict[str, Ed25519PublicKey]:
    """The officers' public keys by id."""
    return {key_id(key.public_key()): key.public_key() for key in officers}


@pytest.fixture
def now() -> datetime:
    """The present; the TUF client reads the clock of the machine, so nothing else will do."""
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def signed(coding: Bundle, officers: list[Ed25519PrivateKey], now: datetime) -> Iterator[Callable[..., bytes]]:
    """Make a signed bundle: ``signed(revision=1, signers=2, start=now, days=30)``."""

    def make(revision: int = 1, signers: int = 2, start: datetime | None = None, days: int = 30) -> bytes:
        begin = start or now
        manifest = build_manifest(coding, revision, begin, begin + timedelta(days=days))
        return sign(manifest, coding.members, officers[:signers])

    yield make


@pytest.fixture
def world(
    tmp_path: Path, coding: Bundle, officers: list[Ed25519PrivateKey], online: Ed25519PrivateKey, now: datetime
) -> World:
    """A repository with its officers, its broker and a client."""
    return World(tmp_path / "world", coding, officers, online, now)
