"""From a kill to the first refused call at the perimeter, with real Envoy and a real gatekeeper (root).

The clock starts when the state of the workspace changes at the far end of the gatekeeper's long-poll (which here is a broker
of the tests, not the real one) and stops when a call with a valid SVID no longer gets through. Calls follow each other
without a pause, so the resolution is that of one call.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "integration" / "gateway")]

from results import Goal, Result, quantile, result  # noqa: E402 - the modules beside this one
from ring2_rig import Rig, wait_for  # noqa: E402 - the rig lies with the tests

GOAL = Goal("value", "most", 2.0)
NOTE = "far end of the long-poll: the tests' broker; new TLS connection for every call"


def measure(kills: int) -> list[Result]:
    """Kill ``kills`` times."""
    times: list[float] = []
    with ExitStack() as stack:
        rig = Rig(stack, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saw-bench-"))))
        context = rig.svid()

        def passes() -> bool:
            try:
                return rig.call(context=context).status == 200
            except OSError:
                return False

        for _ in range(kills):
            rig.reset()
            rig.settled()
            wait_for(passes, "an allowed call")
            start = time.perf_counter()
            rig.broker.put("ws-1", state="quarantined")
            wait_for(lambda: not passes(), "a refused call")
            times.append(time.perf_counter() - start)
    return [
        result("kill_to_refused_p50", quantile(times, 0.5), "s", note=NOTE),
        result("kill_to_refused_p99", quantile(times, 0.99), "s", goal=GOAL, note=f"{kills} kills; {NOTE}"),
    ]
