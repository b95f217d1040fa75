"""Becomes the ssh of a terminal: ``python -I -m saw.broker.terminal.child FOLDER PORT -- ssh …``, with a terminal as its input.

It dies with the broker, and confines itself first (Landlock): ssh reads the system's programs and its own ``FOLDER``, and
connects to TCP ``PORT`` alone where the kernel can tell. So what a bastion may do to its client does not reach the broker's
keys, although both run as one account. Only the standard library is imported beside that: this is on the way to the first prompt.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import termios

from saw.errors import SawError
from saw.runtime.landlock import Confinement, confine

NOT_CONFINED = 125
_PR_SET_PDEATHSIG = 1
_READ = (
    *("/usr", "/lib", "/lib64", "/bin", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ld.so.cache"),
    *("/etc/ssl/openssl.cnf", "/etc/crypto-policies", "/etc/localtime", "/proc/self"),
)
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/pts", "/dev/ptmx")


def main(argv: list[str]) -> int:
    """Confine this process and execute the command; return only when that failed."""
    folder, port, command = argv[0], int(argv[1]), argv[3:]
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return NOT_CONFINED
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    try:
        confine(Confinement(_READ, (folder,), _DEVICES, (port,)), minimum=1)
        os.chdir(folder)
        os.execvp(command[0], command)  # noqa: S606 - the broker made the line
    except (SawError, OSError) as error:
        print(f"saw: the terminal cannot be opened: {error}", end="\r\n")
    return NOT_CONFINED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
