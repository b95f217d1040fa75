"""What a publication does to the reach of each ring, computed against one's own copy: before one signs, before it is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from saw.policy.bundle import Reach, describe, read_content
from saw.policy.errors import BundleRefused, RepositoryError
from saw.policy.tuf_metadata import TargetFile, Targets, parse
from saw.policy.tuf_reach import NOTHING, ReachDiff, ReachReport, check_statement, compare, statement
from saw.policy.tuf_repository import Publication
from saw.policy.tuf_store import current_files, read_target, stated_reach

BaseOf = Callable[[str], bytes | None]
"""Gives the bundle file that a target path releases now, None when it releases nothing yet."""


class Change(msgspec.Struct, frozen=True):
    """One release that a publication makes: its target path, the diff of reach, and the statement that signers make of it."""

    path: str
    report: ReachReport
    reach: Reach


def released(directory: Path | str, path: str) -> bytes | None:
    """Return the bundle file that the copy in ``directory`` releases under ``path``, None when there is none."""
    return read_target(directory, path) if path in current_files(directory) else None


def copy_of(directory: Path | str) -> BaseOf:
    """Return the releases of the copy in ``directory``."""
    return lambda path: released(directory, path)


def state_reach(directory: Path | str, path: str, raw: bytes, diff: ReachDiff) -> tuple[Change, Reach | None]:
    """Return what ``raw`` changes under ``path``, and the statement that its release needs beside the manifest's, if any."""
    base = released(directory, path)
    report = compare(base, read_content(raw), diff)
    reach = statement(base, report)
    return Change(path, report, reach), None if describe(raw)[1].reach == reach else reach


def statements(metadata: Mapping[str, bytes], path: str, raw: bytes) -> tuple[Reach | None, Reach | None]:
    """Return what the manifest of the bundle ``raw`` and the metadata that releases it as ``path`` state about its reach."""
    file = _entries(metadata).get(path)
    return describe(raw)[1].reach, stated_reach(path, file) if file is not None else None


def _entries(metadata: Mapping[str, bytes]) -> dict[str, TargetFile]:
    found: dict[str, TargetFile] = {}
    for name in sorted(metadata, key=lambda name: name != "targets.json"):
        if not name.endswith("root.json"):
            found |= parse(Targets, metadata[name], name).signed.targets
    return found


def review(publication: Publication, base_of: BaseOf, diff: ReachDiff) -> tuple[Change, ...]:
    """Return every change of reach that ``publication`` makes; raise ``unsigned_widening`` where it states another one.

    A release whose digest is that of the one in force is only signed anew, and changes nothing.
    """
    found: list[Change] = []
    for path, raw in sorted(publication.targets.items()):
        base = base_of(path)
        if base is not None and describe(base)[0] == describe(raw)[0]:
            continue
        report = compare(base, read_content(raw), diff)
        reach = statement(base, report)
        check_statement(path, reach, statements(publication.metadata, path, raw))
        found.append(Change(path, report, reach))
    return tuple(found)


def stated_first(publication: Publication) -> BaseOf:
    """Return the bases of somebody who has no copy: nothing where a first release is stated, else a refusal."""

    def base_of(path: str) -> bytes | None:
        stated = statements(publication.metadata, path, publication.targets[path])
        if any(one is not None and one.base_digest == NOTHING for one in stated):
            return None
        raise RepositoryError(
            "base_missing",
            f"{path} follows another release, and who signs compares it with that one",
            cure="give --repository with your copy, or --base with the bundle file of the release in force",
        )

    return base_of


def states_first(raw: bytes) -> bool:
    """Tell whether the bundle file ``raw`` states that nothing was in force before it."""
    reach = describe(raw)[1].reach
    return reach is not None and reach.base_digest == NOTHING


def check_stated(raw: bytes, reach: Reach) -> None:
    """Raise ``reach_differs`` unless the bundle file states exactly the reach that was computed here."""
    held = describe(raw)[1].reach
    if held == reach:
        return
    said = "no reach" if held is None else f"the diff {held.diff_digest[:16]}… against {base_text(held.base_digest)}"
    raise BundleRefused(
        "reach_differs",
        f"the bundle states {said}, and it is {reach.diff_digest[:16]}… against {base_text(reach.base_digest)}",
        cure="do not sign; sign the folder as the next revision on the release in force",
    )


def base_text(digest: str) -> str:
    """Return the digest of a base as people read it."""
    return "nothing (first release)" if digest == NOTHING else f"{digest[:16]}…"
