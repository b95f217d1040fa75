"""Search what the agent can read for credentials: environments, process arguments, home, scratch folders, git configuration.

The search itself runs outside the workspace, because a credential may never be taken into it. Inside runs only the
collector, the program text of this module (standard library), which sends everything out:

    python -I - [FOLDER…] < sweep.py      # one JSON header line and the raw bytes for each place, then an end line
"""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote_to_bytes

FOLDERS = ("/home/agent", "/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - what is searched
MAX_FILE, MAX_TOTAL = 64 * 1024**2, 512 * 1024**2
"""Bytes: a larger file, or more in all, is named as left out, which makes the search incomplete."""


class Swept(NamedTuple):
    """What was collected: each place with its bytes, and what had to be left out."""

    places: tuple[tuple[str, bytes], ...]
    left_out: tuple[str, ...]


def readable(folders: Sequence[str]) -> Iterator[tuple[str, bytes | None]]:
    """Yield every place that this user can read with its content; None for one that is too large."""
    for variable, value in os.environb.items():
        yield f"environment:{variable.decode('utf-8', 'replace')}", value
    for process in sorted(Path("/proc").iterdir()):
        if process.name.isdigit():
            for kind in ("environ", "cmdline"):
                try:
                    yield f"/proc/{process.name}/{kind}", (process / kind).read_bytes()
                except OSError:
                    continue
    try:
        done = subprocess.run(
            ["git", "config", "--list", "--show-origin"], cwd="/", capture_output=True, check=False, timeout=30
        )
        yield "git config", done.stdout + done.stderr
    except OSError as error:
        yield "git config", str(error).encode()
    for folder in folders:
        for root, _, files in os.walk(folder):
            for name in sorted(files):
                path = Path(root, name)
                try:
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        yield str(path), path.read_bytes() if status.st_size <= MAX_FILE else None
                except OSError:
                    continue


def collect(output: BinaryIO, folders: Sequence[str] = FOLDERS) -> None:
    """Write everything that is readable to ``output``, files from below ``folders``."""
    total, left_out = 0, []
    for place, content in readable(folders):
        if content is None or total + len(content) > MAX_TOTAL:
            left_out.append(place)
            continue
        total += len(content)
        output.write(json.dumps({"place": place, "length": len(content)}).encode() + b"\n" + content)
    output.write(json.dumps({"end": True, "left_out": left_out}).encode() + b"\n")
    output.flush()


def parse(stream: bytes) -> Swept:
    """Read what :func:`collect` wrote; raise ``ValueError`` for a stream that breaks off."""
    places: list[tuple[str, bytes]] = []
    position = 0
    while True:
        line_end = stream.index(b"\n", position)
        header = json.loads(stream[position:line_end])
        if header.get("end"):
            return Swept(tuple(places), tuple(header["left_out"]))
        position = line_end + 1 + int(header["length"])
        content = stream[line_end + 1 : position]
        if len(content) != header["length"]:
            raise ValueError("the collected bytes break off")
        places.append((str(header["place"]), content))


def forms(secret: bytes) -> tuple[bytes, ...]:
    """Return the texts that give ``secret`` away: raw, hexadecimal, and base64 at each of its three alignments."""
    found = [secret, secret.hex().encode(), secret.hex().upper().encode()]
    for lead in range(3):
        # Only characters that depend on the secret alone: what stands before and after it in the same text is unknown.
        first, last = (lead * 8 + 5) // 6, (lead + len(secret)) * 8 // 6
        padded = bytes(lead) + secret + bytes(3)
        found += [base64.b64encode(padded)[first:last], base64.urlsafe_b64encode(padded)[first:last]]
    return tuple(dict.fromkeys(found))


def search(swept: Swept, secrets: Mapping[str, str]) -> list[str]:
    """Return ``name in place`` for each secret that was found; percent-encoding, whole or in part, is undone first."""
    wanted = {name: forms(value.encode()) for name, value in secrets.items()}
    hits = []
    for place, content in swept.places:
        views = (content, unquote_to_bytes(content)) if b"%" in content else (content,)
        hits += [
            f"{name} in {place}"
            for name, texts in wanted.items()
            if any(text in view for view in views for text in texts)
        ]
    return hits


if __name__ == "__main__":
    collect(sys.stdout.buffer, sys.argv[1:] or FOLDERS)
