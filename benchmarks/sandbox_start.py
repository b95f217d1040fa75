"""What a start in the sandbox costs: a bare execution against ``saw-run`` into the prepared sandbox, in one run.

Run as root: ``python benchmarks/sandbox_start.py [ROUNDS]``. Reports medians; the kinds alternate, so that a busy neighbour hits
all of them.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from results import Goal, Result, result, table  # noqa: E402 - the module beside this one

SOURCE = Path(__file__).parents[1] / "src"
PYTHON = "/usr/bin/python3"
RUNTIME = SOURCE / "saw" / "runtime"
LAUNCH = '{"uid": 65534, "minimum_abi": 0, "read_only": ["/"], "read_write": ["%s"], "devices": ["/dev"]}'


GOAL = Goal("difference", "most", 15.0)
BARE = "/bin/true"


def timed(command: list[str]) -> float:
    """Return the seconds that ``command`` took; it must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - start


def measure(rounds: int) -> list[Result]:
    """Start ``/bin/true`` ``rounds`` times in each way; return the medians."""
    with tempfile.TemporaryDirectory(prefix="saw-bench-") as folder:
        os.chown(folder, 65534, 65534)
        launch = Path(folder, "launch.json")
        launch.write_text(LAUNCH % folder, encoding="ascii")
        launch.chmod(0o644)
        agent = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        launcher = [
            *agent,
            "env",
            f"PYTHONPATH={SOURCE}",
            PYTHON,
            "-m",
            "saw.runtime.launcher",
            "--launch",
            str(launch),
            "--",
        ]
        execd = [PYTHON, "-I", "-S", str(RUNTIME / "shell_execd.py"), "--directory", folder, "--no-tmux"]
        daemon = subprocess.Popen([*launcher, *execd])
        client = str(Path(folder, "client.pyc"))
        build = f"import py_compile; py_compile.compile({str(RUNTIME / 'shell_client.py')!r}, cfile={client!r})"
        subprocess.run([PYTHON, "-c", build], check=True)
        socket = Path(folder, "exec.sock")
        deadline = time.monotonic() + 20
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        kinds = {
            "bare": [BARE],
            "sandbox_start": [
                PYTHON,
                "-I",
                "-S",
                client,
                "--socket",
                str(socket),
                "--",
                BARE,
            ],
            "sandbox_start_client_floor": [PYTHON, "-I", "-S", "-c", "pass"],
            "sandbox_own_each_time": [*launcher, BARE],
        }
        samples: dict[str, list[float]] = {name: [] for name in kinds}
        try:
            for _ in range(rounds):
                for name, command in kinds.items():
                    samples[name].append(timed(command))
        finally:
            daemon.terminate()
            daemon.wait()
    bare = statistics.median(samples.pop("bare")) * 1000
    notes = {
        "sandbox_start": "saw-run /bin/true into the prepared sandbox; baseline: bare /bin/true",
        "sandbox_start_client_floor": "python3 -I -S -c pass: what starting the client itself takes",
        "sandbox_own_each_time": "saw-exec /bin/true: own Landlock domain and seccomp filter for one command",
    }
    return [
        result(
            name, statistics.median(values) * 1000, "ms", baseline=bare, note=notes[name],
            goal=GOAL if name == "sandbox_start" else None,
        )
        for name, values in samples.items()
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    print(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 100)))


if __name__ == "__main__":
    main()
