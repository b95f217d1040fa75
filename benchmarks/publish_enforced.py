"""From a publication to its enforcement in the workspace, with real TUF, policyd, saw-decide and Envoy.

The clock starts when two officers' signatures are put on the new targets and the repository accepts the publication; it stops
when policyd has read back from saw-decide *and* from Envoy that they enforce the new digest and says so. The long-poll that
wakes policyd is the real one; its far end is a broker of the tests. The attestation agent answers at once: a quote and its
verification (tens of milliseconds with a real TPM) are not in these figures.
"""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests" / "integration" / "policyd")]

from policyd_lab import GOVERNANCE, POLICY, Lab, until  # noqa: E402 - the rig lies with the tests
from results import Goal, Result, quantile, result  # noqa: E402 - the module beside this one

from saw.policy.bundle import build_manifest, describe, sign  # noqa: E402
from saw.policy.loader import load_members  # noqa: E402

GOAL = Goal("value", "most", 2.0)
NOTE = "attestation answers at once (no TPM quote in the figure)"


def release(lab: Lab, path: str, host: str) -> bytes:
    """Return a signed bundle of the next revision that allows ``path`` at ``host``."""
    lab.revision += 1
    now = datetime.now(UTC)
    text = POLICY.replace("PATH", path).replace("api.example.com", host)
    members = {"policy.yaml": text.encode(), "governance.yaml": GOVERNANCE.encode()}
    start, end = now - timedelta(hours=1), now + timedelta(days=1)
    manifest = build_manifest(load_members(members), lab.revision, start, end)
    return sign(manifest, members, lab.officers[:2])


def enforced(lab: Lab, raw: bytes) -> float:
    """Publish ``raw`` and return the seconds until it is enforced."""
    digest = describe(raw)[0]

    def told() -> bool:
        try:
            state = lab.told()
        except FileNotFoundError:
            return False
        return state["policy_digest"] == digest and state["state"] == "loaded"

    start = time.perf_counter()
    lab.publish(raw)
    until(told, "the publication is enforced")
    seconds = time.perf_counter() - start
    assert lab.current() == digest
    return seconds


def measure(publications: int) -> list[Result]:
    """Publish ``publications`` times with other rules, and as often with another host (which Envoy must validate)."""
    with contextlib.redirect_stderr(io.StringIO()):
        rules, hosts = _times(publications)
    rows = []
    for name, times in (("rules", rules), ("hosts", hosts)):
        note = f"{publications} publications; other {name}; {NOTE}"
        rows += [
            result(f"publish_to_enforced_{name}_p50", quantile(times, 0.5), "s", note=note),
            result(f"publish_to_enforced_{name}_p99", quantile(times, 0.99), "s", goal=GOAL, note=note),
        ]
    return rows


def _times(publications: int) -> tuple[list[float], list[float]]:
    lab = Lab()
    try:
        # Envoy starts on the closed generation, as in a workspace.
        agent = lab.agent()
        agent.cycle()
        lab.start_envoy()
        thread = threading.Thread(target=agent.run, daemon=True)
        thread.start()
        try:
            enforced(lab, release(lab, "/warm/**", "api.example.com"))
            rules = [enforced(lab, release(lab, f"/v{n}/**", "api.example.com")) for n in range(publications)]
            hosts = [enforced(lab, release(lab, "/v1/**", f"api{n}.example.com")) for n in range(publications)]
        finally:
            agent.stop()
            thread.join(15)
    finally:
        lab.stop()
    return rules, hosts
