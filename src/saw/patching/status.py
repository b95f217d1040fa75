"""How this host stands: what is pending, since when, what is held, whether it needs a restart, and every broken rule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec

from saw.edr.store import Store, iso
from saw.patching.apt import AptState, Offered, names_of, unlisted_sources, unsigned_sources
from saw.patching.config import PatchConfig
from saw.patching.findings import Breach
from saw.patching.holds import Held, bare, held_of
from saw.patching.restart import Need, need_of

_AREA = "pending"
#: Notes of the spool: when lists were last fetched, when a run last succeeded, and what the last one failed at (or empty).
FETCHED, SUCCEEDED, FAILED = "lists_fetched", "run_succeeded", "run_failed"
_SOME = 20


class Pending(msgspec.Struct, frozen=True):
    """An update that is not installed. ``listed``: from a source of the list; ``since`` is when it was first seen."""

    package: str
    source: str
    source_version: str
    installed: str
    offered: str
    listed: bool
    held: bool
    origin: str
    since: str


class Status(msgspec.Struct, frozen=True):
    """``breaches`` is empty when all is well; ``parts`` says how each part is."""

    parts: dict[str, str]
    breaches: tuple[Breach, ...]
    pending: tuple[Pending, ...]
    holds: tuple[Held, ...]
    reboot: Need
    kernel: str
    waiting: int


def pending_of(config: PatchConfig, apt: AptState, store: Store, now: datetime) -> tuple[Pending, ...]:
    """Return what is pending: of each package the newest version of a listed source, else what apt itself would take."""
    names = names_of(config)
    held = {bare(name) for name in apt.held} | {hold.package for hold in config.holds}
    known = store.known(_AREA)
    found: dict[str, tuple[Offered, bool, dict[str, str]]] = {}
    for one in apt.pending:  # of a package the newest comes first
        origin = next((o for o in one.origins if any(listed.matches(o, names) for listed in config.origins)), None)
        before = found.get(one.package)
        if origin is not None and (before is None or not before[1]):
            found[one.package] = (one, True, origin)
        elif origin is None and before is None and one.candidate:
            found[one.package] = (one, False, one.origins[0])
    return tuple(
        Pending(
            one.package,
            one.source,
            one.source_version,
            one.installed,
            one.offered,
            listed,
            bare(one.package) in held,
            "/".join(filter(None, (origin["origin"] or origin["site"], origin["codename"] or origin["archive"]))),
            known.get(_mark(one.package, one.installed), iso(now)),
        )
        for name, (one, listed, origin) in sorted(found.items())
    )


def remember(pending: tuple[Pending, ...], store: Store) -> None:
    """Note since when each installed version is known to be old; a newer one that comes meanwhile does not begin anew."""
    known = store.known(_AREA)
    marks: dict[str, str | None] = {_mark(one.package, one.installed): one.since for one in pending if one.listed}
    gone: dict[str, str | None] = {name: None for name in known if name not in marks}
    if gone or any(name not in known for name in marks):
        store.keep({_AREA: {**gone, **marks}})


def status_of(config: PatchConfig, apt: AptState, store: Store, now: datetime, running: str) -> Status:
    """Judge the host at ``now``; ``running`` is the running kernel, empty in a container."""
    pending = pending_of(config, apt, store, now)
    holds = held_of(config, apt, now.date())
    need = need_of(config, apt.kernels, running)
    breaches = [
        *_overdue(config, pending, holds, now),
        *_of_holds(holds),
        *(
            Breach("unsigned_source", one, f"{one}: sign the repository, and trust its key")
            for one in unsigned_sources(config, apt)
        ),
        *(
            Breach(
                "source_not_listed",
                one,
                f"{one}: run the role patching, and look what else writes to /etc/apt/apt.conf.d",
            )
            for one in unlisted_sources(config, apt.engine)
        ),
        *_reboot(config, need, now),
    ]
    parts = {
        "pending": _pending_words(pending),
        "holds": ", ".join(f"{one.package} {one.state}" for one in holds) or "none",
        "lists": _lists(config, store, now, breaches),
        "run": _last_run(config, store, now, breaches)
        if config.engine
        else "off: updates are reported and not installed",
        "reboot": _reboot_words(need),
        "spool": f"{store.waiting()} of {config.spool_limit} wait for delivery",
    }
    return Status(parts, tuple(breaches), pending, holds, need, running, store.waiting())


def _overdue(config: PatchConfig, pending: tuple[Pending, ...], holds: tuple[Held, ...], now: datetime) -> list[Breach]:
    excused = {one.package for one in holds if one.state in {"held", "not_held"}}
    return [
        Breach(
            "update_overdue",
            one.package,
            f"{one.package} {one.installed} waits for {one.offered} of {one.origin} since {one.since[:10]}: saw patch run",
            {"installed": one.installed, "offered": one.offered, "origin": one.origin, "since": one.since},
        )
        for one in pending
        if one.listed and bare(one.package) not in excused and _age(one.since, now) > config.overdue_s
    ]


def _of_holds(holds: tuple[Held, ...]) -> list[Breach]:
    found: list[Breach] = []
    for one in holds:
        evidence = {"owner": one.owner, "reason": one.reason, "until": one.until}
        if one.state == "expired":
            words = (
                f"the hold of {one.package} ran out on {one.until}: upgrade it and take the hold out, or set a new end"
            )
            found.append(Breach("hold_expired", one.package, words, evidence))
        elif one.state == "unexplained":
            words = f"{one.package} is held, and nobody answers for it: add it to patching_holds, or apt-mark unhold it"
            found.append(Breach("hold_unexplained", one.package, words))
        elif one.state == "not_held":
            found.append(
                Breach(
                    "hold_not_held", one.package, f"apt does not hold {one.package}: saw patch holds --apply", evidence
                )
            )
    return found


def _reboot(config: PatchConfig, need: Need, now: datetime) -> list[Breach]:
    if not need.urgent or need.since is None or (now - need.since).total_seconds() <= config.reboot.overdue_s:
        return []
    why = "; ".join(need.reasons)
    words = f"the host needs a restart since {need.since:%Y-%m-%d} ({why}): saw patch reboot"
    return [Breach("reboot_overdue", "reboot", words, {"reasons": list(need.reasons), "livepatch": need.livepatch})]


def _lists(config: PatchConfig, store: Store, now: datetime, breaches: list[Breach]) -> str:
    said = [datetime.fromisoformat(told).timestamp() for told in [store.note(FETCHED)] if told]
    periodic = Path(config.lists_dir).parent / "periodic"
    places = [periodic / "update-success-stamp", periodic / "update-stamp"]
    said += [path.stat().st_mtime for path in places if path.exists()]
    if not any(Path(config.lists_dir).glob("*_Packages*")):
        breaches.append(
            Breach(
                "lists_stale", "none", "there are no lists of packages, so what is pending is not known: apt-get update"
            )
        )
        return "none"
    if not said:  # fetched by hand or while an image was made
        said.append(Path(config.lists_dir).stat().st_mtime)
    age = max(0.0, now.timestamp() - max(said))
    if age > config.lists_s:
        breaches.append(
            Breach(
                "lists_stale",
                "old",
                f"the lists of packages are {_span(age)} old, so what is pending is not known: apt-get update",
            )
        )
    return f"fetched {_span(age)} ago"


def _last_run(config: PatchConfig, store: Store, now: datetime, breaches: list[Breach]) -> str:
    failed = store.note(FAILED)
    if failed:
        breaches.append(Breach("run_failed", "run", f"the last run failed: {failed}"))
        return "failed"
    last = store.note(SUCCEEDED)
    if last is None:
        return "none yet"
    age = max(0.0, _age(last, now))
    if age > config.lists_s:
        breaches.append(
            Breach("run_failed", "late", f"the last run was {_span(age)} ago (systemctl status saw-patching.timer)")
        )
    return f"succeeded {_span(age)} ago"


def _pending_words(pending: tuple[Pending, ...]) -> str:
    listed = [one for one in pending if one.listed]
    held = sum(one.held for one in listed)
    text = f"{len(listed)} security updates, {held} of them held; {len(pending) - len(listed)} others"
    return f"{text} ({', '.join(one.package for one in listed[:_SOME])})" if listed else text


def _reboot_words(need: Need) -> str:
    if not need.reasons:
        return "not needed"
    patched = {"none": "", "applied": "; a live patch is applied", "in_transition": "; a live patch is being applied"}
    urgency = "" if need.urgent else ", not urgent"
    return f"needed{urgency}: {'; '.join(need.reasons)}{patched[need.livepatch]}"


def _mark(package: str, installed: str) -> str:
    return f"{package} {installed}"


def _age(moment: str, now: datetime) -> float:
    return (now - datetime.fromisoformat(moment).astimezone(UTC)).total_seconds()


def _span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


__all__ = ["FAILED", "FETCHED", "SUCCEEDED", "Pending", "Status", "pending_of", "remember", "status_of"]
