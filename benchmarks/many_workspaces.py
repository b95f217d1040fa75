"""Connections of many workspaces on one ring 2: what a call takes and what memory they hold, in one run (root).

    python benchmarks/many_workspaces.py [--workspaces N]

Each workspace has its own listener, network, identity and one connection that stays open. Calls go round all of them, one after
the other; the baseline is the same with the first ten alone, in turns. Memory is that of ring 2's Envoy and of the gatekeeper,
before the connections and with all of them.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INTEGRATION = ROOT / "tests" / "integration"
sys.path[:0] = [str(Path(__file__).parent), str(INTEGRATION), str(INTEGRATION / "gateway")]

import ring2_rig  # noqa: E402 - the rig lies with the tests
from results import Result, quantile, result, table  # noqa: E402 - the module beside this one

from saw import addressing  # noqa: E402

FEW = 10
ROUNDS = 3
LEASE_S = 3600
HEADERS = {"host": "api.example.com", "x-saw-ring1": "allow", "x-saw-binary": "/usr/bin/curl"}


def networks(rig: ring2_rig.Rig, numbers: Sequence[int]) -> None:
    """Make the networks of the workspaces by one call of ip(8); the rig has those of the first two."""
    words = []
    for number in numbers:
        bridge = addressing.bridge(number)
        words.append(f"link add {bridge} type bridge")
        words += [
            f"addr add {address}/30 dev {bridge}"
            for address in (addressing.gateway(number), addressing.workspace(number))
        ]
        words.append(f"link set {bridge} up")
    path = rig.directory / "networks"
    path.write_text("\n".join(words) + "\n", encoding="ascii")
    rig.namespace.ip("-batch", str(path))


def connected(rig: ring2_rig.Rig, number: int) -> http.client.HTTPConnection:
    """Return an open connection of the workspace, after its first call."""
    raw = rig.connect(addressing.gateway(number), 8443)
    link = http.client.HTTPConnection("ring2", timeout=60)
    link.sock = rig.svid(f"ws-{number}").wrap_socket(raw, server_hostname="ring2.saw.internal")
    call(link)
    return link


def call(link: http.client.HTTPConnection) -> float:
    """Make one call; return its milliseconds."""
    start = time.perf_counter()
    link.request("GET", "/v1/things", headers=HEADERS)
    answer = link.getresponse()
    body = answer.read()
    if answer.status != http.client.OK:
        raise RuntimeError(f"a call was answered {answer.status}: {body[:200]!r}")
    return (time.perf_counter() - start) * 1000


def resident(pid: int) -> float:
    """Return the resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


def measure(count: int) -> list[Result]:
    """Measure with ``count`` workspaces, ``FEW`` at least."""
    numbers = range(1, max(count, FEW) + 1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saw-bench-")))
        rig = ring2_rig.Rig(stack, folder)
        networks(rig, numbers[2:])
        like = rig.broker.workspaces["ws-1"]
        for number in numbers:
            given = {"id": f"ws-{number}", "number": number, "agent": f"agent-{number}", "lease_expires_at": LEASE_S}
            rig.broker.workspaces[f"ws-{number}"] = {**like, **given}
        rig.settle(lease_expires_at=LEASE_S)
        last = addressing.gateway(numbers[-1])
        ring2_rig.wait_for(lambda: rig.listens(last, 8443), "the last listener")
        pids = {"envoy": rig.envoy.pid, "gatekeeper": rig.gatekeeper.pid}
        before = {name: resident(pid) for name, pid in pids.items()}
        begin = time.perf_counter()
        with ThreadPoolExecutor(4) as pool:
            links = list(pool.map(lambda number: connected(rig, number), numbers))
        opened = time.perf_counter() - begin
        for link in links:
            stack.callback(link.close)
        few: list[float] = []
        many: list[float] = []
        for _ in range(ROUNDS):
            few += [call(links[turn % FEW]) for turn in range(len(links))]
            many += [call(link) for link in links]
        after = {name: resident(pid) for name, pid in pids.items()}
    made = []
    for share in (0.5, 0.99):
        note = f"{len(links)} workspaces' open connections, one call after the other; baseline: the same with {FEW}"
        value, baseline = quantile(many, share), quantile(few, share)
        made.append(result(f"crowd_call_p{round(share * 100)}", value, "ms", baseline=baseline, note=note))
    note = "handshake, first call and the client's own work; four at a time"
    made.append(result("crowd_connected", len(links) / opened, "/s", note=note))
    for name in pids:
        note = f"with {len(links)} connections; baseline: with the listeners alone"
        made.append(result(f"crowd_{name}_memory", after[name], "MiB", baseline=before[name], note=note))
    return made


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    most = addressing.DEFAULT_MOST
    parser.add_argument("--workspaces", type=int, default=most, help=f"{FEW} to {most} (default {most})")
    options = parser.parse_args()
    if not FEW <= options.workspaces <= most:
        parser.error(f"--workspaces is {FEW} to {most}")
    print(table(measure(options.workspaces)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
