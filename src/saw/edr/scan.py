"""One scan: malware and file integrity, each written to the spool as soon as it is known."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from saw.audit.events import EventFactory
from saw.edr import aide
from saw.edr.clamav import scan_malware
from saw.edr.config import EdrConfig
from saw.edr.detection import Detection, EdrError, Now
from saw.edr.place import workspace_id
from saw.edr.store import Store, iso


class Scanned(msgspec.Struct, frozen=True):
    """What a scan did: numbers of new findings, files that ClamAV looked at, paths that differ, and what went wrong."""

    new: tuple[int, ...]
    files: int
    differences: int
    problems: tuple[str, ...]


def scan(config: EdrConfig, store: Store, factory: EventFactory, now: Now, *, everything: bool = False) -> Scanned:
    """Scan what ``config`` names. One engine that fails does not keep the other from its work; it is named in ``problems``."""
    new: list[int] = []
    problems: list[str] = []
    files = differences = 0
    workspace = workspace_id(config)

    def record(found: Iterable[Detection], notes: dict[str, str], known: dict[str, str | None]) -> None:
        wanted = [one for one in found if not config.ignored(one.kind, one.subject)]
        areas = {"integrity": known} if known else {}
        new.extend(store.record(wanted, factory, now(), workspace=workspace, notes=notes, known=areas))

    if config.malware is not None:
        try:
            result = scan_malware(config.malware, store, now, everything=everything)
            record(result.detections, result.notes, {})
            files = result.files
            problems += [f"malware: {problem}" for problem in result.problems]
        except EdrError as error:
            problems.append(f"malware: {error}")
    if config.integrity is not None:
        try:
            found = aide.check(config.integrity)
            detections = {one.subject: one for one in found.detections()}
            # A difference stands until it is accepted, and is reported once; one that went and comes again is new.
            known = store.known("integrity")
            fresh = [one for one in detections.values() if known.get(one.subject) != one.key]
            marks: dict[str, str | None] = {path: None for path in known if path not in detections}
            marks |= {one.subject: one.key for one in fresh}
            moment = now()  # to the microsecond in a key: two scans may fall into one second
            wanted = [msgspec.structs.replace(one, key=f"{one.key}|{moment.isoformat()}") for one in fresh]
            record(wanted, {"integrity_scan": iso(moment), "integrity_differences": str(found.count)}, marks)
            differences = found.count
        except EdrError as error:
            problems.append(f"integrity: {error}")
    return Scanned(tuple(new), files, differences, tuple(problems))


__all__ = ["Scanned", "scan"]
