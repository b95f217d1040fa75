"""Run the collection's playbooks with ansible-runner, showing progress task by task."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saw.errors import SawError
from saw.image.build import ImageBuild
from saw.lab.topology import Lab


@dataclass(frozen=True, slots=True)
class PlaybookRun:
    """What a playbook did: task counts summed over the hosts, and each change as ``host: task: details``."""

    changed: int
    ok: int
    changes: tuple[str, ...]


class PlaybookFailed(SawError):
    """A playbook ended with a failed or unreachable host."""

    code = "playbook_failed"


def environment_of(lab: Lab) -> dict[str, str]:
    """Return what Ansible needs in its environment to run a playbook of the collection on the hosts of ``lab``."""
    return {
        "ANSIBLE_COLLECTIONS_PATH": str(ImageBuild(lab.repository, lab.build).link_collection()),
        "ANSIBLE_CONFIG": str(lab.repository / "ansible.cfg"),
        "ANSIBLE_HOME": str(lab.build / "ansible-home"),
        "SAW_CONTEXT": str(lab.context_file),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def run_playbook(
    lab: Lab,
    name: str,
    variables: dict[str, Any] | None = None,
    *,
    say: Callable[[str], None] = print,
    check: bool = False,
) -> PlaybookRun:
    """Run ``playbooks/<name>.yml`` on the lab's inventory.

    Variables reach ansible through a private file, never its argument list. The full output lies in
    ``build/runner/artifacts/<name>/stdout``. Raises :class:`PlaybookFailed` with the failing task and its message, and
    KeyboardInterrupt when it was interrupted.
    """
    from ansible_runner.interface import run

    failures: list[str] = []
    changes: list[str] = []

    def on_event(event: dict[str, Any]) -> bool:
        data = event.get("event_data", {})
        kind = event.get("event", "")
        if kind == "playbook_on_play_start":
            say(f"play: {data.get('name', '')}")
        elif kind in {"runner_on_failed", "runner_on_unreachable"} and not data.get("ignore_errors"):
            result = data.get("res", {})
            text = " ".join(str(result[key]) for key in ("msg", "stderr") if result.get(key))
            failures.append(f"{data.get('host')}: {data.get('task')}: {text[:1200]}")
        elif kind == "runner_on_ok" and data.get("res", {}).get("changed") and data.get("task"):
            say(f"  {data.get('host')}: {data['task']}")
            changes.append(
                ": ".join(filter(None, (str(data.get("host")), str(data["task"]), what_changed(data["res"]))))
            )
        return True

    runner_directory = lab.build / "runner"
    # Variables of an earlier run must not leak into this one, nor may its events be counted again.
    for stale in (runner_directory / "env", runner_directory / "artifacts" / name):
        shutil.rmtree(stale, ignore_errors=True)
    for sub in ("env", "project", "inventory", "artifacts"):
        (runner_directory / sub).mkdir(mode=0o700, parents=True, exist_ok=True)
    with signals_given_back():
        result = run(
            private_data_dir=str(runner_directory),
            playbook=str(lab.repository / f"playbooks/{name}.yml"),
            inventory=str(lab.inventory_file),
            extravars=variables or {},
            envvars=environment_of(lab),
            ident=name,
            cmdline="--check --diff" if check else None,
            quiet=True,
            rotate_artifacts=20,
            event_handler=on_event,
        )
    stats = result.stats or {}
    if result.status == "canceled":  # the runner takes the interrupt for itself
        raise KeyboardInterrupt
    if result.status != "successful":
        log = runner_directory / "artifacts" / name / "stdout"
        reason = "\n".join(failures) or f"ansible ended with {result.status} ({result.rc}); its output is in {log}"
        raise PlaybookFailed(
            f"playbook {name} failed:\n{reason}", cure=f"read {log}; correct the cause and run it again"
        )
    return PlaybookRun(
        changed=sum(stats.get("changed", {}).values()), ok=sum(stats.get("ok", {}).values()), changes=tuple(changes)
    )


@contextmanager
def signals_given_back() -> Iterator[None]:
    """Restore what SIGINT and SIGTERM did: the runner takes both for itself and keeps them after the playbook's end."""
    main = threading.current_thread() is threading.main_thread()  # elsewhere the runner takes none
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def what_changed(result: dict[str, Any]) -> str:
    """Say what a task changed, as far as its result tells: paths that were written and what was done to which unit."""
    parts = [str(path) for path in result.get("changed_files") or ()]
    for unit in result.get("units") or ():
        parts += [f"{action} {unit['name']}" for action in unit.get("actions", ())]
    return ", ".join(parts)
