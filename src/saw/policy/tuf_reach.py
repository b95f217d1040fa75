"""The signed diff of reach: what signers state about a release must be what the repository computes for itself.

A release is compared with the one in force in its ring and blueprint. The first one there is compared with a bundle that
allows nothing, so its whole reach counts as new.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Protocol, cast

from msgspec.structs import replace

from saw.policy.bundle import Reach, describe, read_content
from saw.policy.errors import BundleRefused, RepositoryError
from saw.policy.governance import Governance
from saw.policy.loader import Bundle
from saw.policy.model import FilesystemPolicy, Policy
from saw.policy.reach_automata import TooLarge

NOTHING = "0" * 64
"""Stands for the digest of the release before, where there is none."""


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


def nothing_like(bundle: Bundle) -> Bundle:
    """Return a bundle of the same blueprint that allows nothing: what a first release is compared with."""
    policy, governance = bundle.policy, bundle.governance
    closed = FilesystemPolicy(include_workdir=False)
    return Bundle(
        {},
        Policy(version=1, filesystem_policy=closed, landlock=policy.landlock, process=policy.process),
        Governance(
            schema=1,
            blueprint=replace(governance.blueprint, version="0.0.0"),
            lease=governance.lease,
            landlock=governance.landlock,
        ),
    )


def compare(base: bytes | None, new: Bundle, diff: ReachDiff) -> ReachReport:
    """Return the diff of reach of ``new`` against the released bundle file ``base``, or against nothing.

    A release that this version no longer loads counts as one that allows nothing. Raises :class:`RepositoryError`
    (``reach_undecided``) when the two cannot be compared within bounds.
    """
    old = nothing_like(new)
    if base is not None:
        try:
            old = read_content(base)
        except BundleRefused as error:
            if error.code != "policy_invalid":
                raise
    try:
        return diff(old, new)
    except (TooLarge, RecursionError, MemoryError) as error:
        reason = "the change of reach cannot be told within the bounds of the comparison"
        cure = "release the change in smaller steps, or write its patterns more simply"
        raise RepositoryError("reach_undecided", reason, cure=cure) from error


def statement(base: bytes | None, report: ReachReport) -> Reach:
    """Return what signers state who saw ``report``, the comparison with ``base``."""
    return Reach(NOTHING if base is None else describe(base)[0], report.digest, report.widening)


def reach_between(base: bytes | None, new: Bundle, diff: ReachDiff) -> Reach:
    """Return the statement that signers of ``new`` make against the released bundle file ``base`` (None: there is none)."""
    return statement(base, compare(base, new, diff))


def check_reach(path: str, base: bytes | None, new: Bundle, stated: Iterable[Reach | None], diff: ReachDiff) -> None:
    """Raise ``unsigned_widening`` unless the signers of ``new``, or of its release, saw exactly this change of reach.

    ``base`` is the bundle file that the ring releases now, None before its first. ``stated`` are the manifest's statement
    and the one in the targets metadata, which the officers of a ring make when the bundle was signed against another base.
    """
    check_statement(path, reach_between(base, new, diff), stated)


def check_statement(path: str, computed: Reach, stated: Iterable[Reach | None]) -> None:
    """Raise ``unsigned_widening`` unless ``computed`` is among what was ``stated`` about the release of ``path``."""
    statements = [one for one in stated if one is not None]
    if computed in statements:
        return
    what = "it widens the reach" if computed.widening else "it changes or renews the reach"
    than = "nothing, as the first release here" if computed.base_digest == NOTHING else "the release in force"
    known = "another diff was signed" if statements else "no diff was signed"
    raise RepositoryError(
        "unsigned_widening",
        f"{path}: {what} of {than}, and {known}",
        cure="let officers see the diff: saw policy sign --base RELEASED.bundle.json, or saw policy stage for this ring",
        details={
            "base_digest": computed.base_digest,
            "diff_digest": computed.diff_digest,
            "widening": computed.widening,
        },
    )
