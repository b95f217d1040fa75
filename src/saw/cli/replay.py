"""``saw replay``: verifies the recording of a session, then plays it on the terminal or writes it as an asciicast."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_options
from saw.errors import ConfigError
from saw.files import write_private
from saw.identity.sealed import SealKey
from saw.sessions.asciicast import lines, play
from saw.sessions.recording import Summary, events, verify


def main(argv: list[str]) -> int:
    """Run ``saw replay``."""
    parser = argparse.ArgumentParser(prog="saw replay", description=__doc__)
    parser.add_argument("session", help="session id, as saw sessions lists it")
    parser.add_argument(
        "--from",
        dest="place",
        metavar="PATH",
        help="recording, or folder of recordings (default: what the broker keeps)",
    )
    parser.add_argument("--output", metavar="FILE", help="write an asciicast v2 file (readable by you alone) instead")
    parser.add_argument("--verify", action="store_true", help="only verify it and tell what it is")
    parser.add_argument(
        "--unfinished", action="store_true", help="accept one whose end is missing: the recorder was killed"
    )
    parser.add_argument(
        "--idle", type=float, default=2.0, metavar="S", help="longest pause, seconds (default: %(default)s)"
    )
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster (default: %(default)s)")
    add_options(parser)
    options = parser.parse_args(argv)
    if options.speed <= 0 or options.idle < 0:
        raise ConfigError("--speed and --idle are more than nothing", cure="leave them out")
    with (
        tempfile.TemporaryDirectory(prefix="saw-replay-") as scratch,
        OperatorClient.from_context(options.context).session() as client,
    ):
        return _replay(options, client, Path(scratch))


def _replay(options: argparse.Namespace, client: OperatorClient, scratch: Path) -> int:
    one = f"/v1/sessions/{quote(options.session, safe='')}"
    if options.place is not None:
        path = _file(Path(options.place), options.session)
    else:
        path = scratch / "recording"
        with path.open("wb") as file:
            client.download(f"{one}/recording", file)
    given = client.request("POST", f"{one}/key")
    key = SealKey(bytes.fromhex(given["key"]), os.urandom)
    found = verify(path, options.session, key, digest=given["digest"], unfinished=options.unfinished)
    told = _told(found)
    stream = events(path, options.session, key, unfinished=options.unfinished)
    if options.output:
        write_private(options.output, "".join(lines(found.header, stream)))
        told["output"] = options.output
    elif not options.verify and not options.json:
        pause = time.sleep if sys.stdout.isatty() else None
        play(stream, sys.stdout.buffer, pause, idle_s=options.idle, speed=options.speed)
        return 0
    text = "\n".join(f"{name}: {value}" for name, value in told.items())
    print(json.dumps({"ok": True, **told}) if options.json else text)
    return 0


def _told(found: Summary) -> dict[str, object]:
    ending = found.ending
    return {
        "session": found.header.session,
        "workspace": found.header.workspace,
        "who": found.header.principal,
        "command": found.header.command,
        "seconds": round(found.seconds, 3),
        "chunks": found.chunks,
        "digest": found.digest,
        "reason": ending.reason if ending else None,
        "exit_code": ending.exit_code if ending else None,
        "bytes_in": ending.bytes_in if ending else None,
        "bytes_out": ending.bytes_out if ending else None,
        "sha256_in": ending.sha256_in if ending else None,
        "sha256_out": ending.sha256_out if ending else None,
    }


def _file(place: Path, session: str) -> Path:
    path = place / f"{session}.sawrec" if place.is_dir() else place
    if not path.is_file():
        raise ConfigError(
            f"there is no recording {path}", cure="leave --from out: the broker keeps what its bastions handed in"
        )
    return path
