"""``saw exec``: run one command in a workspace, word for word; ``saw ssh`` with a command, without a shell's second reading."""

from __future__ import annotations

import argparse
import shlex

from saw.broker.client import load_context
from saw.cli.ssh import attach


def main(argv: list[str]) -> int:
    """Run ``saw exec WORKSPACE [--] COMMAND …`` and return the command's exit code, 255 where the connection failed."""
    parser = argparse.ArgumentParser(
        prog="saw exec",
        usage="saw exec [--context FILE] [--ttl S] WORKSPACE [--] COMMAND …",
        description="Run one command in a workspace. Its words arrive as they are; for a line of shell run sh -c LINE.",
    )
    parser.add_argument("--context", help="context file (default: the file named by SAW_CONTEXT)")
    parser.add_argument(
        "--ttl", type=int, default=120, help="seconds within which to connect, 10 to 300 (default: %(default)s)"
    )
    parser.add_argument("workspace", help="workspace id")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command and its arguments")
    options = parser.parse_args(argv)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("name the command; saw ssh opens a terminal")
    # sshd hands a line to a shell: quoted, it falls apart into the same words.
    return attach(load_context(options.context), options.workspace, [shlex.join(command)], options.ttl)
