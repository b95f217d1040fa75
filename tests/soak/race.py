"""Many perimeter processes race for approved calls: each call is sent exactly once.

    python tests/soak/race.py [--workers 16] [--approvals 200] [--postgresql] [--brokers N] [--json]

All processes are one perimeter as far as the broker knows, so each may claim each call. Everything is approved before the first
of them starts. On PostgreSQL the claims go to so many brokers of one database, in turn. Exit status 1: a call was sent twice,
or not at all.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / "integration" / name) for name in ("broker", "."))]

from broker_rig import Lab  # noqa: E402
from sso_rig import free_port  # noqa: E402
from world import arrived, far_end, made, run, senders  # noqa: E402
from writers import Perimeter, wanted  # noqa: E402

from saw.broker.client import BrokerContext, Context, OperatorClient  # noqa: E402
from saw.broker.config import Listen  # noqa: E402
from saw.policy.keys import load_private_key  # noqa: E402
from saw.review.decide import decide, look  # noqa: E402

EACH_WORKSPACE = 50
"""Reviews of one workspace; the broker lets 64 wait."""
WAIT_S = 600


class NotOnce(AssertionError):
    """A call was sent twice, or not at all, or its review does not say what became of it."""


def approve(lab: Lab, approvals: int) -> set[str]:
    """Open so many reviews, approve them, and return their ids."""
    key = load_private_key(lab.directory / "ben.key")
    edge = Perimeter(lab)

    def one(number: int) -> str:
        asked = wanted(f"ws-{number // EACH_WORKSPACE}", f"call {number}")
        return str(edge.ask("POST", "/v1/perimeter/reviews", asked)["id"])

    def sign(review: str) -> None:
        client = OperatorClient(Context(BrokerContext(socket=lab.config.operator_socket)))
        with client.session():
            assert decide(client, look(client, review), key, "approve")["state"] == "approved"

    with ThreadPoolExecutor(4) as pool:
        opened = list(pool.map(one, range(approvals)))
        list(pool.map(sign, opened))
    edge.http.close()
    return set(opened)


@contextmanager
def brokers(lab: Lab, count: int) -> Iterator[list[Lab]]:
    """Start further brokers of the lab's database and files, so that there are ``count``."""
    found = [lab]
    with ExitStack() as stack:
        for _ in range(1, count):
            other = copy.copy(lab)
            place = Path(tempfile.mkdtemp(prefix="saw-race-"))
            stack.callback(shutil.rmtree, place)
            (place / "run").mkdir()
            other.directory, other.process = place, None
            other.config = msgspec.structs.replace(
                lab.config, listen=Listen("127.0.0.1", free_port()), operator_socket=str(place / "run/operator.sock"),
                audit_socket=str(place / "run/audit.sock"),
            )  # fmt: skip
            other.config_file = place / "broker.json"
            other.config_file.write_bytes(msgspec.json.encode(other.config))
            other.start()
            stack.callback(other.stop)
            found.append(other)
        yield found


def race(lab: Lab, workers: int, approvals: int, count: int = 1) -> dict[str, object]:
    """Let them race and return the figures; raises :class:`NotOnce`."""
    reviews = approve(lab, approvals)
    with ExitStack() as stack:
        found = stack.enter_context(brokers(lab, count))
        far = far_end(lab)
        stack.callback(far.stop)
        begun = time.monotonic()
        for number, broker in enumerate(found):
            share = workers // count + (number < workers % count)
            ports = lab if number == 0 else _at(lab, broker, number)
            stack.callback(senders(ports, far, share, ships=False).stop)
        while run(lab, "SELECT id FROM reviews WHERE state IN ('approved', 'executing')"):
            if time.monotonic() > begun + WAIT_S:
                raise NotOnce("some are not sent")
            time.sleep(0.1)
        took = time.monotonic() - begun
    calls = Counter(key for key, _ in arrived(lab))
    if set(calls) != reviews or set(calls.values()) != {1}:
        raise NotOnce(f"{len(calls)} of {len(reviews)} calls arrived, {sum(calls.values())} times")
    states = Counter(str(row[0]) for row in run(lab, "SELECT state FROM reviews"))
    if states != {"done": approvals}:
        raise NotOnce(f"the reviews are {dict(states)}")
    if not lab.operator.request("GET", "/v1/audit/verify")["complete"]:
        raise NotOnce("the trail does not hold")
    claims = [item for item in lab.events() if item["event"]["unmapped"]["saw"].get("to") == "executing"]
    if len(claims) != approvals:
        raise NotOnce(f"{len(claims)} claims are in the trail")
    return {
        "database": "postgresql" if lab.config.postgresql else "sqlite",
        "brokers": count,
        "workers": workers,
        "approvals": approvals,
        "arrived": sum(calls.values()),
        "seconds": round(took, 1),
        "sent_per_second": round(approvals / took, 1),
    }


def _at(lab: Lab, broker: Lab, number: int) -> Lab:
    """Return the lab of ``broker`` with a copy of the perimeter's key and certificate."""
    folder = lab.directory / f"at{number}"
    folder.mkdir()
    shutil.copytree(lab.directory / "edge", folder / "edge", ignore=shutil.ignore_patterns("sender*"))
    found = copy.copy(broker)
    found.directory = folder
    return found


def main(argv: Iterable[str] | None = None) -> int:
    """Run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--approvals", type=int, default=200)
    parser.add_argument("--postgresql", action="store_true", help="on a PostgreSQL server of its own")
    parser.add_argument("--brokers", type=int, default=1, help="so many brokers of one database (PostgreSQL)")
    parser.add_argument("--json", action="store_true", help="the figures as one JSON object")
    options = parser.parse_args(None if argv is None else list(argv))
    if options.brokers > 1 and not options.postgresql:
        parser.error("several brokers need --postgresql")
    with ExitStack() as stack:
        directory = Path(tempfile.mkdtemp(prefix="saw-race-"))
        stack.callback(shutil.rmtree, directory)
        settings = {}
        if options.postgresql:
            from postgres_rig import running_postgres

            settings["postgresql"] = stack.enter_context(running_postgres()).database()
        lab = made(directory, -(-options.approvals // EACH_WORKSPACE), **settings)
        stack.callback(lab.stop)
        try:
            found = race(lab, options.workers, options.approvals, options.brokers)
        except AssertionError as error:
            print(f"FAILED: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    print(json.dumps(found) if options.json else "\n".join(f"{name:>16}  {value}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
