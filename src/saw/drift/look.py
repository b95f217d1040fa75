"""Run playbooks in check mode and gather what they would change. What they print is not kept: it may hold secrets."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import msgspec

from saw.drift.observed import Blind, Changed, DriftError, Lost, Observed, read_observed

CALLBACK = "secure_agent.workspace.drift"
#: What a controller such as AWX sets for its own run, and would draw this one into it.
_NOT_OURS = ("AWX_ISOLATED_DATA_DIR", "ANSIBLE_CALLBACK_PLUGINS", "ANSIBLE_LOG_PATH", "ANSIBLE_DISPLAY_ARGS_TO_STDOUT")
_HOSTS_FAILED = {0, 2, 4, 6}
"""Exit codes of ansible-playbook that say how hosts did; any other means that the run itself broke off."""
_MOST_WORDS = 600


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked at. ``playbooks`` are files or names such as ``secure_agent.workspace.baseline``.

    ``variables`` are files for ``--extra-vars``, so that no value is in a list of arguments. ``timeout_s`` bounds each run.
    """

    playbooks: tuple[str, ...]
    inventories: tuple[str, ...]
    limit: str = ""
    variables: tuple[str, ...] = ()
    forks: int = 10
    timeout_s: float = 3600.0


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """What one playbook would change. ``hosts`` are all that it is for; ``missed`` those of them that never answered.

    ``problems`` say in words what was not looked at besides.
    """

    playbook: str
    hosts: tuple[str, ...]
    missed: tuple[str, ...]
    changed: tuple[Changed, ...]
    lost: tuple[Lost, ...]
    blind: tuple[Blind, ...]
    problems: tuple[str, ...]


def look(wanted: Wanted, environ: Mapping[str, str] = os.environ) -> tuple[Seen, ...]:
    """Run each playbook in check mode. A run that cannot be done is a problem of what was seen, so that it is reported."""
    with tempfile.TemporaryDirectory(prefix="saw-drift-") as folder:
        return tuple(_one(wanted, playbook, Path(folder), environ) for playbook in wanted.playbooks)


def _one(wanted: Wanted, playbook: str, folder: Path, environ: Mapping[str, str]) -> Seen:
    """Run one playbook, and again without the hosts that it lost while plays are left that were never begun.

    Ansible ends a playbook when a play has lost all its hosts, whatever other hosts the plays after it have.
    """
    rounds: list[Observed] = []
    without: set[str] = set()
    problems: list[str] = []
    while True:
        try:
            observed, problem = _run(wanted, playbook, folder, environ, without)
        except DriftError as error:
            observed, problem = None, str(error)
        if observed is None:
            # Without any host that is left there is nothing to run; what was not begun is told below.
            if not rounds or not without:
                problems.append(f"{playbook}: {problem}")
            break
        rounds.append(observed)
        if problem:
            problems.append(f"{playbook}: {problem}")
        lost = {one.host for one in observed.lost}
        if all(play.began for play in observed.plays) or not lost - without:
            break
        without |= lost
    return _together(playbook, rounds, problems)


def _together(playbook: str, rounds: list[Observed], problems: list[str]) -> Seen:
    hosts = {host for one in rounds for play in one.plays for host in play.hosts}
    missed: set[str] = set()
    for number in range(len(rounds[0].plays) if rounds else 0):
        plays = [one.plays[number] for one in rounds if number < len(one.plays)]
        missed |= {host for play in plays for host in play.hosts} - {host for play in plays for host in play.seen}
        if not any(play.began for play in plays):
            problems.append(
                f"{playbook}: the play {plays[0].name!r} was not begun, because one before it lost all its hosts"
            )
    return Seen(
        playbook=playbook,
        hosts=tuple(sorted(hosts)),
        missed=tuple(sorted(missed)),
        changed=tuple(dict.fromkeys(change for one in rounds for change in one.changed)),
        lost=tuple(dict.fromkeys(lost for one in rounds for lost in one.lost)),
        blind=tuple(dict.fromkeys(blind for one in rounds for blind in one.blind)),
        problems=tuple(problems),
    )


def _run(
    wanted: Wanted, playbook: str, folder: Path, environ: Mapping[str, str], without: set[str]
) -> tuple[Observed | None, str]:
    """Run a playbook once; return what was observed, and what went wrong with the run itself. Raises :class:`DriftError`."""
    program = _program(environ)
    file = folder / "seen.json"
    file.unlink(missing_ok=True)
    limit = ",".join(
        filter(None, [wanted.limit or ("all" if without else ""), *(f"!{host}" for host in sorted(without))])
    )
    command = [program, "--check", "--diff", "--forks", str(wanted.forks)]
    for inventory in wanted.inventories:
        command += ["--inventory", inventory]
    for variables in wanted.variables:
        command += ["--extra-vars", f"@{variables}"]
    command += [*(["--limit", limit] if limit else []), playbook]
    with tempfile.TemporaryFile() as words:
        try:
            process = subprocess.Popen(
                command,
                env=_environment(environ, file),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=words,
                start_new_session=True,
            )
        except OSError as error:
            raise DriftError(f"{program} does not start: {error.strerror}", cure="install ansible-core") from error
        try:
            code = process.wait(wanted.timeout_s)
        except subprocess.TimeoutExpired:
            return None, f"it did not end within {wanted.timeout_s:.0f} s"
        finally:
            _end(process)
        observed = read_observed(file)
        if observed is None or code not in _HOSTS_FAILED:
            return observed, f"ansible-playbook broke off with {code}: {_last_words(words)}"
        return observed, ""


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run that is still going, with its workers."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment(environ: Mapping[str, str], file: Path) -> dict[str, str]:
    kept = {name: value for name, value in environ.items() if name not in _NOT_OURS}
    enabled = [one for one in kept.get("ANSIBLE_CALLBACKS_ENABLED", "").split(",") if one.strip()]
    return {
        **kept,
        "ANSIBLE_CALLBACKS_ENABLED": ",".join([*enabled, CALLBACK]),
        "ANSIBLE_INJECT_INVOCATION": "1",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
        "ANSIBLE_RETRY_FILES_ENABLED": "0",
        "ANSIBLE_STDOUT_CALLBACK": "ansible.builtin.minimal",
        "SAW_DRIFT_FILE": str(file),
    }


def _program(environ: Mapping[str, str]) -> str:
    beside = Path(sys.executable).with_name("ansible-playbook")
    found = str(beside) if beside.exists() else shutil.which("ansible-playbook", path=environ.get("PATH"))
    if found is None:
        raise DriftError("ansible-playbook is missing", cure="install ansible-core where saw runs, or put it on PATH")
    return found


def _last_words(words: IO[bytes]) -> str:
    """Return the beginning of the last error that ansible told, in one line."""
    words.seek(0)
    text = re.sub(r"\x1b\[[0-9;]*m", "", words.read(256 * 1024).decode("utf-8", "replace"))
    last = text.rpartition("[ERROR]")[2] or text
    return " ".join(last.lstrip(": ").split())[:_MOST_WORDS] or "it said nothing"


__all__ = ["CALLBACK", "Seen", "Wanted", "look"]
