"""What work on many files costs in the sandbox: the same commands outside and in the product's sandbox, in one run (root).

    python benchmarks/file_work.py [ROUNDS]

Outside: the agent's user on this machine. Inside: the same user on the same files in the sandbox of a compiled policy, with the
unit's view, namespaces, launcher (Landlock, system call filter) and environment; what systemd alone adds, the cgroup and its list
of system calls, is not in it. One program stays on each side and takes the times there, so no start of the sandbox is in them.

Sides alternate, and the fastest of all rounds counts, because neighbours only make one slower. After ``BUDGET_S`` seconds no
further round begins.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "src")]

from results import Goal, Result, line_of, result, table  # noqa: E402 - the module beside this one

from saw.conformance.local import HOME, PYTHON, UID, open_local  # noqa: E402
from saw.conformance.outside import Ground  # noqa: E402
from saw.runtime.leaf import LeafAuthority, publish_bundle  # noqa: E402

LOCK = ROOT / "tests" / "clients" / "package-lock.json"
PACKAGES = ("@anthropic-ai/sdk", "@grpc/grpc-js", "axios")
AUTHORITIES = Path("/etc/ssl/certs/ca-certificates.crt")
FOLDERS, FILES = 200, 100
UNITS = 24
BUDGET_S = 90.0
LINE_S = 300.0
GOAL = Goal("ratio", "most", 1.05)
NPM = f"npm install --offline --ignore-scripts --no-audit --no-fund --no-update-notifier --cache {HOME}/npm-cache"

# Runs on either side: reads what to prepare and what to time, writes seconds, seconds of processor time, status and words.
RUNNER = """
import json, os, resource, subprocess, sys, time
os.chdir(sys.argv[1])
def used():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
for line in sys.stdin:
    prepare, work = json.loads(line)
    subprocess.run(["/bin/sh", "-ec", prepare], check=True)
    before, begin = used(), time.perf_counter()
    done = subprocess.run(["/bin/sh", "-ec", work], stdin=subprocess.DEVNULL, capture_output=True, errors="replace", text=True)
    took = time.perf_counter() - begin, used() - before
    print(json.dumps([*took, done.returncode, (done.stdout + done.stderr)[-600:]]), flush=True)
"""


@dataclass(frozen=True)
class Work:
    """Commands that are timed; ``prepare`` is not. ``needs`` are programs without which it is not measured."""

    name: str
    note: str
    script: str
    prepare: str = ":"
    needs: tuple[str, ...] = ()


WORK = (
    Work(
        "files_git_status", f"git status in a tree of {FOLDERS * FILES:,} files", "git -C tree status --porcelain",
        needs=("git",),
    ),
    Work(
        "files_build", f"make, from nothing: {UNITS} C files, an archive, a program", "make -s -C c",
        "make -s -C c clean", ("make", "cc"),
    ),
    Work(
        "files_install", f"npm install of {', '.join(PACKAGES)} and what they need, from npm's cache", f"cd npm; {NPM}",
        "rm -rf npm/node_modules", ("npm", "node"),
    ),
)  # fmt: skip

MAKEFILE = """
objects := $(patsubst %.c,%.o,$(wildcard unit*.c))
program: main.o units.a
\t$(CC) -o $@ $^
units.a: $(objects)
\tar rcs $@ $^
%.o: %.c
\t$(CC) -O1 -MMD -c -o $@ $<
clean:
\trm -f *.o *.d units.a program
"""
HEADERS = "".join(
    f"#include <{name}.h>\n" for name in ("stdio", "stdlib", "string", "unistd", "sys/stat", "sys/socket", "time")
)
UNIT = """{headers}
int unit{number}(const char *name) {{
  struct stat found;
  char text[256];
  if (stat(name, &found)) return -1;
  snprintf(text, sizeof text, "%s %ld {number}", name, (long)found.st_size);
  return (int)strlen(text);
}}
"""


def sources(folder: Path) -> None:
    """Write the program that is built."""
    folder.mkdir()
    (folder / "Makefile").write_text(MAKEFILE, encoding="ascii")
    for number in range(UNITS):
        (folder / f"unit{number}.c").write_text(UNIT.format(headers=HEADERS, number=number), encoding="ascii")
    calls = " + ".join(f"unit{number}(name)" for number in range(UNITS))
    declared = "".join(f"int unit{number}(const char *);\n" for number in range(UNITS))
    (folder / "main.c").write_text(
        f"{HEADERS}{declared}int main(int count, char **names) {{\n"
        f"  const char *name = names[count - 1];\n  return ({calls}) == 0;\n}}\n",
        encoding="ascii",
    )


def repository(folder: Path) -> None:
    """Make a committed tree of many files; they have few contents, because git status reads none of them."""
    for number in range(FOLDERS):
        (folder / f"d{number}").mkdir(parents=True)
        for file in range(FILES):
            (folder / f"d{number}" / f"f{file}.txt").write_text(f"{file}\n" * 20, encoding="ascii")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)


def content_path(integrity: str) -> str:
    """Return where npm's cache keeps what has this ``integrity`` (Subresource Integrity), relative to its ``content-v2``.

    Raises ``ValueError`` for what is none.
    """
    algorithm, found, digest = integrity.split(maxsplit=1)[0].partition("-") if integrity.strip() else ("", "", "")
    try:
        raw = base64.b64decode(digest, validate=True).hex()
    except binascii.Error:
        raw = ""
    if not (algorithm.isalnum() and found and raw):
        raise ValueError(f"{integrity!r} is no integrity")
    return f"{algorithm}/{raw[:2]}/{raw[2:4]}/{raw[4:]}"


def packages(folder: Path, home: Path) -> str:
    """Lay down a project and the part of npm's cache that its lock file names; return what is missing."""
    cache = subprocess.run(["npm", "config", "get", "cache"], capture_output=True, text=True, check=True).stdout.strip()
    lock = json.loads(LOCK.read_bytes())
    for path, package in lock["packages"].items():
        if "integrity" not in package:
            continue
        place = Path("_cacache/content-v2", content_path(package["integrity"]))
        if (Path(cache) / place).is_file():
            (home / "npm-cache" / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(cache) / place, home / "npm-cache" / place)
        elif not package.get("optional"):
            return "npm's cache has not all of tests/clients: run scripts/bootstrap.sh"
        # With an address of its own, a package is taken by its hash, and nobody is asked for its list of versions.
        package["resolved"] = f"https://npm.example.com/{path.rpartition('node_modules/')[2]}-{package['version']}.tgz"
    folder.mkdir()
    (folder / LOCK.name).write_text(json.dumps(lock), encoding="utf-8")
    wanted = {"name": "work", "private": True, "dependencies": dict.fromkeys(PACKAGES, "*")}
    (folder / "package.json").write_text(json.dumps(wanted), encoding="ascii")
    return ""


class Side:
    """A program that runs and times commands, outside or inside."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")

    def timed(self, work: Work) -> tuple[float, float]:
        """Do ``work``; return its seconds and its seconds of processor time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([work.prepare, work.script]) + "\n")
        self._process.stdin.flush()
        line = line_of(self._process, LINE_S)
        if not line:
            raise RuntimeError(f"{work.name}: its side ended, see the messages above, or took more than {LINE_S} s")
        seconds, processor, status, words = json.loads(line)
        if status:
            raise RuntimeError(f"{work.name} ended with status {status}: {words}")
        return float(seconds), float(processor)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def sides(ground: Ground, trust: Path) -> dict[str, Side]:
    """Return both sides; the agent's files lie at ``HOME`` in ``ground``, and what it trusts is made in ``trust``."""
    _, inside = open_local(ground, PYTHON)
    publish_bundle(
        AUTHORITIES, LeafAuthority.ensure(trust / "ca", datetime.now(UTC)), trust / "sandbox" / "ca-bundle.pem"
    )
    done = ground.run("cp", "-r", f"{trust}/sandbox/.", "/run/saw/sandbox")
    if done.returncode:
        raise RuntimeError(done.stderr)
    agent = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "env", "-i"]
    plain = [f"HOME={HOME}", "PATH=/usr/local/bin:/usr/bin:/bin", "LANG=C.UTF-8"]
    program = ["-c", RUNNER, f"{HOME}/project"]
    return {
        "outside": Side([*ground.prefix(), *agent, *plain, PYTHON, "-I", "-u", *program]),
        "inside": Side([*inside[:-1], *program]),
    }


def measure(rounds: int) -> list[Result]:
    """Do each work ``rounds`` times on both sides, after one that does not count."""
    missing = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saw-bench-", dir="/var/tmp")))
        home, trust = folder / "home", folder / "trust"
        project = home / "project"
        project.mkdir(parents=True)
        for work in WORK:
            absent = [name for name in work.needs if shutil.which(name) is None]
            if absent:
                missing[work.name] = f"{' and '.join(absent)} not installed"
        if "files_git_status" not in missing:
            repository(project / "tree")
        sources(project / "c")
        if "files_install" not in missing and (lacking := packages(project / "npm", home)):
            missing["files_install"] = lacking
        subprocess.run(["chown", "-R", f"{UID}:{UID}", str(home)], check=True)
        ground = stack.enter_context(closing(Ground()))
        done = ground.run("sh", "-ec", 'mkdir -p "$2"; mount --bind "$1" "$2"', "sh", str(home), HOME)
        if done.returncode:
            raise RuntimeError(f"the agent's files could not be shown: {done.stderr}")
        both = {name: stack.enter_context(closing(side)) for name, side in sides(ground, trust).items()}
        todo = [work for work in WORK if work.name not in missing]
        told = {work.name: in_turns(both, work, rounds, BUDGET_S / len(todo)) for work in todo}
    return [
        result(work.name, None, "", note=f"not measured: {missing[work.name]}")
        if work.name in missing
        else row(work, told[work.name])
        for work in WORK
    ]


def in_turns(both: dict[str, Side], work: Work, rounds: int, budget: float) -> dict[str, list[tuple[float, float]]]:
    """Return what both sides told about ``work``; the first round is not counted, and one that is always made."""
    told: dict[str, list[tuple[float, float]]] = {name: [] for name in both}
    begin = time.monotonic()
    for number in range(1 + max(1, rounds)):
        for name in sorted(both, reverse=bool(number % 2)):
            took = both[name].timed(work)
            told[name] += [took] if number else []
        if number and time.monotonic() - begin > budget:
            break
    return told


def row(work: Work, told: dict[str, list[tuple[float, float]]]) -> Result:
    """Return the row of ``work``: the fastest round of each side, and in the note the least processor time."""
    (inside, used), (outside, base) = (tuple(map(min, zip(*told[name], strict=True))) for name in ("inside", "outside"))
    note = f"{work.note}; fastest of {len(told['inside'])}; processor time {used / base:.3f} x {base * 1000:.0f} ms"
    return result(work.name, inside * 1000, "ms", baseline=outside * 1000, note=note, goal=GOAL)


def main() -> None:
    """Measure and print."""
    print(table(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 10)))


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("needs root: it makes a sandbox")
    main()
