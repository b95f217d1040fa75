"""Releases: signed bundles, verified here against the pinned TUF root, compiled once and judged by afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from saw.errors import ConfigError
from saw.gateway.credentials import header_names
from saw.gateway.errors import CredentialUnavailable, StateRefused
from saw.gateway.state import PerimeterState, decode_release
from saw.policy.bundle import verify_bundle
from saw.policy.errors import BundleRefused
from saw.policy.governance import Governance
from saw.policy.matcher import Matcher
from saw.policy.tuf_repository import trusted_policy_keys


class Release(msgspec.Struct, frozen=True):
    """A verified release: what it decides by, and until when (``not_after``) its signature counts."""

    digest: str
    revision: int
    blueprint: str
    not_after: datetime
    governance: Governance
    matcher: Matcher

    def credential_headers(self) -> frozenset[str]:
        """Return the lower-case names of the headers that this release's credentials set."""
        names: set[str] = set()
        for credential in self.governance.credentials:
            try:
                names |= header_names(credential)
            except CredentialUnavailable:
                continue
        return frozenset(names)


class TrustRoot(msgspec.Struct, frozen=True):
    """The keys that sign policy and how many of them must, out of the pinned TUF root."""

    keys: dict[str, Ed25519PublicKey]
    threshold: int

    @classmethod
    def load(cls, path: Path) -> TrustRoot:
        """Read the pinned ``root.json``; raise :class:`ConfigError` when it cannot be used."""
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}", cure="install the trusted TUF root") from error
        keys, threshold = trusted_policy_keys(raw)
        return cls(dict(keys), threshold)


def verify_release(digest: str, raw: bytes, root: TrustRoot, now: datetime) -> Release:
    """Verify one bundle and compile it; raise ``BundleRefused`` or, when it is not the digest stated, ``StateRefused``."""
    verified = verify_bundle(raw, root.keys, root.threshold, now)
    if verified.digest != digest:
        raise StateRefused(f"release {digest} is in truth {verified.digest}", cure="repair the policy store")
    return Release(
        digest=verified.digest,
        revision=verified.revision,
        blueprint=verified.blueprint,
        not_after=verified.not_after,
        governance=verified.governance,
        matcher=Matcher.compile(verified.policy, verified.governance),
    )


def verify_releases(
    state: PerimeterState, known: Mapping[str, Release], root: TrustRoot, now: datetime
) -> tuple[dict[str, Release], dict[str, str]]:
    """Return the verified releases of ``state`` (those of ``known`` are not verified twice) and why others were refused."""
    releases: dict[str, Release] = {}
    refused: dict[str, str] = {}
    for digest, text in state.releases.items():
        if digest in known:
            releases[digest] = known[digest]
            continue
        try:
            releases[digest] = verify_release(digest, decode_release(text), root, now)
        except (BundleRefused, StateRefused) as error:
            refused[digest] = f"{error.code}: {error.message}"
    return releases, refused
