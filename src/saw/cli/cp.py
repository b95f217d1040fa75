"""``saw cp``: copy files and folders to and from a workspace, with a key and a certificate that live for one connection.

OpenSSH's scp does the transfer, over SFTP. With a bastion in the context file each copy is a session that is recorded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec

from saw.broker.client import Context, load_context
from saw.cli.operator_options import add_options, show
from saw.cli.ssh import certify, leave_no_key
from saw.errors import UnavailableError
from saw.sessions.copying import Copy, NotCopied, SessionFailed, arrives_at, check_here, files_at, plan, scp_line

_KEPT_LINES = 20
#: What the far end or this one may say, and what to do then.
_CURES = (
    ("No such file or directory", "check the path; the folder that it is copied into must exist"),
    ("Permission denied", "in a workspace the policy says what may be read and written"),
    ("not a regular file", "give -r to copy folders; devices and pipes are not copied"),
    ("Failure", "check that the folder that it is copied into exists, and its room"),
    ("No space left on device", "make room"),
)


def main(argv: list[str]) -> int:
    """Run ``saw cp [-r] SOURCE… TARGET``."""
    parser = argparse.ArgumentParser(
        prog="saw cp",
        usage="saw cp [-r] [--context FILE] [--ttl S] [--json] SOURCE… TARGET",
        description="Copy files to a workspace or out of one. WORKSPACE:PATH is a path there, from where sessions begin.",
        epilog="exit codes: 0 copied; 1 refused or failed, and why; 2 wrong usage; 130 interrupted",
    )
    parser.add_argument("paths", nargs="+", metavar="PATH", help="what to copy, then where to")
    parser.add_argument("-r", "--recursive", action="store_true", help="copy folders with all that is in them")
    parser.add_argument(
        "--ttl", type=int, default=120, help="seconds within which to connect, 10 to 300 (default: %(default)s)"
    )
    add_options(parser)
    options = parser.parse_args(argv)
    if len(options.paths) < 2:
        parser.error("name what to copy and where to")
    copy = plan(options.paths)
    check_here(copy, recursive=options.recursive)
    leave_no_key()
    run = _Run(load_context(options.context), options.ttl, recursive=options.recursive, quiet=options.json)
    written = run.up(copy) if copy.up else run.down(copy)
    files, size = len(written), sum(length for length, _ in written.values())
    told = {"workspace": copy.workspace, "direction": "to" if copy.up else "from", "files": files, "bytes": size}
    text = f"copied {files} file{'' if files == 1 else 's'}, {size} bytes {told['direction']} {copy.workspace}"
    show({**told, "sessions": run.sessions}, text, as_json=options.json)
    return 0


class _Run:
    """Copies, each with a key and a session of its own: a certificate logs in once."""

    def __init__(self, context: Context, ttl_s: int, *, recursive: bool, quiet: bool) -> None:
        self._context = context
        self._ttl_s = ttl_s
        self._recursive = recursive
        self._shows = sys.stdout.isatty() and not quiet
        self.sessions: list[str] = []

    def up(self, copy: Copy) -> dict[str, tuple[int, int]]:
        """Copy into the workspace over one connection; return the files that were read, as they are now."""
        self._scp(copy)
        found: dict[str, tuple[int, int]] = {}
        for source in copy.sources:
            found |= files_at(source, follow=True)  # scp has gone all the way, so no link leads back
        return found

    def down(self, copy: Copy) -> dict[str, tuple[int, int]]:
        """Copy out of the workspace; return the files that were written. scp connects anew for each source there."""
        found: dict[str, tuple[int, int]] = {}
        for source in copy.sources:
            place = arrives_at(source, copy.target)
            before = files_at(place)
            self._scp(msgspec.structs.replace(copy, sources=(source,)))
            found |= {name: seen for name, seen in files_at(place).items() if before.get(name) != seen}
        return found

    def _scp(self, copy: Copy) -> None:
        with tempfile.TemporaryDirectory(prefix="saw-cp-") as name:
            directory = Path(name)  # 0700, removed with the key when scp ends
            to = certify(self._context, copy.workspace, directory, self._ttl_s)
            self.sessions.append(to.session)
            line = scp_line(directory, to.alias, to.user, to.address, copy, recursive=self._recursive)
            code, said = _told(line, shows=self._shows)
        if code:
            raise _failure(code, said, to.session)


def _told(line: list[str], *, shows: bool) -> tuple[int, list[str]]:
    """Run scp and pass on what it says; return its exit code and the end of that. Its progress is shown on a terminal alone."""
    out = None if shows else subprocess.DEVNULL
    try:
        child = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE)
    except OSError as error:
        raise UnavailableError("scp cannot be started", cure="install the OpenSSH client") from error
    said: list[str] = []
    try:
        for raw in child.stderr or ():
            if text := _printable(raw):
                print(text, file=sys.stderr, flush=True)
                said = [*said, text][-_KEPT_LINES:]
        return child.wait(), said
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        if child.stderr is not None:
            child.stderr.close()


def _printable(raw: bytes) -> str:
    """Return a line without what could steer a terminal: names are the workspace's."""
    text = raw.decode("utf-8", "replace").strip()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _failure(code: int, lines: list[str], session: str) -> NotCopied | SessionFailed:
    details: dict[str, object] = {"exit_code": code, "said": lines, "session": session}
    ours = [line.removeprefix("saw: ") for line in lines if line.startswith("saw: ")]
    broke = [line for line in lines if line.endswith(("Connection closed", "lost connection"))]
    about = [line.removeprefix("scp: ") for line in lines if line.startswith("scp: ") and line not in broke]
    if ours or broke or (code == 255 and not about):
        others = [line for line in lines if line not in broke]
        why = [*ours[-1:], *others, "it ended without a word"][0]
        return SessionFailed(
            f"the session was refused or broke: {why}",
            cure=f"saw sessions says how {session} ended; then copy again",
            details=details,
        )
    why = [*about, "scp said nothing"][0]
    cure = next((cure for words, cure in _CURES if any(words in line for line in lines)), "see what scp said")
    return NotCopied(f"not everything was copied: {why}", cure=cure, details=details)
