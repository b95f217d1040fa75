"""Many live sessions on one bastion: are all recorded, what do they take, and does a kill end exactly those it shall (root).

    python benchmarks/many_sessions.py [--sessions 200] [--killed 20] [--at-once 4] [--json]

Real broker, bastion, recorders and SSH servers on loopback, each session on a terminal. Once all are live each is typed into;
then the workspace of ``--killed`` of them is killed, and the time runs from the call to the end of the last of their clients,
while the others go on. At the end every recording is verified as ``saw replay --verify`` does. Memory is the proportional
share (PSS) of everything under the bastion's SSH server. Fewer than asked for are opened when less than 1 GiB of memory is
left. Exit status 1: something of this is not so, or the last of the killed ended later than 2 s after the call.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "integration"
sys.path[:0] = [str(Path(__file__).parent), str(TESTS / "sessions"), str(TESTS / "broker")]

from broker_rig import Lab, cli_here  # noqa: E402
from session_rig import RULES, Bastion, Terminal, activate, running  # noqa: E402

LIVE_S = 600
"""Longest time for a session to become live or to end (seconds)."""
KILL_S = 2.0
"""Longest time from the kill to the end of the last client (seconds)."""
LEFT_KIB = 1024**2


class NotSo(AssertionError):
    """Something that must hold does not."""


class Live:
    """A session and its client."""

    def __init__(self, bastion: Bastion, number: int, folder: Path, session: str) -> None:
        begun = time.perf_counter()
        self.id = session
        self.client = Terminal(bastion.line(folder, extra=("-tt",)))
        self.client.type(f"stty -echo; echo live-$(({number}+1000))\n")
        self.client.until(f"live-{number + 1000}", LIVE_S)
        self.took = time.perf_counter() - begun

    def says(self, number: int) -> float:
        """Type something and return the seconds until its answer was shown."""
        begun = time.perf_counter()
        self.client.type(f"echo said-$(({number}+5000))\n")
        self.client.until(f"said-{number + 5000}", LIVE_S)
        return time.perf_counter() - begun


def available() -> int:
    """Return how much memory is left (KiB)."""
    words = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(words.split()[1])


def shares(parent: int) -> dict[str, float]:
    """Return the proportional share of memory (KiB) of everything that descends from ``parent``, by program."""
    children = defaultdict(list)
    for place in Path("/proc").glob("[0-9]*"):
        try:
            children[int((place / "stat").read_text().rpartition(")")[2].split()[1])].append(int(place.name))
        except OSError:
            continue
    found: Counter[str] = Counter()
    waiting = list(children[parent])
    while waiting:
        pid = waiting.pop()
        waiting += children[pid]
        try:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        found["recorder" if name.startswith(("python", "saw")) else name] += int(rollup.split("Pss:")[1].split()[0])
    return dict(found)


def ended(clients: list[Terminal], begun: float) -> list[float]:
    """Wait for the end of all ``clients`` at once; return the seconds since ``begun`` of each."""

    def one(client: Terminal) -> float:
        client.ends(LIVE_S)
        return time.perf_counter() - begun

    with ThreadPoolExecutor(len(clients)) as pool:
        return list(pool.map(one, clients))


def in_time(drops: list[float]) -> bool:
    """Tell whether all killed sessions have ended as fast as they must; ``drops`` are the seconds since the kill."""
    return max(drops) <= KILL_S


def opened(bastion: Bastion, count: int, at_once: int) -> list[Live]:
    """Open ``count`` sessions, or as many as memory holds."""
    found: list[Live] = []
    with ThreadPoolExecutor(at_once) as pool:
        while len(found) < count and available() > LEFT_KIB:
            first = len(found)
            given = [(number, *bastion.certify()) for number in range(first, min(count, first + at_once))]
            found += pool.map(lambda one: Live(bastion, *one), given)
            if len(found) % 20 < at_once:
                say(f"{len(found)} live, {available() // 1024} MiB left")
    return found


def closed(bastion: Bastion, live: list[Live]) -> Counter[str]:
    """Wait until every end was reported and every recording handed in; return how many sessions ended for what reason."""
    deadline = time.monotonic() + LIVE_S
    found: Counter[str] = Counter()
    for one in live:
        while True:
            row = bastion.show(one.id)
            if row["state"] == "closed" and row["recording_stored_at"] is not None:
                break
            if time.monotonic() > deadline:
                raise NotSo(f"the end of {one.id} was not reported, or its recording not handed in")
            time.sleep(0.2)
        found[str(row["reason"])] += 1
    return found


def say(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def sessions(bastion: Bastion, count: int, killed: int, at_once: int) -> dict[str, object]:
    """Do all of it and return the figures."""
    lab = bastion.lab
    activate(lab, "ws-b")
    live = opened(bastion, count, at_once)
    if len(live) <= killed:
        raise NotSo(f"memory holds {len(live)} sessions alone")
    memory = shares(bastion.servers[1].pid)
    say(f"{sum(memory.values()) / 1024 / len(live):.1f} MiB each: {memory}")
    echo = sorted(one.says(number) for number, one in enumerate(live))
    rows = lab.operator.request("GET", "/v1/sessions?live=1")["sessions"]
    if {row["id"] for row in rows if row["state"] == "open"} != {one.id for one in live}:
        raise NotSo("the broker lists other sessions than are live")
    # One server stands for all workspaces here: these are sessions of another workspace as far as the broker knows.
    gone, stay = live[::-1][:killed], live[: len(live) - killed]
    for one in gone:
        bastion.sql("UPDATE sessions SET workspace_id = 'ws-b' WHERE id = ?", one.id)
    begun = time.perf_counter()
    lab.operator.request("POST", "/v1/workspaces/ws-b/kill", {"reason": "benchmark"})
    answered = time.perf_counter() - begun
    drops = sorted(ended([one.client for one in gone], begun))
    for number, one in enumerate(stay):
        one.says(number + 1000)
        one.client.type("exit\n")
    for one in stay:
        if one.client.ends(LIVE_S) != 0:
            raise NotSo(f"{one.id} ended otherwise than by its own end")
    say(f"{killed} dropped within {drops[-1]:.2f} s, the others have ended; waiting for reports and recordings")
    begun = time.perf_counter()
    reasons = closed(bastion, live)
    reported = time.perf_counter() - begun
    if reasons["workspace_quarantined"] != killed:
        raise NotSo(f"the sessions ended as {dict(reasons)}")
    context = bastion.directory / "replay.json"
    context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
    os.environ["SAW_CONTEXT"] = str(context)
    for one in live:
        done = cli_here("replay", one.id, "--verify")
        if done.returncode != 0:
            raise NotSo(f"the recording of {one.id} does not hold: {done.stderr}")
    first = sorted(one.took for one in live)
    return {
        "sessions": len(live),
        "asked": count,
        "recorded_and_verified": len(live),
        "mib_each": round(sum(memory.values()) / 1024 / len(live), 1),
        "mib_each_by_program": {name: round(kib / 1024 / len(live), 1) for name, kib in memory.items()},
        "opened_p50_s": round(first[len(first) // 2], 2),
        "echo_p50_ms": round(echo[len(echo) // 2] * 1000, 1),
        "echo_most_ms": round(echo[-1] * 1000, 1),
        "killed": killed,
        "kill_answered_s": round(answered, 3),
        "first_dropped_s": round(drops[0], 3),
        "last_dropped_s": round(drops[-1], 3),
        "reported_after_s": round(reported, 1),
        "dropped_in_time": in_time(drops),
        "ended_as": dict(reasons),
    }


def main(argv: Iterable[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--killed", type=int, default=20, help="so many of them are of the workspace that is killed")
    parser.add_argument("--at-once", type=int, default=4, help="so many are opened at a time")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    options = parser.parse_args(None if argv is None else list(argv))
    directory = Path(tempfile.mkdtemp(prefix="saw-many-"))
    lab = Lab(directory, sessions=RULES)
    try:
        lab.start()
        with running(lab, directory) as bastion:
            found = sessions(bastion, options.sessions, options.killed, options.at_once)
    except NotSo as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        lab.stop()
        shutil.rmtree(directory)
    print(json.dumps(found) if options.json else "\n".join(f"{name:>22}  {value}" for name, value in found.items()))
    if not found["dropped_in_time"]:
        print(
            f"FAILED: the last was dropped after {found['last_dropped_s']} s, not within {KILL_S:g} s", file=sys.stderr
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
