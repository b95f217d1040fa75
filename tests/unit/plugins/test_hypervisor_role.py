"""Role ``hypervisor``: what its tasks do on a host that has nothing yet."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

TASKS = Path(__file__).parents[3] / "roles/hypervisor/tasks"


def test_in_check_mode_a_host_without_the_runtime_reads_what_it_is_handed() -> None:
    """Ansible writes a task's input whether the program reads it or not, and fails where that has ended before."""
    text = (TASKS / "trust.yml").read_text(encoding="utf-8")
    [script] = re.findall(r"\['sh', '-ec', '([^']+)', 'sh'\]", text)
    assert "/opt/saw/bin/saw" in script
    missing = script.replace("/opt/saw/bin/saw", "/opt/saw/bin/not-there")
    done = subprocess.run(
        ["sh", "-ec", missing, "sh", "--dry-run"], input=b"x" * (1 << 22), capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    # ``run`` passes over a program that does not read; ``cat`` at the end of a pipe does not.
    pipe = ["bash", "-c", 'set -o pipefail; head -c 4194304 /dev/zero | sh -ec "$0" sh', missing]
    assert subprocess.run(pipe, timeout=60, check=False).returncode == 0
