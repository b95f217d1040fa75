"""The default executor: ansible-runner on the worker's host, one process group for each job."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saw.errors import SawError
from saw.jobs import processes
from saw.jobs.config import COLLECTION, AnsibleSettings
from saw.jobs.executor import Ended, Gathered
from saw.jobs.messages import Event, JobError, Progress, Work, variables_of
from saw.jobs.redact import redact

ENDED = frozenset({"successful", "failed", "canceled", "timeout"})
#: What a run gets of the worker's own environment; nothing else, so that no secret of the service reaches a playbook.
PASSED_ON = ("HOME", "LANG", "LC_ALL", "TZ", "USER", "LOGNAME", "TMPDIR")


class NotStarted(SawError):
    """A run that was not started."""

    code = "not_started"


class AnsibleExecutor:
    """Runs playbooks; the ids of its runs are the names of their folders. ``worker`` marks the processes of this worker."""

    name = "ansible"
    survives = False
    """Runs end with the worker."""

    def __init__(
        self,
        settings: AnsibleSettings,
        state: Path,
        worker: str,
        keep: int = 50,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._settings = settings
        self._runs = state / "runs"
        self._home = state / "ansible"
        self._worker = worker
        self._keep = keep
        self._environ = environ

    def start(self, work: Work) -> _Run:
        """Start the playbook of ``work``; raises :class:`SawError` when its attempt has been here already."""
        from ansible_runner.interface import init_runner

        variables = variables_of(work)
        folder = self._folder(work)
        gathered, wanted = Gathered(), threading.Event()

        def on_event(event: dict[str, Any]) -> bool:
            gathered.take(event)
            return False  # results stay out of the worker's files

        try:
            added = self._environment(work)
            runner = init_runner(
                private_data_dir=str(folder),
                playbook=self._playbook(work),
                inventory=self._settings.inventory,
                extravars=variables,
                envvars=added,
                settings={"pexpect_timeout": 1, "suppress_output_file": False},
                ident="run",
                quiet=True,
                timeout=self._settings.timeout_s,
                event_handler=on_event,
                cancel_callback=wanted.is_set,
            )
        except Exception as error:
            raise NotStarted(
                f"the playbook was not started: {error}", cure="saw worker check says what is missing"
            ) from error
        runner.config.env = without_own(runner.config.env, self._environ, added)
        thread = threading.Thread(target=runner.run, name=work.id)
        thread.start()
        return _Run(work.id, folder, thread, runner, gathered, wanted)

    def reattach(self, work: Work, external_id: str) -> None:
        """End what is left of a run whose worker is gone: it can be run again, and nobody hears how it goes."""
        del external_id
        if not processes.end(processes.JOB_MARK, work.id):
            raise NotStarted(f"processes of {work.id} do not end", cure="look at them with ps; restart the host")

    def _folder(self, work: Work) -> Path:
        self._runs.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._home.mkdir(mode=0o700, exist_ok=True)
        folder = self._runs / f"{work.id}.{work.attempt}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError as error:
            raise NotStarted(
                f"attempt {work.attempt} of {work.id} was here already", cure="saw job resume makes a new attempt"
            ) from error
        kept = sorted(self._runs.iterdir(), key=lambda place: place.stat().st_mtime)
        for old in kept[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        for name in ("env", "project", "inventory", "artifacts"):
            (folder / name).mkdir(mode=0o700)
        return folder

    def _playbook(self, work: Work) -> str:
        if self._settings.playbooks is None:
            return f"{COLLECTION}.workspace_{work.kind}"
        return str(Path(self._settings.playbooks) / f"workspace_{work.kind}.yml")

    def _environment(self, work: Work) -> dict[str, str]:
        """Return what is added for a run. Each path is the operator's; no value is a secret."""
        settings = self._settings
        config = self._home / "ansible.cfg"
        if settings.config_file is None and not config.exists():
            config.write_text("[defaults]\n", encoding="utf-8")
        known = f"-o UserKnownHostsFile={settings.known_hosts} -o GlobalKnownHostsFile=/dev/null"
        given = {
            "ANSIBLE_CONFIG": settings.config_file or str(config),
            "ANSIBLE_HOME": str(self._home),
            "ANSIBLE_COLLECTIONS_PATH": settings.collections,
            "ANSIBLE_PRIVATE_KEY_FILE": settings.key_file,
            "ANSIBLE_SSH_COMMON_ARGS": known if settings.known_hosts else None,
            "ANSIBLE_HOST_KEY_CHECKING": "True",
            "ANSIBLE_PIPELINING": "True",
            "ANSIBLE_RETRY_FILES_ENABLED": "False",
            "PYTHONDONTWRITEBYTECODE": "1",
            "SAW_CONTEXT": settings.context,
            "PATH": f"{Path(sys.executable).parent}:{self._environ.get('PATH', '/usr/bin:/bin')}",
            processes.JOB_MARK: work.id,
            processes.WORKER_MARK: self._worker,
        }
        return {name: value for name, value in given.items() if value is not None}


def without_own(given: Mapping[str, str], own: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """Return the environment ``given`` without what is the worker's ``own``. What was ``added`` for the run stays in any case."""
    kept = {*PASSED_ON, *added}
    return {name: value for name, value in given.items() if name in kept or own.get(name) != value}


@dataclass
class _Run:
    """One run of ansible-playbook."""

    job: str
    folder: Path
    thread: threading.Thread
    runner: Any
    gathered: Gathered
    wanted: threading.Event
    """Set when it is to end."""

    @property
    def external_id(self) -> str:
        """Return the name of the folder with its output."""
        return self.folder.name

    def wait(self, timeout_s: float) -> Ended | None:
        """Return how it ended, or None when it goes on after ``timeout_s`` seconds. Nothing of it runs after its end."""
        self.thread.join(timeout_s)
        if self.thread.is_alive():
            return None
        left = not processes.end(processes.JOB_MARK, self.job)
        shutil.rmtree(self.folder / "env", ignore_errors=True)
        status = str(self.runner.status)
        if status == "successful":
            return Ended("succeeded")
        if self.wanted.is_set():
            words = "; processes of it do not end" if left else ""
            return Ended(
                "cancelled", JobError("cancelled", f"the run was ended on request{words}", "saw job run begins anew")
            )
        return Ended("failed", self._error(status))

    def progress(self) -> tuple[Progress, list[Event]]:
        """Return how far it is, and what happened since the last call."""
        return self.gathered.told()

    def cancel(self) -> None:
        """End its processes; those that do not end by themselves are ended by force within seconds."""
        self.wanted.set()
        with contextlib.suppress(OSError):
            processes.send(processes.JOB_MARK, self.job, signal.SIGTERM)

    def leave(self) -> None:
        """End it: nothing would follow it."""
        self.cancel()

    def _error(self, status: str) -> JobError:
        output = self.folder / "artifacts/run/stdout"
        cure = f"correct the cause, then saw job resume; the worker has the output in {output}"
        if status == "timeout":
            return JobError("playbook_timeout", "the run took too long and was ended", cure)
        if status not in ENDED:
            return JobError(
                "runner_failed", f"ansible-runner itself ended while it was {status}", "see the worker's log"
            )
        words = "\n".join(self.gathered.failures[:10]) or self._last_words(output)
        return JobError("playbook_failed", words[:4000], cure)

    def _last_words(self, output: Path) -> str:
        """Return how Ansible's output ended, when no task failed: a playbook that is not valid, an inventory without hosts."""
        with contextlib.suppress(OSError), output.open(encoding="utf-8", errors="replace") as file:
            lines = [redact(line) for line in collections.deque(file, 12)]
            if any(lines):
                return "\n".join(line for line in lines if line)
        return f"ansible ended with {self.runner.status} ({self.runner.rc}) and without a word"
