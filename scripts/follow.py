"""Run a long command with its whole output in a log, and print one short line for each stage as it begins.

    python scripts/follow.py --log FILE [--watch GLOB ...] [--whole] -- COMMAND [ARGUMENT ...]

Stages are molecule's (scenario and stage, plays, results of its tests) and the numbered steps of ``make workspace``, each with
the seconds since the start. ``--watch`` also follows files that the command's own children write (they may appear, be
truncated or be replayed into one another; a stage is shown once). ``--whole`` prints all of the command's own output besides.
Ends with the command's exit code.
"""

from __future__ import annotations

import argparse
import glob
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
STAGES = (
    re.compile(r"^(?:INFO|ERROR)\s+(\[\S+ > (?!discovery)\S+\] Execut(?:ing|ed: (?!Successful)).*)$"),
    re.compile(r"(PLAY \[.+?\]) \*"),
    re.compile(r"^=*\s*(\d+ (?:passed|failed|error).* in [0-9.]+s\b.*?)\s*=*$"),
    re.compile(r"^(\[ ?\d+/\d+\] .+)$"),
    re.compile(r"^\s*(FAILED after .+)$"),
)
TEST_ENDED = re.compile(r"^\S+::(\S+) (?:PASSED|FAILED|ERROR|SKIPPED)\b")
"""A line of ``pytest -v``: the test that runs now is the one after it."""
POLL_S = 0.3
QUIET_S = 60.0


def stage(line: str) -> str | None:
    """Return the short form of a line that begins or ends a stage, else None."""
    plain = ESCAPES.sub("", line).strip("\r\n │|")
    for pattern in STAGES:
        if found := pattern.search(plain):
            return found[1].strip()
    return None


class Follower:
    """Prints stages of several streams; one that a second stream replays is shown once."""

    def __init__(self, patterns: list[str]) -> None:
        self.patterns = patterns
        self.begin = time.monotonic()
        self.shown = self.begin
        self.last = "the start"
        self.places: dict[str, tuple[int, int]] = {}
        self.seen: dict[str, Counter[str]] = {}
        self.lock = threading.Lock()

    def say(self, text: str) -> None:
        """Print one line with the seconds since the start."""
        with self.lock:
            self.shown = time.monotonic()
            print(f"    [{self.shown - self.begin:>4.0f}s] {text}", flush=True)

    def line(self, source: str, text: str) -> None:
        """Take one line of ``source``."""
        short = stage(text)
        if short is None:
            return
        counts = self.seen.setdefault(source, Counter())
        counts[short] += 1
        others = max((seen[short] for name, seen in self.seen.items() if name != source), default=0)
        if counts[short] > others:
            self.last = short
            self.say(short)

    def skip_present(self) -> None:
        """Take what the watched files hold already as read."""
        for name in self.files():
            status = Path(name).stat()
            self.places[name] = (status.st_ino, status.st_size)

    def files(self) -> list[str]:
        """Return the watched files that exist."""
        return sorted({name for pattern in self.patterns for name in glob.glob(pattern)})  # noqa: PTH207 - absolute globs

    def look(self) -> None:
        """Read what came to the watched files since the last look, whole lines only."""
        for name in self.files():
            inode, offset = self.places.get(name, (0, 0))
            try:
                with Path(name).open("rb") as stream:
                    status = Path(name).stat()
                    if status.st_ino != inode or status.st_size < offset:
                        offset = 0
                    stream.seek(offset)
                    whole = stream.read().rpartition(b"\n")
            except OSError:
                continue
            text = whole[0] + whole[1]
            self.places[name] = (status.st_ino, offset + len(text))
            for line in text.decode("utf-8", "replace").splitlines():
                self.line(name, line)
        if time.monotonic() - self.shown > QUIET_S:
            self.say(f"… still at: {self.last}")


def follow(command: list[str], log: Path, patterns: list[str], *, whole: bool) -> int:
    """Run ``command`` and follow it; return its exit code."""
    follower = Follower(patterns)
    follower.skip_present()
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)

        def read() -> None:
            for raw in child.stdout or ():
                stream.write(raw)
                stream.flush()
                if whole:
                    print(raw.decode("utf-8", "replace"), end="", flush=True)
                    follower.shown = time.monotonic()
                    if ended := TEST_ENDED.match(raw.decode("utf-8", "replace")):
                        follower.last = f"what follows {ended[1]}"
                else:
                    follower.line("", raw.decode("utf-8", "replace"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda got, _: child.send_signal(got))
        while child.poll() is None:
            follower.look()
            reader.join(POLL_S)
            if not reader.is_alive():
                time.sleep(0.05)
        reader.join(5)
        follower.look()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--watch", action="append", default=[], metavar="GLOB")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    return follow(options.command, options.log, options.watch, whole=options.whole)


if __name__ == "__main__":
    sys.exit(main())
