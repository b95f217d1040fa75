"""What the policy agent takes out of a bundle: its digest and revision before it is verified, a generation's content after."""

from __future__ import annotations

from saw.policy.bundle import VerifiedBundle, describe
from saw.policy.errors import BundleRefused
from saw.policy.matcher import Matcher
from saw.runtime.generation import Content


def digest_of(raw: bytes) -> str:
    """Return the digest of a bundle file, empty when it is none; verifies nothing."""
    try:
        return describe(raw)[0]
    except BundleRefused:
        return ""


def revision_of(raw: bytes) -> int:
    """Return the revision that a bundle file states, 0 when it is none; verifies nothing."""
    try:
        return describe(raw)[1].revision
    except BundleRefused:
        return 0


def content_of(verified: VerifiedBundle) -> Content:
    """Return what a generation is compiled from."""
    return Content(
        digest=verified.digest,
        revision=verified.revision,
        blueprint=verified.blueprint,
        manifest=verified.manifest,
        members=verified.members,
        matcher=Matcher.compile(verified.policy, verified.governance),
    )
