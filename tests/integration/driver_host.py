"""A host for the qemu driver on this machine: what it keeps and calls lies in a folder of the test, mounted over its places.

The service manager at the far end is a program that the test brings along.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAW = Path(sys.executable).with_name("saw")
ENTER = """set -e
mount --make-rprivate /
mkdir -p /var/lib/saw
mount --bind {base}/state /var/lib/saw
mount -t tmpfs tmpfs /opt
mkdir -p /opt/saw/bin
cp {base}/saw /opt/saw/bin/saw
exec "$@"
"""


class DriverHost:
    """``base`` has ``state`` as /var/lib/saw, ``saw`` (the text ``command``) as /opt/saw/bin/saw, and ``bin`` first on the path.

    ``context`` leads to the broker.
    """

    def __init__(self, base: Path, context: str, *, command: str, systemctl: str) -> None:
        self.base = base
        (base / "state/images").mkdir(parents=True)
        (base / "bin").mkdir()
        for path, text in ((base / "saw", command), (base / "bin/systemctl", systemctl)):
            path.write_text(text)
            path.chmod(0o755)
        self.collections = base / "installed"
        link = self.collections / "ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)
        self.environment = {
            **os.environ,
            "PATH": f"{base}/bin:{os.environ['PATH']}",
            "ANSIBLE_COLLECTIONS_PATH": str(self.collections),
            "SAW_CONTEXT": context,
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
        }
        self.enter: tuple[str, ...] = ("unshare", "--mount", "sh", "-c", ENTER.format(base=base), "sh")
        """What stands before a command that runs on this host."""

    @staticmethod
    def path(image: str) -> str:
        return f"/var/lib/saw/images/{image}.qcow2"

    def inside(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.enter, *command],
            capture_output=True, text=True, check=False, timeout=180, env=self.environment,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def pin_root(self, image: str) -> None:
        """Take the officers' root, and the record of ``image``, from the broker, as the role hypervisor does."""
        handed = self.base / "handed.json"
        handed.write_text(self.inside(str(SAW), "image", "hand-over", image).stdout)
        self.inside("/opt/saw/bin/saw", "vm", "accept", "--pin", "--from", str(handed))
