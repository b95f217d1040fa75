"""How long a live session through the bastion lasts once it must end: from the operator's call to the end of the person's ssh.

Real broker, bastion and SSH servers on loopback. Each sample opens a session on a terminal, waits until it shows something,
and either ends it or kills its workspace. Usage: python benchmarks/session_drop.py [SAMPLES]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests" / "integration"
sys.path[:0] = [str(TESTS / "sessions"), str(TESTS / "broker")]

from broker_rig import Lab  # noqa: E402
from session_rig import RULES, Bastion, Terminal, running  # noqa: E402


def sample(bastion: Bastion, *, kill: bool) -> float:
    """Return seconds from the call to the end of ssh."""
    folder, session = bastion.certify()
    client = Terminal(bastion.line(folder, extra=("-tt",)))
    client.type("stty -echo; echo live-$((40+2))\n")
    client.until("live-42")
    with bastion.lab.operator.session() as operator:
        begun = time.perf_counter()
        if kill:
            operator.request("POST", "/v1/workspaces/ws-a/kill", {"reason": "benchmark"})
        else:
            operator.request("POST", f"/v1/sessions/{session}/end", {"reason": "benchmark"})
        client.ends()
        took = time.perf_counter() - begun
    bastion.closed(session)
    bastion.sql("UPDATE workspaces SET state = 'active' WHERE id = ?", "ws-a")
    return took


def main(samples: int) -> None:
    """Measure both and print one JSON object."""
    directory = Path(tempfile.mkdtemp(prefix="saw-drop-"))
    lab = Lab(directory, sessions=RULES)
    found: dict[str, object] = {"samples": samples}
    try:
        lab.start()
        with running(lab, directory) as bastion:
            for name, kill in (("ended", False), ("killed", True)):
                times = sorted(sample(bastion, kill=kill) for _ in range(samples))
                found[name] = {"p50_ms": round(times[len(times) // 2] * 1000), "most_ms": round(times[-1] * 1000)}
    finally:
        lab.stop()
        shutil.rmtree(directory)
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
