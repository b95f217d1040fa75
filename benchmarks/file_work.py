"""What work on many files costs in the sandbox: the same commands bare and under the product's launcher, in one run (root).

    python benchmarks/file_work.py [ROUNDS]

Both run as the same user on the same tree of 20,000 files. The launcher puts its Landlock domain and system call filter around
the command; its own start is measured by ``sandbox_start.py`` and taken off here by a command that does nothing. Kinds
alternate, and the fastest of all rounds counts, because neighbours only make one slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]

from results import Goal, Result, result, table  # noqa: E402 - the module beside this one

SOURCE = Path(__file__).parents[1] / "src"
PYTHON = "/usr/bin/python3"
NOBODY = 65534
FOLDERS, FILES = 200, 100
GOAL = Goal("ratio", "most", 1.05)
LAUNCH = '{"uid": 65534, "minimum_abi": 0, "read_only": ["/"], "read_write": ["%s"], "devices": ["/dev"]}'
NOTHING = "true"
WORK = {
    "files_git_status": "git -C tree status --porcelain",
    "files_build": f"rm -rf built && cp -r tree/python built && {PYTHON} -m compileall -q -j 1 built",
    "files_install": "rm -rf installed && mkdir installed && tar -C installed -xf tree.tar",
    "files_search": "grep -r --include='*.txt' -l 'no such words' tree || true",
}
NOTES = {
    "files_git_status": "git status in a tree of 20,000 files",
    "files_build": "a tree of Python sources is copied and compiled",
    "files_install": "an archive of 20,000 files is unpacked over an earlier one, as a package manager does",
    "files_search": "grep through 20,000 files",
}


def tree(folder: Path) -> None:
    """Make the repository and the archive in ``folder``."""
    place = folder / "tree"
    for number in range(FOLDERS):
        (place / f"d{number}").mkdir(parents=True)
        for file in range(FILES):
            (place / f"d{number}" / f"f{file}.txt").write_text(f"{number} {file}\n" * 20, encoding="ascii")
    subprocess.run(["cp", "-r", str(SOURCE / "saw"), str(place / "python")], check=True)
    git = ["git", "-C", str(place), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run(["tar", "-C", str(place), "-cf", str(folder / "tree.tar"), "."], check=True)
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", str(folder)], check=True)


def timed(command: list[str]) -> float:
    """Return the seconds that ``command`` took; it must succeed."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun


def measure(rounds: int) -> list[Result]:
    """Do all of the work ``rounds`` times in each way; return the fastest of each, without what nothing takes."""
    with tempfile.TemporaryDirectory(prefix="saw-bench-") as name:
        folder = Path(name)
        tree(folder)
        launch = folder / "launch.json"
        launch.write_text(LAUNCH % folder, encoding="ascii")
        launch.chmod(0o644)
        agent = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "env", f"HOME={folder}"]
        inside = [*agent, f"PYTHONPATH={SOURCE}", PYTHON, "-m", "saw.runtime.launcher", "--launch", str(launch), "--"]
        ways = {"bare": agent, "sandbox": inside}
        best = {(work, way): float("inf") for work in ("nothing", *WORK) for way in ways}
        for _ in range(rounds):
            for work, script in {"nothing": NOTHING, **WORK}.items():
                for way, prefix in ways.items():
                    took = timed([*prefix, "/bin/sh", "-ec", f'cd "$0"; {script}', str(folder)])
                    best[work, way] = min(best[work, way], took)
    found = []
    for work in WORK:
        bare, sandbox = (best[work, way] - best["nothing", way] for way in ways)
        found.append(result(work, sandbox * 1000, "ms", baseline=bare * 1000, note=NOTES[work], goal=GOAL))
    return found


def main() -> None:
    """Measure and print."""
    print(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10)))


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("needs root: it changes to another user as the sandbox does")
    main()
