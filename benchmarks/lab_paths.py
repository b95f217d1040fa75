"""The real paths on a running lab (``make workspace``): kill -> refused, and publish -> enforced, seen from the sandbox.

A loop in the workspace's sandbox makes one governed call after another, so the resolution is that of one call there. Both
clocks start when the operator's command starts and so contain the command itself, which is the baseline of its row.

*Kill*: ``saw workspace kill``, which also ends the loop's own session; a refusal or that end stops the clock. Releasing the
workspace makes it attest again, which takes long under emulation, so three kills are taken. *Publish*: signed and staged
before the clock starts; odd publications deny a path that even ones, which are the blueprint as it was, allow.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent)]

from results import Goal, Result, quantile, result  # noqa: E402 - the module beside this one

from saw.lab.demo import wait_shell  # noqa: E402
from saw.lab.process import wait_for  # noqa: E402
from saw.lab.steps import Progress  # noqa: E402
from saw.lab.topology import Lab  # noqa: E402
from saw.lab.up import Bringup, exclusive  # noqa: E402

GOAL = Goal("value", "most", 2.0)
KILL_ROWS = ("workspace_kill_to_refused_p50", "workspace_kill_to_refused_p99")
PUBLISH_ROWS = ("workspace_publish_to_enforced_p50", "workspace_publish_to_enforced_p99")
URL = "https://api.example.com/v1/items"
NO_LAB = "not measured: no workspace runs here; run `make workspace`, then `make bench`"
LEFT_ALONE = "not measured: --no-lab leaves the running lab alone"


def running(lab: Lab) -> bool:
    """Tell whether the hosts of ``lab`` run."""
    return lab.inventory_file.exists() and all(host.running() for host in lab.hosts())


def absent(names: tuple[str, ...], note: str) -> list[Result]:
    """Return rows that say why nothing was measured."""
    return [result(name, None, "s", note=note) for name in names]


class Caller:
    """A loop of governed calls in the sandbox over one ``saw ssh`` session; notes each HTTP status as it comes."""

    def __init__(self, lab: Lab, workspace: str, seconds: int) -> None:
        loop = (
            f"end=$(( $(date +%s) + {seconds} )); while [ $(date +%s) -lt $end ]; do "
            f"curl -s -o /dev/null -m 5 -w '%{{http_code}}\\n' {URL}; done"
        )
        saw = Path(sys.executable).with_name("saw")
        self.seen: list[tuple[float, str]] = []
        self.process = subprocess.Popen(
            [str(saw), "ssh", workspace, "--", "sh", "-c", shlex.quote(loop)],
            env={**os.environ, "SAW_CONTEXT": str(lab.context_file)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.seen.append((time.monotonic(), line.strip()))

    def ended(self) -> bool:
        """Tell whether the session is over."""
        return self.process.poll() is not None

    def first(self, after: float, wanted: Callable[[str], bool]) -> float | None:
        """Return when the first status that is ``wanted`` came after ``after``."""
        return next((at for at, status in list(self.seen) if at > after and wanted(status)), None)

    def wait(self, after: float, wanted: Callable[[str], bool], what: str, patience: float = 120) -> float:
        """Wait for such a status; raises when the session ends before."""

        def came() -> bool:
            if self.first(after, wanted) is None and self.ended():
                raise RuntimeError(f"the session in the sandbox ended before {what}")
            return self.first(after, wanted) is not None

        wait_for(what, came, patience=patience, interval=0.02)
        found = self.first(after, wanted)
        return found if found is not None else time.monotonic()

    def close(self) -> None:
        """End the session."""
        self.process.kill()
        self.process.wait()
        self.thread.join(5)
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def calling(lab: Lab, workspace: str, seconds: int) -> Iterator[Caller]:
    """A caller whose calls are allowed."""
    caller = Caller(lab, workspace, seconds)
    try:
        caller.wait(0.0, lambda status: status == "200", "an allowed call")
        yield caller
    finally:
        caller.close()


def active_job(lab: Lab) -> tuple[Bringup, str]:
    """Return the means to drive ``lab`` and its workspace; raises unless that one is active."""
    job = Bringup(lab, Progress(total=1))
    workspace = job.workspace_id()
    state = job.saw("workspace", "show", workspace)["state"]
    if state != "active":
        raise RuntimeError(f"workspace {workspace} is {state}, not active; run `make workspace`")
    return job, workspace


def kill_once(job: Bringup, workspace: str) -> tuple[float, float]:
    """Kill the workspace and release it again; return the seconds to the refusal and those of the command."""
    with calling(job.lab, workspace, 300) as caller:
        begin = time.monotonic()
        done: list[float] = []

        def command() -> None:
            job.saw("workspace", "kill", workspace, "--reason", "measurement")
            done.append(time.monotonic())

        thread = threading.Thread(target=command)
        thread.start()
        refused = None
        deadline = begin + 60
        while refused is None and time.monotonic() < deadline:
            refused = caller.first(begin, lambda status: status != "200")
            if refused is None and caller.ended():
                refused = time.monotonic()
            if refused is None:
                caller.thread.join(0.01)
        thread.join()
        last = max((at for at, status in list(caller.seen) if status == "200"), default=begin)
    if refused is None or not done:
        raise RuntimeError("no call was refused within 60 s of the kill, or the kill itself failed")
    if last > refused:
        raise RuntimeError("a call was allowed after one had been refused")
    for verb in ("stop", "start"):
        job.saw("workspace", verb, workspace, "--reason", "released after a measurement")
    wait_for(
        "the released workspace is active",
        lambda: job.saw("workspace", "show", workspace)["state"] == "active", patience=600, interval=2.0,
    )  # fmt: skip
    wait_shell(job, workspace)
    return refused - begin, done[0] - begin


def kill(lab: Lab, kills: int) -> list[Result]:
    """Kill the real workspace ``kills`` times."""
    with exclusive(lab):
        job, workspace = active_job(lab)
        pairs = [kill_once(job, workspace) for _ in range(kills)]
    return rows(KILL_ROWS, pairs, f"{kills} kills of the real workspace; baseline: the command itself")


def publish(lab: Lab, publications: int) -> list[Result]:
    """Publish ``publications`` times (an even number), back and forth, on the real workspace."""
    source = lab.repository / "policies/coding"
    with exclusive(lab), tempfile.TemporaryDirectory(prefix="saw-bench-") as temporary:
        job, workspace = active_job(lab)
        denied = Path(temporary)
        text = (source / "policy.yaml").read_text(encoding="utf-8")
        rule = "        deny_rules:\n"
        if text.count(rule) != 1:
            raise RuntimeError("policies/coding has changed: this measurement adds a rule below its one deny_rules")
        (denied / "policy.yaml").write_text(text.replace(rule, f"{rule}          - {{method: GET, path: /v1/items}}\n"))
        (denied / "governance.yaml").write_bytes((source / "governance.yaml").read_bytes())
        pairs = []
        try:
            with calling(lab, workspace, 120 + 60 * publications) as caller:
                for number in range(publications):
                    folder, status = (source, "200") if number % 2 else (denied, "403")
                    pairs.append(publish_once(job, caller, folder, status))
        finally:
            job.publish()  # the blueprint as it was, unless it is in force
    note = f"{publications} publications to the real workspace, quote included; baseline: the command itself"
    return rows(PUBLISH_ROWS, pairs, note)


def publish_once(job: Bringup, caller: Caller, folder: Path, status: str) -> tuple[float, float]:
    """Publish ``folder``; return the seconds until a call ends with ``status`` and those of the publishing command."""
    from saw.lab.release import publish_blueprint

    times: list[float] = []

    def saw(*argv: str) -> dict[str, Any]:
        begin = time.monotonic()
        answer = job.saw(*argv)
        if argv[:2] == ("policy", "publish"):
            times[:] = [begin, time.monotonic()]
        return answer

    publish_blueprint(job.lab, saw, lambda _: None, folder=folder)
    if not times:
        raise RuntimeError("nothing was published: this content is in force already")
    begin, returned = times
    return caller.wait(
        begin, lambda seen: seen == status, f"HTTP {status} after the publication"
    ) - begin, returned - begin


def rows(names: tuple[str, str], pairs: list[tuple[float, float]], note: str) -> list[Result]:
    """Return the two rows of one path."""
    times, commands = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    return [
        result(name, quantile(times, share), "s", baseline=quantile(commands, 0.5), goal=goal, note=note)
        for name, share, goal in zip(names, (0.5, 0.99), (None, GOAL), strict=True)
    ]
