"""Attempts on Git: programs that an earlier session left in a repository, started by what a later one does in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

from saw.conformance.probe.core import NotPossible, Refused, attempt

PATIENCE = 7.0
WHO = {f"GIT_{who}_{what}": "probe@host.invalid" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def _git(folder: str, *words: str, given: str = "", own: bool = False) -> subprocess.CompletedProcess[str]:
    """Run git as a session here would; ``own`` is the earlier session, which leaves out what the environment sets for Git."""
    kept = {name: value for name, value in os.environ.items() if not (own and name.startswith("GIT_"))}
    environment = {**kept, **WHO, "GIT_TERMINAL_PROMPT": "0", "EDITOR": "true", "VISUAL": "true"}
    return subprocess.run(
        ["git", *words],
        cwd=folder,
        env=environment,
        input=given,
        capture_output=True,
        check=False,
        text=True,
        timeout=PATIENCE,
    )


def _repository(base: str) -> str:
    """Make a repository with one commit in it; its own hooks are the sample ones of the installation at most."""
    if shutil.which("git") is None:
        raise NotPossible("there is no git here")
    folder = os.path.join(base, "work")
    for words in (["init", "-q", folder], ["-C", folder, "commit", "-q", "--allow-empty", "-m", "one"]):
        done = _git(base, *words, own=True)
        if done.returncode:
            raise NotPossible(f"git {words[0]}: {done.stderr.strip()}")
    return folder


def _program(path: str, mark: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="ascii") as stream:
        stream.write(f"#!/bin/sh\n: >'{mark}'\nexit 0\n")
    os.chmod(path, 0o700)


@attempt("git-program")
def git_program(command: list[str], config: list[str], hook: str = "", given: str = "") -> str:
    """Leave a program in a repository, as a ``hook`` or by a setting (``config``), and run a git ``command`` in it.

    ``{program}`` and ``{folder}`` stand for the program and for the directory of the attempt. The command's own success says
    nothing: only whether the program ran does.
    """
    base = tempfile.mkdtemp(prefix="saw-probe-git-")
    try:
        folder = _repository(base)
        program, mark = os.path.join(base, "program.d", "post-commit"), os.path.join(base, "ran")
        _program(program, mark)
        if subprocess.run([program], capture_output=True, check=False).returncode or not os.path.exists(mark):
            raise NotPossible("no program of our own starts here")
        os.unlink(mark)
        if hook:
            _program(os.path.join(folder, ".git", "hooks", hook), mark)
        if config:
            name, value = config
            _git(folder, "config", name, value.replace("{program}", program).replace("{folder}", base), own=True)
        words = [word.replace("{program}", program) for word in command]
        try:
            done = _git(folder, *words, given=given)
        except subprocess.TimeoutExpired:
            if os.path.exists(mark):
                return "the program ran"
            raise
        if os.path.exists(mark):
            return "the program ran"
        said = (done.stderr or done.stdout).strip()[-200:]
        raise Refused(f"git ended with {done.returncode} and did not start it: {said}", reason="not_started")
    finally:
        shutil.rmtree(base, ignore_errors=True)


@attempt("git-works")
def git_works() -> str:
    """Commit a file in a repository of our own, make a branch, and read the history."""
    base = tempfile.mkdtemp(prefix="saw-probe-git-")
    try:
        folder = _repository(base)
        with open(os.path.join(folder, "file"), "w", encoding="ascii") as stream:
            stream.write("kept\n")
        for words in (["add", "file"], ["commit", "-m", "two"], ["commit", "--amend", "--allow-empty"], ["checkout", "-b", "b"],
                      ["status"], ["log", "-p"]):  # fmt: skip
            done = _git(folder, *words)
            if done.returncode:
                raise OSError(f"git {words[0]}: {done.stderr.strip()}")
        if "kept" not in done.stdout:
            raise OSError("the history does not hold what was committed")
        return "committed and read"
    finally:
        shutil.rmtree(base, ignore_errors=True)
