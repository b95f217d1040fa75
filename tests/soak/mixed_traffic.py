"""Mixed traffic of one workspace through both rings, as fast as it goes, for as long as is asked for.

    sudo .venv/bin/python tests/soak/mixed_traffic.py [--minutes 60] [--workers 2] [--progress FILE] [--json]

Real clients in the product's sandbox read, write, stream a model's answers, talk over WebSockets and gRPC, query over GraphQL,
call tools of an MCP server, open sessions of PostgreSQL, clone with git, and try what is refused. Ring 2 has two gatekeepers; a
neighbour without a sandbox, whose gatekeeper is the other one, reads all along. Memory and descriptors of ring 1, its decider,
ring 2 and both gatekeepers are written down all along, with what clients did and what was seen of it, as lines of JSON in FILE
(build/soak/mixed-traffic.jsonl): a run that is broken off leaves them. SIGTERM ends the clients, and then all is compared as at
the usual end: what was allowed arrived once and has one row in the trail, whose chain is whole; nothing else arrived or has one;
what was refused has its line in ring 1's log. A clone counts as the calls that it takes. WebSockets, gRPC and PostgreSQL are not
counted where they arrive, only in the trail. Exit status 1: a call was answered otherwise, stuck, lost or not recorded, or a
process grew.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
INTEGRATION = HERE.parent / "integration"
sys.path[:0] = [str(INTEGRATION / name) for name in ("clients", "ring1", "gateway", ".")]
PROGRESS = HERE.parents[1] / "build" / "soak" / "mixed-traffic.jsonl"

import clients_database  # noqa: E402
import clients_far_ends  # noqa: E402
from clients_rig import NAME, PYTHON, Done, Workspace  # noqa: E402
from mixed_trail import Trail, of_kind  # noqa: E402
from model_end import Model  # noqa: E402
from ring2_rig import Rig, wait_for  # noqa: E402

from saw.conformance.local import HOME  # noqa: E402

EVERY_S = 10.0
"""How often processes are looked at (seconds)."""
WARM = 0.25
"""The part of the run in which memory may still grow: pools, caches, the allocator's arenas."""
MORE_MEMORY, MORE_KIB, MORE_FILES = 0.10, 16 * 1024, 16
"""What the last quarter may have above the first quarter after the warm part: a share of it and KiB; descriptors."""
GIT_EVERY_S = 5.0
FOLDER = f"{HOME}/project/mixed"
"""Where the clients write what they did, and are told to stop."""
NEIGHBOUR, ITS_NUMBER = "ws-2", 2
"""A workspace whose own gatekeeper is the second one; that of the clients is the first."""
SVID_S = 300
LAST_ROWS_S = 300
ENOUGH = 20
"""From how many looks on growth is judged: fewer are of the start alone."""


class Faulty(AssertionError):
    """Something was lost, recorded wrongly, or grew."""


def looked_at(pids: dict[str, int]) -> dict[str, tuple[int, int]]:
    """Return resident memory (KiB) and open descriptors of each process."""
    found = {}
    for name, pid in pids.items():
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
        found[name] = resident, sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return found


def growth(samples: list[dict[str, tuple[int, int]]]) -> dict[str, dict[str, int]]:
    """Return what each process had early (after the warm part) and late, as medians of a quarter of the samples."""
    steady = samples[int(len(samples) * WARM) :]
    quarter = max(1, len(steady) // 4)
    told = {}
    for name in samples[0]:
        early, late = steady[:quarter], steady[-quarter:]
        told[name] = {
            f"{what}_{when}": round(statistics.median(one[name][place] for one in part))
            for place, what in ((0, "kib"), (1, "files"))
            for when, part in (("early", early), ("late", late))
        }
    return told


class Run:
    """One run in ``directory``, told line by line in ``progress``."""

    def __init__(self, stack: ExitStack, directory: Path, progress: Path) -> None:
        self.ring2 = Rig(stack, directory, 2)
        self.workspace = Workspace(self.ring2)
        stack.callback(self.workspace.stop)
        self.workspace.open()
        stack.enter_context(clients_database.serving(self.workspace))
        self._repository(directory)
        far = self.workspace.far
        far.handlers["models.example.com"] = Model({"/v1/chat/completions": ("none", {})})
        far.handlers["graph.example.com"] = _graph
        far.handlers["tools.example.com"] = _tools
        self.workspace.put(f"{FOLDER}/begun", b"")
        self.trail = Trail(self.ring2.broker, far)
        progress.parent.mkdir(parents=True, exist_ok=True)
        self._progress = stack.enter_context(progress.open("w", encoding="utf-8"))
        self._over = threading.Event()
        self.clones = self.read = 0
        self.told_to_end = False

    def _repository(self, directory: Path) -> None:
        bare = directory / "repositories" / "team" / "demo.git"
        bare.mkdir(parents=True)
        git = ("git", "-C", str(bare), "-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run([*git, "init", "-q", "--bare", "."], check=True)
        tree = subprocess.run([*git, "mktree"], input="", check=True, capture_output=True, text=True).stdout.strip()
        commit = subprocess.run([*git, "commit-tree", "-m", "first", tree], check=True, capture_output=True, text=True)
        subprocess.run([*git, "update-ref", "HEAD", commit.stdout.strip()], check=True)
        self.workspace.far.handlers["git.example.com"] = partial(clients_far_ends.git, directory / "repositories")

    def pids(self) -> dict[str, int]:
        """Return the processes that may not grow."""
        own = self.workspace.processes
        gatekeepers = {
            f"gatekeeper {number}": _program(one.pid) for number, one in sorted(self.ring2.gatekeepers.items())
        }
        return {
            "ring 1": _program(own["ring1"].pid), "decider": _program(own["decide"].pid),
            "ring 2": _program(self.ring2.envoy.pid), **gatekeepers,
        }  # fmt: skip

    def end(self) -> None:
        """Have the traffic end before its time; it takes effect within about a second."""
        self.told_to_end = True

    def renewed(self) -> None:
        """Renew what a workspace's own daemons and the broker renew: its lease on both sides and the sign of life."""
        self.workspace.lease(timedelta(hours=1))
        self.workspace.heartbeat()
        for name in (NAME, NEIGHBOUR):
            self.ring2.broker.put(name, lease_expires_at=3600)

    def cloning(self) -> None:
        """Clone again and again until the run is over."""
        while not self._over.is_set():
            place = f"/tmp/clone-{self.clones}"
            done = self.workspace.client(
                "sh", "-c", 'git clone -q https://git.example.com/team/demo.git "$1" && rm -r "$1"', "sh", place
            )
            if done.code != 0:
                raise Faulty(f"git: {done.words}")
            self.clones += 1
            self._over.wait(GIT_EVERY_S)

    def neighbour(self) -> None:
        """Read as the neighbour until the run is over, with a connection for each call."""
        renew = 0.0
        while not self._over.is_set():
            if time.monotonic() >= renew:
                context, renew = self.ring2.svid(NEIGHBOUR), time.monotonic() + SVID_S
            target = f"/v1/neighbour/neighbour-0-{self.read}"
            answer = self.ring2.call(target=target, number=ITS_NUMBER, context=context)
            if answer.status != 200:
                raise Faulty(f"the neighbour: {answer.status} {answer.body[:500]!r}")
            self.read += 1

    def clients(self, seconds: float, workers: int) -> Done:
        """Let the clients work, in the way that leads to the database as well."""
        script = (HERE / "mixed_client.py").read_text(encoding="utf-8")
        return clients_database.helper(
            self.workspace, clients_database.HOST, PYTHON, "-B", "-c", script, str(seconds), str(workers), FOLDER,
            variables={"PYTHONPATH": "/run/clients/python"}, timeout=seconds + 300,
        )  # fmt: skip

    def traffic(
        self, seconds: float, workers: int, say: bool
    ) -> tuple[dict[str, int], list[dict[str, tuple[int, int]]]]:
        """Let everybody work; return how many calls each worker made, and what the processes had meanwhile."""
        pids, samples, begun, looked = self.pids(), [], time.monotonic(), 0.0
        pool = ThreadPoolExecutor(3)
        clients = pool.submit(self.clients, seconds, workers)
        beside = [pool.submit(self.cloning), pool.submit(self.neighbour)]
        stopped = False
        try:
            while not wait([clients], 1.0).done:
                if not stopped and (self.told_to_end or any(one.done() for one in beside)):
                    self.workspace.put(f"{FOLDER}/stop", b"")
                    stopped = True
                if time.monotonic() - looked >= EVERY_S:
                    looked = time.monotonic()
                    samples.append(looked_at(pids))
                    self.renewed()
                    self.progress(looked - begun, samples[-1], say=say)
            samples.append(looked_at(pids))
            self.progress(time.monotonic() - begun, samples[-1], say=say)
        except FileNotFoundError as error:
            raise Faulty(f"a process ended: {error.filename}") from error
        finally:
            self._over.set()
            pool.shutdown(wait=False)  # whoever ends this early stops the workspace first, and with it the clients
        for one in beside:
            one.result()
        done = clients.result()
        if done.code != 0:
            raise Faulty(done.words)
        told = json.loads(done.out)
        if told["wrong"]:
            raise Faulty("\n".join(told["wrong"]))
        return {**told["done"], "neighbour-0": self.read}, samples

    def progress(self, seconds: float, processes: dict[str, tuple[int, int]], *, say: bool) -> None:
        """Write down how it stands: seconds since the start, KiB and descriptors, calls answered, and what was seen of them."""
        self.trail.take()
        written = self.workspace.ground.run("cat", f"{FOLDER}/done").stdout
        line = {
            "seconds": round(seconds), "processes": processes, "clients": json.loads(written) if written else {},
            "clones": self.clones, "neighbour": self.read, "seen": self.trail.seen,
        }  # fmt: skip
        self._told(line)
        if say:
            now = ", ".join(f"{name} {kib // 1024} MiB/{files}" for name, (kib, files) in processes.items())
            print(f"{round(seconds)} s: {now}; {self.trail.total} rows", file=sys.stderr)

    def verdict(self, words: list[str]) -> None:
        """Write the last line: what was found to be wrong, nothing where all is well."""
        self._told({"verdict": "failed" if words else "passed", "wrong": words})

    def _told(self, line: dict[str, object]) -> None:
        self._progress.write(json.dumps(line) + "\n")
        self._progress.flush()

    def compared(self, done: dict[str, int]) -> dict[str, int]:
        """Compare the calls that were made with the far end, the trail and ring 1's log; return how many rows there are."""
        done = {**done, "clone-0": self.clones}
        with suppress(AssertionError):  # what did not come is told by its name
            wait_for(lambda: self.trail.complete(done), "the last rows of the trail", LAST_ROWS_S)
        if wrong := self.trail.compared(done, self.workspace.directory / "decide.log"):
            raise Faulty("\n".join(wrong))
        return {"rows": self.trail.total, "refusals": of_kind(done, "refused")}


async def _graph(_: object, body: bytes) -> clients_far_ends.Answer:
    return 200, "application/json", json.dumps({"data": {"asked": json.loads(body)["query"]}}).encode()


async def _tools(_: object, body: bytes) -> clients_far_ends.Answer:
    asked = json.loads(body)
    content = [{"type": "text", "text": f"found {asked['params']['arguments']['q']}"}]
    said = {"jsonrpc": "2.0", "id": asked["id"], "result": {"content": content}}
    return 200, "application/json", json.dumps(said).encode()


def _program(pid: int) -> int:
    """Return the process at the end of wrappers such as ip(8) and nsenter(1), which have one child each."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        if len(children) != 1 or Path(f"/proc/{pid}/comm").read_text().strip() not in {"ip", "nsenter", "unshare"}:
            break
        pid = int(children[0])
    return pid


def grown(told: dict[str, dict[str, int]]) -> list[str]:
    """Return what grew beyond what may be."""
    found = []
    for name, had in told.items():
        if had["kib_late"] > had["kib_early"] * (1 + MORE_MEMORY) + MORE_KIB:
            found.append(f"{name} grew from {had['kib_early']} to {had['kib_late']} KiB")
        if had["files_late"] > had["files_early"] + MORE_FILES:
            found.append(f"{name} had {had['files_early']} descriptors and then {had['files_late']}")
    return found


def soak(minutes: float, workers: int, progress: Path, *, say: bool) -> dict[str, object]:
    """Run for ``minutes``, or until SIGTERM; raises :class:`Faulty`. Returns the figures."""
    with tempfile.TemporaryDirectory(prefix="saw-mixed-") as place, ExitStack() as stack:
        run = Run(stack, Path(place), progress)
        signal.signal(signal.SIGTERM, lambda *_: run.end())
        try:
            found = _figures(run, minutes, workers, say=say)
        except Faulty as error:
            run.verdict(str(error).splitlines())
            raise
        finally:
            signal.signal(signal.SIGTERM, _leave)
        run.verdict([])
        return found


def _figures(run: Run, minutes: float, workers: int, *, say: bool) -> dict[str, object]:
    begun = time.monotonic()
    done, samples = run.traffic(minutes * 60, workers, say)
    seconds = time.monotonic() - begun
    told = run.compared(done)
    processes = growth(samples)
    by_kind: Counter[str] = Counter()
    for name, count in done.items():
        by_kind[name.rpartition("-")[0]] += count
    found: dict[str, object] = {
        "seconds": round(seconds), "told_to_end": run.told_to_end, "calls": sum(done.values()), "each": dict(by_kind),
        "clones": run.clones, **told, "processes": processes,
    }  # fmt: skip
    if len(samples) >= ENOUGH and (bad := grown(processes)):
        print(json.dumps(found), file=sys.stderr)
        raise Faulty("\n".join(bad))
    return found


def _leave(*_: object) -> None:
    sys.exit(143)


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2, help="of each kind of call")
    parser.add_argument("--progress", type=Path, default=PROGRESS, help="a file that is written all along")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, _leave)  # before and after the traffic: what it made is taken away then, too
    try:
        found = soak(options.minutes, options.workers, options.progress, say=not options.json)
    except Faulty as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
