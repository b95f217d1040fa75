"""A witness that looks by itself: fetches the log's newest checkpoint, signs what continues, and is loud about all else.

One look is one run of a unit. What it says stands in ``health.json``; a look that is not good ends with an error, so that the
unit fails, and each new kind of trouble is an event (OCSF Detection Finding) in ``findings.jsonl``. A second view or a fork is
an alarm that stays: until somebody clears it, nothing is signed, whatever the log shows meanwhile. ``evidence/`` keeps both
checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from saw.audit.events import EventFactory, Subject
from saw.audit.note import LOG, WITNESS, NoteError, PublicKey, Signer, open_checkpoint
from saw.audit.tiles import Files
from saw.audit.tree_web import Web
from saw.audit.witness import WitnessRefusal, continues, cosign, refusal, remembered
from saw.errors import ConfigError, SawError, UnavailableError
from saw.files import load_json, locked, write_atomic, write_private

State = Literal["witnessing", "lagging", "silent", "alarm", "failing"]
#: How far the log's clock may be ahead of the witness's, seconds.
AHEAD_S = 300
_LEAST_AGE_S, _MOST_AGE_S = 60, 7 * 86_400
#: Refusals that show two trees of one key, each with its log's signature.
_STANDS = frozenset({"split_view", "tree_forked"})
#: So many refusals that are no alarm are kept.
_KEEP = 50
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}")


class WitnessSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file ``/etc/saw/witness.json``.

    ``log``: where the tree is served, an ``https`` URL; ``server_name``: the name in its certificate where that has an address.
    ``ca_file``: authorities (PEM), absent for the system's. ``key``: the log's public key, a file. ``name``: the witness's.
    ``max_age_s``: how old the newest checkpoint may be, 60 to 604800.
    """

    log: str
    key: str
    name: str
    ca_file: str | None = None
    server_name: str | None = None
    state_dir: str = "/var/lib/saw/witness"
    max_age_s: int = 900

    @property
    def place(self) -> Path:
        """The state directory."""
        return Path(self.state_dir)


class WitnessHealth(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the last look found. ``log_time`` (s since 1970), ``size`` and ``root`` are of the last good one."""

    state: State
    since: str
    checked_at: str
    size: int = 0
    root: str = ""
    log_time: int = 0
    error: dict[str, Any] | None = None


class Alarm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Two trees were seen. ``cleared_by``: why somebody let the witness go on."""

    code: str
    at: str
    message: str
    evidence: str
    cleared_by: str = ""


def load_settings(path: Path | str) -> WitnessSettings:
    """Read and check the configuration; raise :class:`ConfigError` that names the field."""
    settings = load_json(path, WitnessSettings)
    try:
        url = urlsplit(settings.log)
        served = url.scheme == "https" and url.hostname and not url.query and not url.fragment and not url.username
        _ = url.port
    except ValueError:
        served = False
    files = (settings.key, settings.state_dir, settings.ca_file or "/")
    problems = [
        text
        for bad, text in (
            (not served, "log must be an https URL"),
            (settings.server_name is not None and not _HOST.fullmatch(settings.server_name), "server_name must be a host name"),
            (not all(Path(name).is_absolute() for name in files), "key, ca_file and state_dir must be absolute paths"),
            (not _LEAST_AGE_S <= settings.max_age_s <= _MOST_AGE_S, f"max_age_s must be {_LEAST_AGE_S} to {_MOST_AGE_S}"),
        )
        if bad
    ]  # fmt: skip
    try:
        Signer(settings.name, WITNESS, bytes(32))
    except NoteError:
        problems.append("name must name a key, as in witness.example.com")
    if problems:
        raise ConfigError(f"{path} is not valid: {'; '.join(problems)}", cure="correct the named fields")
    return settings


class Watch:
    """One witness's looks at one log."""

    def __init__(self, settings: WitnessSettings, now: datetime, files: Files | None = None) -> None:
        """``files`` replace what is served at ``settings.log``."""
        self._settings, self._now, self._files = settings, now, files
        self._place = settings.place

    def look(self) -> WitnessHealth:
        """Look once and return what is so now; raise :class:`SawError` for all that is not good, after it was written down.

        A log that cannot be reached is good (``lagging``) as long as the last good look is not older than ``max_age_s``.
        """
        with locked(self._place):
            known = health_of(self._place)
            try:
                if alarm := alarm_of(self._place):
                    raise refusal(
                        "alarm_stands",
                        f"{alarm.message}, seen {alarm.at}",
                        cure=f"compare the checkpoints {alarm.evidence}; then saw audit witness clear",
                    )
                health = self._seen(known)
            except UnavailableError as error:
                health = self._away(known, error)
            except SawError as error:
                self._failed(known, error)
                raise
            self._write(health)
            return health

    def _seen(self, known: WitnessHealth | None) -> WitnessHealth:
        """Fetch, hold against what is remembered, sign; return the health."""
        settings = self._settings
        log = PublicKey.read(settings.key, LOG)
        signer = self._signer()
        files = self._files or Web(settings.log, settings.ca_file, settings.server_name)
        raw = files.read("checkpoint")
        if raw is None:
            raise UnavailableError(f"{settings.log} has no checkpoint", cure="see whether the log's timer runs")
        signed = open_checkpoint(raw, log, (log.timed,))
        new, state = signed.checkpoint, self._place / "state.json"
        seen = remembered(state).logs.get(log.line)
        try:
            continues(seen, new, files)
        except WitnessRefusal as error:
            self._keep(raw, new.size, error, stands=seen is not None and error.code in _STANDS)
            raise
        time, now = signed.witnesses.get(log.name), int(self._now.timestamp())
        if time is None:
            raise refusal("log_untimed", "the log does not say when this was its newest", cure="update the log's host")
        if time > now + AHEAD_S:
            raise refusal("log_ahead", f"the checkpoint is of {time - now} s from now", cure="set both clocks by NTP")
        if now - time > settings.max_age_s:
            raise _silent(now - time, settings.max_age_s)
        note = cosign(raw, log, files, signer, state, time=now)
        write_atomic(self._place / "checkpoint", note)
        latest = max(time, known.log_time if known else 0)
        return self._health("witnessing", known, size=new.size, root=new.root.hex(), log_time=latest)

    def _signer(self) -> Signer:
        """Return the witness's key, made at the first look alone."""
        file = self._place / "witness.key"
        if not file.exists():
            if (self._place / "state.json").exists():
                raise ConfigError(f"{file} is missing", cure="restore it; another key is another witness")
            signer = Signer(self._settings.name, WITNESS, secrets.token_bytes(32))
            write_atomic(file.with_name("witness.key.pub"), signer.public.line + "\n")
            write_private(file, signer.private_line() + "\n")
        signer = Signer.parse(file.read_text())
        if signer.public.kind != WITNESS or signer.public.name != self._settings.name:
            raise ConfigError(f"{file} is not the key of {self._settings.name}", cure="set name to that of the key")
        return signer

    def _away(self, known: WitnessHealth | None, error: UnavailableError) -> WitnessHealth:
        """Return the health while the log is away for a short time; raise when it has been away for too long, or always."""
        age = int(self._now.timestamp()) - known.log_time if known and known.log_time else None
        if known is not None and age is not None and age <= self._settings.max_age_s:
            if known.state in _GOOD:
                return self._health("lagging", known, error=error)
            self._failed(known, error, keep=known.state)  # what was wrong is not good again because nobody answers
            raise error
        worse = error if age is None else _silent(age, self._settings.max_age_s, error)
        self._failed(known, worse)
        raise worse

    def _failed(self, known: WitnessHealth | None, error: SawError, keep: State | None = None) -> None:
        state: State = keep or _STATE.get(error.code, "failing")
        before = known.error["code"] if known and known.error and known.state not in _GOOD else None
        if error.code not in {before, "alarm_stands"}:
            self._tell(error)
        self._write(self._health(state, known, error=error))

    def _tell(self, error: SawError) -> None:
        factory = EventFactory("saw-witness", host=socket.gethostname(), new_uid=lambda: str(uuid.uuid4()))
        finding = factory.detection_finding(
            self._now,
            Subject(principal=f"witness:{self._settings.name}"),
            kind=error.code,
            title=f"The log is not witnessed: {error.message}",
            detail={"log": self._settings.log, **error.details},
        )
        handle = os.open(self._place / "findings.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        with os.fdopen(handle, "ab") as file:
            file.write(msgspec.json.encode(finding) + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _keep(self, raw: bytes, size: int, error: WitnessRefusal, *, stands: bool) -> None:
        """Keep the checkpoint beside the one that was signed last; an alarm names both."""
        folder = self._place / "evidence"
        folder.mkdir(mode=0o750, exist_ok=True)
        # the text alone: each time that the log signs it again is no other evidence
        text = raw.partition(b"\n\n")[0]
        stem = f"{error.code}-{size}-{hashlib.sha256(text).hexdigest()[:16]}"
        # What an alarm names is always there, before the alarm; of all else somebody could write without end.
        room = stands or len(list(folder.iterdir())) < 2 * _KEEP
        if room and not (folder / f"{stem}.found").exists():
            last = self._place / "checkpoint"
            if last.exists():
                write_atomic(folder / f"{stem}.signed", last.read_bytes())
            write_atomic(folder / f"{stem}.found", raw)
        error.details = {**error.details, "evidence": str(folder / stem)}
        if stands:
            alarm = Alarm(error.code, _text(self._now), error.message, f"{folder / stem}.signed and .found")
            write_atomic(self._place / "alarm.json", msgspec.json.encode(alarm))

    def _health(
        self,
        state: State,
        known: WitnessHealth | None,
        *,
        error: SawError | None = None,
        size: int | None = None,
        root: str | None = None,
        log_time: int | None = None,
    ) -> WitnessHealth:
        now = _text(self._now)
        last = known or WitnessHealth(state, now, now)
        return WitnessHealth(
            state,
            last.since if last.state == state else now,
            now,
            last.size if size is None else size,
            last.root if root is None else root,
            last.log_time if log_time is None else log_time,
            None if error is None else error.as_dict(),
        )

    def _write(self, health: WitnessHealth) -> None:
        write_atomic(self._place / "health.json", msgspec.json.encode(health))


_GOOD: frozenset[State] = frozenset({"witnessing", "lagging"})
_STATE: Mapping[str, State] = {
    "log_silent": "silent",
    "alarm_stands": "alarm",
    "split_view": "alarm",
    "tree_forked": "alarm",
}


def health_of(place: Path) -> WitnessHealth | None:
    """Return what the last look found; None when there was none."""
    return load_json(place / "health.json", WitnessHealth) if (place / "health.json").exists() else None


def alarm_of(place: Path) -> Alarm | None:
    """Return the alarm that stands."""
    return load_json(place / "alarm.json", Alarm) if (place / "alarm.json").exists() else None


def status_of(settings: WitnessSettings, now: datetime) -> dict[str, Any]:
    """Return what is so at ``now``, also when no look was made any more; ``ok`` says whether that is good."""
    health, alarm = health_of(settings.place), alarm_of(settings.place)
    state: str = "never_ran" if health is None else health.state
    lag = None if health is None or not health.log_time else int(now.timestamp()) - health.log_time
    if alarm is not None:
        state = "alarm"
    elif state in _GOOD and (lag is None or lag > settings.max_age_s):
        state = "silent"
    return {
        "ok": state in _GOOD,
        "state": state,
        "since": "" if health is None else health.since,
        "checked_at": "" if health is None else health.checked_at,
        "log": settings.log,
        "size": 0 if health is None else health.size,
        "root": "" if health is None else health.root,
        "lag_s": lag,
        "max_age_s": settings.max_age_s,
        "alarm": None if alarm is None else msgspec.to_builtins(alarm),
        "error": None if health is None else health.error,
    }


def clear_alarm(settings: WitnessSettings, reason: str) -> Alarm:
    """Let the witness go on after an alarm; it stays in ``evidence/`` with the reason. What was signed last stays remembered.

    Raises :class:`ConfigError` where no alarm stands, and for an empty reason.
    """
    with locked(settings.place):
        alarm = alarm_of(settings.place)
        if alarm is None or not reason.strip():
            raise ConfigError(
                "no alarm stands" if alarm is None else "the reason is empty", cure="see saw audit witness status"
            )
        alarm = msgspec.structs.replace(alarm, cleared_by=reason.strip())
        name = alarm.at.replace(":", "")
        write_atomic(settings.place / "evidence" / f"alarm-{name}.json", msgspec.json.encode(alarm))
        (settings.place / "alarm.json").unlink()
        return alarm


def _silent(age: int, most: int, error: SawError | None = None) -> WitnessRefusal:
    why = f" ({error.message})" if error else ""
    return refusal(
        "log_silent",
        f"the newest checkpoint is {age} s old, {most} s may be{why}",
        cure="see whether the log's host signs checkpoints, and whether an old copy is served in its place",
    )


def _text(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
