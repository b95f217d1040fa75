"""The signed diff of reach: what signers state about a release must be what the repository computes for itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast

from saw.policy.bundle import Reach, VerifiedBundle, describe, read_content
from saw.policy.errors import RepositoryError
from saw.policy.loader import Bundle


class ReachReport(Protocol):
    """The diff of reach between two bundles: its digest (hexadecimal SHA-256), and whether anything is newly allowed."""

    @property
    def digest(self) -> str:
        """Return the digest of the diff."""
        ...

    @property
    def widening(self) -> bool:
        """Tell whether the new bundle allows anything that the old one does not."""
        ...


ReachDiff = Callable[[Bundle, Bundle], ReachReport]
"""Compares the old with the new bundle."""


def bundle_diff() -> ReachDiff:
    """Return the comparison of this distribution; raise :class:`RepositoryError` when it is not part of it."""
    try:
        module = importlib.import_module("saw.policy.reach_diff")
    except ModuleNotFoundError as error:
        raise RepositoryError("unsupported", "reach cannot be compared here", cure="install a full release") from error
    return cast(ReachDiff, module.diff_bundles)


def reach_between(base: bytes, new: Bundle, diff: ReachDiff) -> Reach:
    """Return the statement that signers of ``new`` make against the released bundle file ``base``."""
    report = diff(read_content(base), new)
    return Reach(describe(base)[0], report.digest, report.widening)


def check_reach(path: str, base: bytes, bundle: VerifiedBundle, stated: Reach | None, diff: ReachDiff) -> None:
    """Raise ``unsigned_widening`` unless the signers of ``bundle``, or of its release, saw exactly this change of reach.

    ``base`` is the bundle file that the ring releases now. The statement is the manifest's, or ``stated`` when the bundle
    was made for another ring with another base and the officers of this ring signed theirs in the targets metadata.
    """
    computed = reach_between(base, Bundle(bundle.members, bundle.policy, bundle.governance), diff)
    if computed in (bundle.reach, stated):
        return
    what = "it widens the reach" if computed.widening else "it changes or renews the reach"
    known = "another diff was signed" if bundle.reach or stated else "no diff was signed"
    raise RepositoryError(
        "unsigned_widening",
        f"{path}: {what} of the release in force and {known}",
        cure="compare with the release in force, let officers see the diff, and sign with its digest",
        details={
            "base_digest": computed.base_digest,
            "diff_digest": computed.diff_digest,
            "widening": computed.widening,
        },
    )
