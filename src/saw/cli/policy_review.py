"""What whoever signs is shown first: the change of reach, computed here against the release in force."""

from __future__ import annotations

import argparse
import sys
from typing import Any, cast

import msgspec

from saw.cli.answers import read_file
from saw.errors import ConfigError
from saw.policy.bundle import Reach, describe
from saw.policy.loader import Bundle
from saw.policy.reach_diff import ReachDiff
from saw.policy.reach_html import table
from saw.policy.tuf_draft import Draft
from saw.policy.tuf_reach import ReachReport, bundle_diff, compare, statement
from saw.policy.tuf_repository import Publication, target_name
from saw.policy.tuf_statements import BaseOf, Change, base_text, copy_of, released, review, stated_first, states_first


def add_base(sub: argparse.ArgumentParser) -> None:
    """Add the options that say which release a bundle follows."""
    sub.add_argument("--base", help="bundle file of the release in force, which the reach is compared with")
    sub.add_argument("--repository", help="officers' copy of the repository, to find the release in force of --ring")
    sub.add_argument("--ring", help="ring that the bundle is for, for example stable")
    sub.add_argument(
        "--first", action="store_true", help="the ring has no release of this blueprint yet: its whole reach is new"
    )


def base_for(options: argparse.Namespace, blueprint: str, *, first: bool) -> bytes | None:
    """Return the bundle file that the signed one follows, None for the first release.

    ``first`` tells that nothing can be in force, without being told so. Raises :class:`ConfigError` when it is not said.
    """
    given = [name for name in ("base", "repository", "first") if getattr(options, name)]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} exclude each other", cure="give one of them")
    if bool(options.repository) != bool(options.ring):
        raise ConfigError(
            "the release in force is found by copy and ring", cure="give --repository and --ring together"
        )
    if options.repository:
        return released(options.repository, target_name(options.ring, blueprint))
    if options.base:
        raw = read_file(options.base)
        other = describe(raw)[1].blueprint
        if other != blueprint:
            raise ConfigError(f"{options.base} is of blueprint {other}, not {blueprint}", cure="name its own release")
        return raw
    if options.first or first:
        return None
    raise ConfigError(
        "it follows another release, and who signs sees what changes",
        cure="give --base RELEASED.bundle.json, or --repository and --ring; --first where the ring has none yet",
    )


def compare_for(options: argparse.Namespace, base: bytes | None, new: Bundle) -> tuple[ReachReport, Reach]:
    """Compute and show what ``new`` changes, and return it with the statement that is signed."""
    report = compare(base, new, bundle_diff())
    show(options, report)
    return report, statement(base, report)


def base_of_signed(options: argparse.Namespace, raw: bytes) -> bytes | None:
    """Return what the signed bundle file ``raw`` is compared with by an officer who adds a signature."""
    return base_for(options, describe(raw)[1].blueprint, first=states_first(raw))


def review_for(options: argparse.Namespace, what: Publication | Draft) -> tuple[Change, ...]:
    """Compute and show what a publication or a change under way does to each ring; raise unless it states exactly that."""
    publication = what.publication if isinstance(what, Draft) else what
    changes = review(publication, _bases(options, publication), bundle_diff())
    for change in changes:
        show(options, change.report, change.path)
    return changes


def _bases(options: argparse.Namespace, publication: Publication) -> BaseOf:
    if options.repository:
        return copy_of(options.repository)
    base = getattr(options, "base", None)
    if base:
        raw = read_file(base)
        return lambda _path: raw
    return stated_first(publication)


def show(options: argparse.Namespace, report: ReachReport, path: str = "") -> None:
    """Print the diff for people at once, so that it is read before a signing program asks for a PIN."""
    if not options.json:
        sys.stdout.write((f"{path}\n" if path else "") + table(cast(ReachDiff, report)) + "\n\n")
        sys.stdout.flush()


def told(report: ReachReport, reach: Reach) -> dict[str, Any]:
    """Return what ``--json`` says of a change of reach."""
    return {"reach": msgspec.to_builtins(reach), "diff": cast(ReachDiff, report).to_builtins()}


def told_all(changes: tuple[Change, ...]) -> list[dict[str, Any]]:
    """Return what ``--json`` says of every change of a publication."""
    return [{"target": one.path, **told(one.report, one.reach)} for one in changes]


def line(reach: Reach) -> str:
    """Return what is signed of the reach, in one line."""
    kind = "WIDENS the reach" if reach.widening else "does not widen the reach"
    return f"{kind} of {base_text(reach.base_digest)}; signed diff {reach.diff_digest}"
