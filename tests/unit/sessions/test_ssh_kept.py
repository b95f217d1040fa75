"""Where keys of plain ssh's connections lie: a folder for each process, included by that one alone, and removed after it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from saw.cli import ssh_kept
from saw.cli.ssh_kept import connection_directory, kept_base, kept_directory, offer, own_shell
from saw.errors import ConfigError

pytestmark = pytest.mark.control("ID-02")


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return kept_directory("ws-a", {"SAW_SSH_KEYS": str(tmp_path)})


def ended() -> int:
    """Return the number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def mine_here(process: int) -> str:
    """Return the name of what belongs to a process of ours."""
    space = str(Path("/proc/self/ns/pid").readlink()).partition("[")[2].rstrip("]")
    return f"{re.sub('[^A-Za-z0-9-]', '-', os.uname().nodename)}_{space}_{process}"


def resolved(tmp_path: Path, include: str, host: str) -> dict[str, str]:
    """What ssh would use for ``host``."""
    config = tmp_path / "config"
    text = f"Host *\n    Include {include}\n    User after-it\n"
    config.write_text(text)
    line = ["ssh", "-G", "-F", str(config), host]
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def test_ssh_takes_the_files_of_its_own_process_and_goes_on_behind_them(kept: Path, tmp_path: Path) -> None:
    connection_directory(kept, os.getpid())
    offer(kept, "ws-a", os.getpid())
    file = kept / f"{mine_here(os.getpid())}.conf"
    assert file.stat().st_mode & 0o777 == 0o600
    text = file.read_text()
    mine = f"{kept}/{mine_here(os.getpid())}/key"
    assert f"test $PPID = {os.getpid()}" in text
    foreign = resolved(tmp_path, f"{kept}/*.conf", "ws-a")
    assert (foreign["user"], foreign["identityfile"] == mine) == ("after-it", False)
    # As its own: the shell that asks is the child of ssh, whose number ssh -G cannot know before.
    file.write_text(text.replace(f"= {os.getpid()}", "-gt 1"))
    own = resolved(tmp_path, f"{kept}/*.conf", "ws-a")
    assert (own["user"], own["identityfile"], own["certificatefile"]) == ("after-it", mine, f"{mine}-cert.pub")
    assert own["userknownhostsfile"] == f"{kept}/{mine_here(os.getpid())}/known_hosts"
    assert resolved(tmp_path, f"{kept}/*.conf", "ws-b")["identityfile"] != mine


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_the_shell_that_asks_is_a_child_of_ssh_whatever_shell_ssh_runs(shell: str) -> None:
    line = [shell, "-c", own_shell(f"test $PPID = {os.getpid()}")]
    assert subprocess.run(line, check=False).returncode == 0
    line = [shell, "-c", own_shell("test $PPID = 1")]
    assert subprocess.run(line, check=False).returncode == 1


def test_what_ended_connections_left_goes_and_what_others_use_stays(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = ended()
    for process in (gone, os.getppid(), os.getpid()):
        (connection_directory(kept, process) / "key").write_text("k")
        offer(kept, "ws-a", process)
    (kept / "key").write_text("of a configuration from before")
    again = connection_directory(kept, os.getpid())
    assert list(again.iterdir()) == []
    own, other = mine_here(os.getpid()), mine_here(os.getppid())
    left = {own, other, f"{other}.conf", "key"}
    assert {one.name for one in kept.iterdir()} == left
    late = time.time() + ssh_kept.KEPT_S + 60
    monkeypatch.setattr(ssh_kept.time, "time", lambda: late)
    connection_directory(kept, os.getpid())
    assert {one.name for one in kept.iterdir()} == {own, "key"}


def test_what_lies_there_from_another_host_or_container_is_judged_by_its_age_alone(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, space, _ = mine_here(1).split("_")
    gone = ended()
    theirs = {f"{host}-other_{space}_{gone}", f"{host}_{int(space) + 1}_{gone}", str(gone)}
    theirs |= {f"{host}-other_{space}_{os.getpid()}", f"{host}_{int(space) + 1}_{os.getpid()}"}
    for name in {*theirs, f"{host}_{space}_{gone}"}:
        (kept / name).mkdir()
        (kept / f"{name}.conf").write_text("")
    own = connection_directory(kept, os.getpid())
    assert {one.name.removesuffix(".conf") for one in kept.iterdir()} == {*theirs, own.name}
    assert len(list(kept.iterdir())) == 2 * len(theirs) + 1
    late = time.time() + ssh_kept.KEPT_S + 60
    monkeypatch.setattr(ssh_kept.time, "time", lambda: late)
    assert [connection_directory(kept, os.getpid())] == list(kept.iterdir())


def test_a_host_name_adds_nothing_to_a_configuration(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_kept.os, "uname", lambda: SimpleNamespace(nodename="a b.\"$'%_../x"))
    assert re.fullmatch("a-b-+x_[0-9]+_7", connection_directory(kept, 7).name)


def test_paths_that_take_quotes_and_names_that_are_none_are_refused(tmp_path: Path) -> None:
    assert kept_base({"SAW_SSH_KEYS": str(tmp_path)}) == tmp_path
    for odd in ("it's", "a b", "a%n", "$HOME"):
        with pytest.raises(ConfigError, match="special characters"):
            kept_base({"SAW_SSH_KEYS": str(tmp_path / odd)})
    with pytest.raises(ConfigError, match="not a workspace id"):
        kept_directory("../x", {"SAW_SSH_KEYS": str(tmp_path)})
