"""``saw-agent-init``: process 1 of an always-on agent's sandbox. It starts the agent, reaps orphans and ends as the agent ends.

The kernel keeps signals from process 1 of a PID namespace that it has no handler for, so that a program which knows nothing of
this could not be stopped but by force, and nobody would wait for processes that lost their parent. systemd sends its signals to
every process of the unit; this one only waits. Exit code: the agent's, or 128 and the number of the signal that ended it.

Runs under ``python -I -S`` behind the launcher, which has confined it: standard library only.
"""

from __future__ import annotations

import os
import signal
import sys

_WAITED = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
_RESET = sorted(signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 126, 127


def main(command: list[str]) -> int:
    """Run ``command`` to its end; return the exit code."""
    if not command:
        print("usage: agent_init.py PROGRAM [ARGUMENT…]", file=sys.stderr)
        return 2
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    try:
        agent = os.posix_spawn(command[0], command, os.environ, setsigmask=(), setsigdef=_RESET)
    except OSError as error:
        print(f"saw-agent-init: {command[0]}: {error.strerror}", file=sys.stderr)
        return EXIT_NOT_FOUND if isinstance(error, FileNotFoundError) else EXIT_NOT_EXECUTABLE
    while True:
        code = _reap(agent)
        if code is not None:
            return code
        signal.sigwait(_WAITED)


def _reap(agent: int) -> int | None:
    """Wait for every process that has ended; return the agent's exit code when it is one of them."""
    while True:
        try:
            process, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return EXIT_NOT_EXECUTABLE  # somebody else waited for the agent; there is nothing left to wait for
        if process == 0:
            return None
        if process == agent:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
