"""Reading a copy of the trail: an export, or what a receiver stored."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from saw import jsontext
from saw.audit import ChainedEvent
from saw.audit.otlp import parse_export
from saw.audit.removal import Removals, is_removed, moment
from saw.audit.syslog import parse
from saw.errors import ConfigError, SawError


class IncompleteTrailError(SawError):
    """A copy of the trail is not whole."""

    code = "trail_incomplete"


def incomplete(findings: list[dict[str, Any]]) -> IncompleteTrailError:
    """Return the error that names the first of ``findings`` and holds all of them."""
    first = findings[0]
    where = f"{first['code']} at {first['source']} {first['seq']}: {first['detail']}"
    return IncompleteTrailError(
        f"the trail is not whole: {len(findings)} finding(s), first {where}",
        cure="compare with another copy of the trail",
        details={"findings": findings},
    )


def read_file(path: Path) -> Iterator[ChainedEvent]:
    """Yield the chained events of an export, one on each line."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield jsontext.decode(line, kind=ChainedEvent)
                except msgspec.DecodeError as error:
                    raise IncompleteTrailError(
                        f"line {number} of {path} is no chained event: {error}", cure="export again"
                    ) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error


def reader(options: argparse.Namespace) -> Callable[[Path], Iterator[ChainedEvent]]:
    """Return what reads the copy that ``options`` name: an export, or what a receiver stored of ``saw audit ship``."""
    if options.syslog and options.otlp:
        raise ConfigError("a file holds either messages or log records", cure="give --syslog or --otlp")
    if options.syslog:
        return lambda path: read_shipped(path, lambda line: [parse(line)])
    return (lambda path: read_shipped(path, parse_export)) if options.otlp else read_file


def completed(options: argparse.Namespace) -> Iterator[ChainedEvent]:
    """Yield the events of ``--file``; those that retention removed as an ``--archive`` has them, where one does.

    What takes a place has its number and hash; whether it fits that hash is for the caller to verify, as with every event.
    """
    read = reader(options)
    removed: dict[tuple[str, int], str] = {}
    kept: dict[tuple[str, int, str], ChainedEvent] = {}
    if options.archive:
        removed = {(item.source, item.seq): item.hash for item in read(Path(options.file)) if is_removed(item)}
    for name in options.archive or ():
        for item in read_file(Path(name)):
            if removed.get((item.source, item.seq)) == item.hash and not is_removed(item):
                kept[item.source, item.seq, item.hash] = item
    for item in read(Path(options.file)):
        yield kept.get((item.source, item.seq, item.hash), item) if is_removed(item) else item


def span_of(told: Removals, count: int) -> dict[str, Any]:
    """Return how many events retention removed of what was read, and the times of the oldest and youngest that it ever did."""
    span = told.span()
    return {
        "events": count,
        "first": None if span is None else moment(span[0]),
        "last": None if span is None else moment(span[1]),
    }


def removed_text(removed: Mapping[str, Any]) -> str:
    """Return what people are told about :func:`span_of`, on a line of its own; nothing when nothing was removed."""
    if not removed["events"]:
        return ""
    return (
        f"\nretention removed the content of {removed['events']} events, from {removed['first']} to {removed['last']}"
    )


def read_shipped(path: Path, events_of: Callable[[str], Iterable[ChainedEvent]]) -> Iterator[ChainedEvent]:
    """Yield each event once, in the order of its chain: a receiver may have got one twice, and a late one late."""
    found: dict[tuple[str, int, str], ChainedEvent] = {}
    try:
        with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    for event in events_of(line.removesuffix("\n")):
                        key = (event.source, event.seq, event.hash)
                        # One that was shipped again after its removal does not take the place of the one with content.
                        if key not in found or is_removed(found[key]):
                            found[key] = event
                except SawError as error:
                    raise IncompleteTrailError(f"line {number} of {path}: {error.message}", cure=error.cure) from error
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", cure="check the path") from error
    yield from (found[key] for key in sorted(found))
