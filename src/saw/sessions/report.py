"""Reports of ended sessions, and their recordings: left on the disk by the recorder, so that it can go at once, and sent by a
process of their own. A recording that the broker has is not kept here.

Sessions may end all at once. A few processes send, each report by one of them; one more waits to look at what came meanwhile,
and whoever finds it waiting goes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from enum import Enum, auto
from pathlib import Path

import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.files import write_private
from saw.sessions.config import BastionConfig
from saw.sessions.link import BrokerLink, Refused
from saw.sessions.messages import Closing

SUFFIX = ".closing"
_TRIES = 20
_PAUSE_S = 3.0
_FOR_NOW = frozenset({"no_room", "internal", "rate_limited"})
"""Refusals that pass."""


_SENDING = 4
"""How many processes send at a time: a long recording of one session does not hold up the ends of others."""
_LOOK_S = 0.2
"""How often the one that waits looks for a free place (seconds)."""


class _Found(Enum):
    """What became of a report: nothing of it is left, it could not be sent, or another process is sending it."""

    DONE = auto()
    FAILED = auto()
    ELSEWHERE = auto()


def leave_report(config: BastionConfig, session: str, said: Closing) -> None:
    """Keep what the broker has to hear and start the process that tells it. A full disk leaves it unsaid: the lease ends it."""
    path = config.recordings / f"{session}{SUFFIX}"
    with contextlib.suppress(OSError):
        write_private(path, msgspec.json.encode(said))
    _start(config, *([] if path.exists() else [session, msgspec.json.encode(said).decode()]))


def send_forgotten(config: BastionConfig) -> None:
    """Start the process that sends when a report has waited for longer than one tries: its process was killed, or gave up."""
    before = time.time() - _TRIES * _PAUSE_S
    with contextlib.suppress(OSError):
        if any(path.stat().st_mtime < before for path in config.recordings.glob(f"*{SUFFIX}")):
            _start(config)


def _start(config: BastionConfig, *unsaid: str) -> None:
    """Start the process that sends; ``unsaid`` are session and report where the disk did not take it."""
    line = [sys.executable, "-m", "saw.sessions.report", config.broker_url, config.broker_name]
    line += [config.ca_file, config.cert_file, config.key_file, config.recordings_dir, *unsaid]
    with contextlib.suppress(OSError):
        subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )


def send_reports(config: BastionConfig, pause: Callable[[float], None] = time.sleep) -> int:
    """Send every report that waits, and return how many could not be sent; the broker takes each once.

    What another process sends is looked at again, as that one may give up; at the end it is that one's.
    """
    place = _place(config.recordings, pause)
    if place is None:
        return 0  # somebody looks after us, and finds what we would
    try:
        for attempt in range(_TRIES):
            found = Counter(_send_alone(config, path) for path in sorted(config.recordings.glob(f"*{SUFFIX}")))
            if not found[_Found.FAILED] and not found[_Found.ELSEWHERE]:
                return 0
            if attempt + 1 < _TRIES:
                pause(_PAUSE_S)
        return found[_Found.FAILED]
    finally:
        os.close(place)


def _lock(path: Path, flags: int = os.O_RDONLY) -> int | None:
    """Lock a file, without waiting, until what is returned is closed or this process ends; None when another one has it."""
    file = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file


def _place(recordings: Path, pause: Callable[[float], None]) -> int | None:
    """Wait for one of the places of those who send; None at once when another one waits already, who looks after us."""
    first = _lock(recordings / ".waiting", os.O_RDWR | os.O_CREAT)
    if first is None:
        return None
    try:
        while True:
            for number in range(_SENDING):
                place = _lock(recordings / f".sending-{number}", os.O_RDWR | os.O_CREAT)
                if place is not None:
                    return place
            pause(_LOOK_S)
    finally:
        os.close(first)


def _send_alone(config: BastionConfig, path: Path) -> _Found:
    """Send the report in ``path`` unless another process does."""
    try:
        file = _lock(path)
    except OSError:
        return _Found.FAILED if path.exists() else _Found.DONE  # another one has sent it
    if file is None:
        return _Found.ELSEWHERE
    try:
        return _Found.DONE if _send(config, path) else _Found.FAILED
    finally:
        os.close(file)


def _send(config: BastionConfig, path: Path) -> bool:
    """Send the report in ``path``; return whether nothing of it is left to be sent."""
    try:
        said = jsontext.decode(path.read_bytes(), kind=Closing)
        _tell(config, path.name.removesuffix(SUFFIX), said)
    except FileNotFoundError:
        pass  # another process has sent it
    except Refused as error:
        # What the broker does not know, or does not want as it is, it never will; the recording stays here.
        if error.code in _FOR_NOW:
            return False
    except (SawError, OSError, msgspec.DecodeError):
        return False
    path.unlink(missing_ok=True)
    return True


def _tell(config: BastionConfig, session: str, said: Closing) -> None:
    """Tell the broker of one end and hand in the recording, which then goes from here."""
    recording = config.recordings / f"{session}.sawrec"
    with BrokerLink(config) as link:
        link.close(session, said)
        if said.digest is not None:
            link.hand_in(session, recording)
            recording.unlink(missing_ok=True)


def _main(argv: list[str]) -> int:
    url, name, ca, certificate, key, recordings, *unsaid = argv
    config = BastionConfig(
        broker_url=url, broker_name=name, ca_file=ca, cert_file=certificate, key_file=key, recordings_dir=recordings
    )
    if unsaid:
        with contextlib.suppress(SawError, OSError):
            _tell(config, unsaid[0], jsontext.decode(unsaid[1], kind=Closing))
    return 1 if send_reports(config) else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
