"""A broker is killed again and again (signal 9) while it is written to and approved calls are sent; nothing may be lost.

    python tests/soak/broker_kill.py [--kills 1000] [--directory DIR] [--postgresql] [--cold 20] [--seed N] [--json]

After each kill it is started again, everything acknowledged since the last one is looked for in the trail, and every new event
must follow from the one before and from something that a writer asked for. Every 50 kills ``saw audit verify`` checks all,
and the perimeters that send are killed too; every tenth broker is killed while it starts. At the end every row of the register
and every call at the far end is compared with what was asked for: each idempotency key arrived at most once, once where the
review says ``done``, and never where it says ``failed`` or was not approved.

With a ``--directory`` a run that was broken off goes on there (SQLite). ``--cold N``: every Nth start is a whole process, the
others have their imports done. Exit status 1: something was lost, forged or sent twice.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / "integration" / name) for name in ("broker", "."))]

from audit_marks import Forged, Lost, Reader  # noqa: E402
from broker_rig import Lab, cli_here  # noqa: E402
from ledger import Ledger  # noqa: E402
from world import Brokers, Piped, arrived, far_end, made, reopened, run, senders  # noqa: E402
from writers import Writer  # noqa: E402

from saw.audit.chain import Head  # noqa: E402
from saw.broker.client import BrokerRefusal  # noqa: E402

WORKSPACES = 8
WRITERS = 4
VERIFY_EVERY = 50
START_KILLED_EVERY = 10
CLAIMS_END_S = 600
"""Longest time until the last claim has ended (seconds): a claim lasts 120, and the machine may be busy."""


class SentTwice(AssertionError):
    """The far end got a call more often than its review says."""


class Soak:
    """One run. ``seed`` chooses what writers do and when kills come."""

    def __init__(self, lab: Lab, ledger: Ledger, *, cold: int, seed: int) -> None:
        self.lab = lab
        self.ledger = ledger
        self.kills = int(ledger.progress.get("kills", 0))
        self._chance = random.Random(seed + self.kills)  # noqa: S311 - chooses moments, keeps no secret
        head = ledger.progress.get("head", [0, Head().hash])
        self._reader = Reader(ledger, Head(head[0], head[1]), WORKSPACES)
        self.brokers = Brokers(lab, cold)
        self.far = far_end(lab)
        self.senders: Piped | None = None
        self.starts: list[float] = []

    def close(self) -> None:
        """End everything."""
        for part in (self.senders, self.far, self.brokers):
            if isinstance(part, Piped):
                part.stop()
            elif part is not None:
                part.close()
        self.ledger.close()

    def begin(self) -> None:
        """Start the broker and what sends."""
        self.brokers.start()
        self.senders = senders(self.lab, self.far, 2, ships=True)

    def cycle(self) -> None:
        """Write, kill, start again, look."""
        with ThreadPoolExecutor(WRITERS) as pool:
            writers = [
                pool.submit(Writer(self.lab, self.ledger, WORKSPACES, self._chance.getrandbits(32)).until_it_is_gone)
                for _ in range(WRITERS)
            ]
            enough = self._chance.randint(3, 30)
            try:
                while self.ledger.count() < enough and not any(one.done() for one in writers):
                    wait(writers, timeout=0.005)
                wait(writers, timeout=self._chance.random() * 0.03)
            finally:  # writers end with the broker alone, whatever ends this
                self.brokers.kill()
            for one in writers:
                one.result(120)
        self.kills += 1
        if self.kills % START_KILLED_EVERY == 0:
            self.brokers.begin()
            time.sleep(self._chance.random())  # a moment of its start, whichever
            self.brokers.kill()
            self.kills += 1
        begun = time.perf_counter()
        self.brokers.start()
        self.starts.append(time.perf_counter() - begun)
        self.look()

    def look(self) -> None:
        """Compare what is new in the trail with what was acknowledged."""
        with self.lab.operator.session() as client:
            seen = self._reader.follow(client)
            for mark in self.ledger.take_fresh():
                if mark not in seen:
                    raise Lost(f"{mark} was acknowledged before kill {self.kills} and is not in the trail")
        head = self._reader.head
        self.ledger.save(kills=self.kills, head=[head.seq, head.hash])

    def verify(self) -> None:
        """Have the broker check its whole trail."""
        context = self.lab.directory / "context.json"
        context.write_text(json.dumps({"broker": {"socket": self.lab.config.operator_socket}}))
        done = cli_here("audit", "verify", "--context", str(context), "--json")
        if done.returncode != 0:
            raise Forged(done.stdout + done.stderr)

    def renew_senders(self) -> None:
        """Kill the perimeters with whatever they have on its way, and start others on the same spools."""
        assert self.senders is not None
        self.senders.stop()
        self.senders = senders(self.lab, self.far, 2, ships=True)

    def settled(self) -> dict[str, int]:
        """Let everything come to its end, compare all of it, and return how many reviews ended how."""
        for review in {str(row[0]) for row in run(self.lab, "SELECT id FROM reviews WHERE state = 'pending'")}:
            self.ledger.will("cancel", review)
            self.lab.operator.request("POST", f"/v1/reviews/{review}/cancel", {"reason": "end"})
        deadline = time.monotonic() + CLAIMS_END_S
        while run(self.lab, "SELECT id FROM reviews WHERE state IN ('approved', 'executing')"):
            if time.monotonic() > deadline:
                raise Lost("a review did not come to its end")
            for row in run(self.lab, "SELECT id FROM reviews WHERE state = 'executing'"):
                self.lab.operator.request("GET", f"/v1/reviews/{row[0]}")  # its claim may have ended
            time.sleep(1)
        self.look()
        self.verify()
        self._register()
        return self._far_end()

    def _register(self) -> None:
        there = {str(row[0]) for row in run(self.lab, "SELECT id FROM workspaces")}
        asked = {mark[1] for mark in self.ledger.tried if mark[0] == "workspace"}
        acknowledged = {mark[1] for mark in self.ledger.acknowledged if mark[0] == "workspace"}
        setup = {f"ws-{number}" for number in range(WORKSPACES)}
        if there - asked - setup:
            raise Forged(f"workspaces that nobody registered: {there - asked - setup}")
        if acknowledged - there:
            raise Lost(f"workspaces that are gone: {acknowledged - there}")
        retired = {str(row[0]) for row in run(self.lab, "SELECT id FROM workspaces WHERE state = 'decommissioned'")}
        if left := {mark[1] for mark in self.ledger.acknowledged if mark[0] == "gone"} - retired:
            raise Lost(f"workspaces that were retired and are not: {left}")
        signed = {
            (str(decision), str(review), str(by))
            for review, by, decision in run(self.lab, "SELECT review_id, approver, decision FROM review_decisions")
        }
        if signed - self.ledger.tried:
            raise Forged(f"decisions that nobody signed: {signed - self.ledger.tried}")
        taken = {mark for mark in self.ledger.acknowledged if mark[0] in {"approve", "deny"}}
        if taken - signed:
            raise Lost(f"decisions that are gone: {taken - signed}")

    def _far_end(self) -> dict[str, int]:
        rows = {str(one): (str(state), str(digest)) for one, state, digest in run(self.lab, REVIEWS)}
        opened = {mark[1]: mark[2] for mark in self.ledger.acknowledged if mark[0] == "opened"}
        if gone := {review for review, digest in opened.items() if rows.get(review, ("", ""))[1] != digest}:
            raise Lost(f"reviews that are gone or other ones: {gone}")
        if forged := {review for review, (_, digest) in rows.items() if digest not in self.ledger.calls}:
            raise Forged(f"reviews that nobody opened: {forged}")
        calls = arrived(self.lab)
        count = Counter(key for key, _ in calls)
        for key, body in calls:
            if key not in rows or self.ledger.calls[rows[key][1]] != body:
                raise Forged(f"a call that nobody made arrived as {key}")
        for review, (state, _) in rows.items():
            least, most = {"done": (1, 1), "unknown": (0, 1)}.get(state, (0, 0))
            if not least <= count[review] <= most:
                raise SentTwice(f"{review} is {state} and arrived {count[review]} times")
        approved = {mark[1] for mark in self.ledger.tried if mark[0] == "approve"}
        if unasked := set(count) - approved:
            raise Forged(f"calls that nobody approved arrived: {unasked}")
        return dict(Counter(state for state, _ in rows.values()))


REVIEWS = "SELECT id, state, request_digest FROM reviews"


def soak(
    lab: Lab, journal: Path, kills: int, *, cold: int, seed: int, say: bool = True, every: int = VERIFY_EVERY
) -> dict[str, object]:
    """Kill until ``kills`` were made, settle, and return the figures; raises what was wrong."""
    whole = Soak(lab, Ledger(journal), cold=cold, seed=seed)
    begun, first = time.monotonic(), whole.kills
    try:
        whole.begin()
        whole.look()
        checked = whole.kills // every
        while whole.kills < kills:
            whole.cycle()
            if whole.kills // every > checked:
                checked = whole.kills // every
                whole.verify()
                whole.renew_senders()
                if say:
                    left = (time.monotonic() - begun) / (whole.kills - first) * (kills - whole.kills)
                    print(
                        f"{whole.kills} kills, {len(whole.ledger.acknowledged)} acknowledged, {whole._reader.head.seq} events, "
                        f"{len(arrived(lab))} calls sent, {left / 60:.0f} min left",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
        states = whole.settled()
        starts = sorted(whole.starts) or [0.0]
        return {
            "database": "postgresql" if lab.config.postgresql else "sqlite",
            "kills": whole.kills,
            "acknowledged": len(whole.ledger.acknowledged),
            "asked": len(whole.ledger.tried) + len(whole.ledger.calls),
            "events": whole._reader.head.seq,
            "arrived": len(arrived(lab)),
            "reviews": states,
            "start_p50_s": round(starts[len(starts) // 2], 2),
            "seconds": round(time.monotonic() - begun),
        }
    finally:
        whole.close()


def main(argv: Iterable[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--directory", type=Path, help="where everything lies; a run that was broken off goes on there")
    parser.add_argument("--postgresql", action="store_true", help="on a PostgreSQL server of its own")
    parser.add_argument("--cold", type=int, default=20, help="every so manyth start is a whole process")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    options = parser.parse_args(None if argv is None else list(argv))
    if options.postgresql and options.directory:
        parser.error("--directory is for SQLite: the server of --postgresql goes with the run")
    with ExitStack() as stack:
        directory = options.directory or Path(tempfile.mkdtemp(prefix="saw-soak-"))
        if options.directory is None:
            stack.callback(shutil.rmtree, directory)
        settings = {}
        if options.postgresql:
            from postgres_rig import running_postgres

            settings["postgresql"] = stack.enter_context(running_postgres()).database()
        if (directory / "journal").exists() and not options.postgresql:
            lab = reopened(directory)
        else:
            directory.mkdir(exist_ok=True)
            lab = made(directory, WORKSPACES, **settings)
            lab.stop()
        try:
            found = soak(lab, directory / "journal", options.kills, cold=options.cold, seed=options.seed)
        except (AssertionError, BrokerRefusal) as error:
            print(f"FAILED: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    print(json.dumps(found) if options.json else "\n".join(f"{name:>14}  {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
