"""Mixed traffic of one workspace through both rings, as fast as it goes, for as long as is asked for.

    sudo .venv/bin/python tests/soak/mixed_traffic.py [--minutes 60] [--workers 2] [--json]

Real clients in the product's sandbox read, write, stream a model's answers, talk over WebSockets and gRPC, clone with git, and
try what is refused. Memory and descriptors of ring 1, its decider, ring 2 and the gatekeeper are written down all along. At the
end reads, notes and refused paths are looked for: what was allowed arrived once and has one row in the trail, whose chain is
whole; what was refused arrived nowhere and has its line in ring 1's log. Calls of models are counted at the far end; WebSockets,
gRPC and clones are judged by their answers. Exit status 1: a call was answered otherwise, stuck, lost or not recorded, or a
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
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
INTEGRATION = HERE.parent / "integration"
sys.path[:0] = [str(INTEGRATION / name) for name in ("clients", "ring1", "gateway", ".")]

import clients_far_ends  # noqa: E402
from clients_rig import NAME, Workspace  # noqa: E402
from model_end import Model  # noqa: E402
from ring2_rig import Rig, wait_for  # noqa: E402

from saw.audit.chain import verify_chain  # noqa: E402

EVERY_S = 10.0
"""How often processes are looked at (seconds)."""
WARM = 0.25
"""The part of the run in which memory may still grow: pools, caches, the allocator's arenas."""
MORE_MEMORY, MORE_KIB, MORE_FILES = 0.10, 16 * 1024, 16
"""What the last quarter may have above the first quarter after the warm part: a share of it and KiB; descriptors."""
GIT_EVERY_S = 5.0
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
    """One run in ``directory``."""

    def __init__(self, stack: ExitStack, directory: Path) -> None:
        self.ring2 = Rig(stack, directory)
        self.workspace = Workspace(self.ring2)
        stack.callback(self.workspace.stop)
        self.workspace.open()
        self._repository(directory)
        self.workspace.far.handlers["models.example.com"] = Model({"/v1/chat/completions": ("none", {})})
        self._over = threading.Event()
        self.clones = 0

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
        assert self.ring2.gatekeeper is not None
        own = self.workspace.processes
        return {
            "ring 1": _program(own["ring1"].pid), "decider": _program(own["decide"].pid),
            "ring 2": _program(self.ring2.envoy.pid), "gatekeeper": _program(self.ring2.gatekeeper.pid),
        }  # fmt: skip

    def renewed(self) -> None:
        """Renew what a workspace's own daemons and the broker renew: its lease on both sides and the sign of life."""
        self.workspace.lease(timedelta(hours=1))
        self.workspace.heartbeat()
        self.ring2.broker.put(NAME, lease_expires_at=3600)

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

    def traffic(
        self, seconds: float, workers: int, say: bool
    ) -> tuple[dict[str, int], list[dict[str, tuple[int, int]]]]:
        """Let the clients work; return how many calls each worker made, and what the processes had meanwhile."""
        script = (HERE / "mixed_client.py").read_text(encoding="utf-8")
        pids, samples, begun = self.pids(), [], time.monotonic()
        pool = ThreadPoolExecutor(2)
        clients = pool.submit(self.workspace.python, script, str(seconds), str(workers), timeout=seconds + 300)
        cloning = pool.submit(self.cloning)
        try:
            while not wait([clients], EVERY_S).done:
                samples.append(looked_at(pids))
                self.renewed()
                if say:
                    left = max(0.0, seconds - time.monotonic() + begun) / 60
                    now = ", ".join(f"{name} {kib // 1024} MiB/{files}" for name, (kib, files) in samples[-1].items())
                    print(f"{now}; {len(self.ring2.broker.events)} rows, {left:.1f} min left", file=sys.stderr)
            samples.append(looked_at(pids))
        except FileNotFoundError as error:
            raise Faulty(f"a process ended: {error.filename}") from error
        finally:
            self._over.set()
            pool.shutdown(wait=False)  # whoever ends this early stops the workspace first, and with it the clients
        cloning.result()
        done = clients.result()
        if done.code != 0:
            raise Faulty(done.words)
        told = json.loads(done.out)
        if told["wrong"]:
            raise Faulty("\n".join(told["wrong"]))
        return told["done"], samples

    def compared(self, done: dict[str, int]) -> dict[str, int]:
        """Compare the calls that were made with the far end, the trail and ring 1's log; return how many rows there are."""
        reads = {
            f"/v1/mixed/{name}-{number}"
            for name, count in done.items()
            if name.startswith("read-")
            for number in range(count)
        }
        refused = {
            f"/v2/mixed/{name}-{number}"
            for name, count in done.items()
            if name.startswith("refused-")
            for number in range(count)
        }
        arrived = Counter(path for _, host, path in self.workspace.far.arrived if host == "api.example.com")
        if twice := {path for path in reads if arrived[path] != 1}:
            raise Faulty(f"{len(twice)} calls did not arrive once, such as {sorted(twice)[:3]}")
        if past := {path for path in arrived if path.startswith("/v2/")}:
            raise Faulty(f"calls that were refused arrived: {sorted(past)[:3]}")

        def rows() -> Counter[str]:
            return Counter(_path(one.event) for one in list(self.ring2.broker.events) if _verdict(one.event) == "allow")

        notes, models = (
            sum(count for name, count in done.items() if name.startswith(kind)) for kind in ("write-", "model-")
        )
        if (reached := sum(host == "models.example.com" for _, host, _ in self.workspace.far.arrived)) != models:
            raise Faulty(f"{models} calls of models that are allowed, {reached} arrived")

        def complete() -> bool:
            found = rows()
            return found["/v1/notes"] >= notes and not reads - set(found)

        wait_for(complete, "the last rows of the trail", 120)
        recorded = rows()
        if more := {path for path in reads if recorded[path] != 1}:
            raise Faulty(f"calls with several rows: {sorted(more)[:3]}")
        report = verify_chain(self.ring2.broker.events)
        if not report.complete:
            raise Faulty(f"the trail: {report.findings[:3]}")
        told = Counter(self._refusals())
        if silent := {path for path in refused if told[path] != 1}:
            raise Faulty(f"refusals without a line of their own: {sorted(silent)[:3]}")
        if (arrived["/v1/notes"], recorded["/v1/notes"]) != (notes, notes):
            raise Faulty(f"{notes} notes, {arrived['/v1/notes']} arrived, {recorded['/v1/notes']} rows")
        return {"rows": len(self.ring2.broker.events), "refusals": len(refused)}

    def _refusals(self) -> list[str]:
        with (self.workspace.directory / "decide.log").open(encoding="utf-8", errors="replace") as lines:
            return [json.loads(line[line.index("{") :])["path"] for line in lines if '"verdict":"deny"' in line]


def _program(pid: int) -> int:
    """Return the process at the end of wrappers such as ip(8) and nsenter(1), which have one child each."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
        if len(children) != 1 or Path(f"/proc/{pid}/comm").read_text().strip() not in {"ip", "nsenter", "unshare"}:
            break
        pid = int(children[0])
    return pid


def _verdict(event: dict) -> str:
    return str(event.get("unmapped", {}).get("saw", {}).get("verdict", ""))


def _path(event: dict) -> str:
    return str(event.get("http_request", {}).get("url", {}).get("path", ""))


def grown(told: dict[str, dict[str, int]]) -> list[str]:
    """Return what grew beyond what may be."""
    found = []
    for name, had in told.items():
        if had["kib_late"] > had["kib_early"] * (1 + MORE_MEMORY) + MORE_KIB:
            found.append(f"{name} grew from {had['kib_early']} to {had['kib_late']} KiB")
        if had["files_late"] > had["files_early"] + MORE_FILES:
            found.append(f"{name} had {had['files_early']} descriptors and then {had['files_late']}")
    return found


def soak(minutes: float, workers: int, *, say: bool) -> dict[str, object]:
    """Run for ``minutes``; raises :class:`Faulty`. Returns the figures."""
    with tempfile.TemporaryDirectory(prefix="saw-mixed-") as place, ExitStack() as stack:
        run = Run(stack, Path(place))
        begun = time.monotonic()
        done, samples = run.traffic(minutes * 60, workers, say)
        seconds = time.monotonic() - begun
        told = run.compared(done)
        processes = growth(samples)
        by_kind: Counter[str] = Counter()
        for name, count in done.items():
            by_kind[name.rpartition("-")[0]] += count
        found: dict[str, object] = {
            "seconds": round(seconds), "calls": sum(done.values()), "each": dict(by_kind), "clones": run.clones,
            **told, "processes": processes,
        }  # fmt: skip
        if len(samples) >= ENOUGH and (bad := grown(processes)):
            print(json.dumps(found), file=sys.stderr)
            raise Faulty("; ".join(bad))
        return found


def main() -> int:
    """Parse the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--workers", type=int, default=2, help="of each kind of call")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it made is taken away then, too
    try:
        found = soak(options.minutes, options.workers, say=not options.json)
    except Faulty as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found) if options.json else json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
