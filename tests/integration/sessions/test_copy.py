"""``saw cp`` and ``saw exec`` through a bastion, with OpenSSH's client and servers: both ways, folders, odd names, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from session_rig import Bastion, Terminal
from sso_rig import until

pytestmark = pytest.mark.control("ID-02")

ODD = ["two words", 'it\'s "quoted" $(id)', "-dash", "a[b]*?{c,d}", "with:colon"]


def copied(bastion: Bastion, *arguments: str) -> dict[str, Any]:
    done = bastion.saw("cp", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def refused(bastion: Bastion, *arguments: str) -> dict[str, Any]:
    done = bastion.saw("cp", "--json", *arguments)
    assert done.returncode == 1, done.stdout + done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["cure"]
    assert error["message"] in done.stderr
    return dict(error)


def sessions(bastion: Bastion) -> list[dict[str, Any]]:
    return list(bastion.lab.operator.request("GET", "/v1/sessions?workspace_id=ws-a")["sessions"])


def count(bastion: Bastion) -> int:
    return len(sessions(bastion))


def folder(path: Path, names: list[str]) -> Path:
    path.mkdir()
    for name in names:
        (path / name).write_text(f"content of {name}\n")
    return path


@pytest.mark.thorough
def test_files_go_there_and_back_under_their_own_names(bastion: Bastion, tmp_path: Path) -> None:
    here, there = folder(tmp_path / "here", ODD), folder(tmp_path / "there", [])
    told = copied(bastion, *(f"{here}/{name}" for name in ODD), f"ws-a:{there}")
    assert sorted(path.name for path in there.iterdir()) == sorted(ODD)
    sizes = sum(len(f"content of {name}\n") for name in ODD)
    assert (told["workspace"], told["direction"], told["files"], told["bytes"]) == ("ws-a", "to", len(ODD), sizes)
    assert len(told["sessions"]) == 1, "one connection for all of them"
    back = folder(tmp_path / "back", [])
    told = copied(bastion, *(f"ws-a:{there}/{name}" for name in ODD), str(back))
    assert {path.name: path.read_text() for path in back.iterdir()} == {name: f"content of {name}\n" for name in ODD}
    assert (told["direction"], told["files"], told["bytes"], len(told["sessions"])) == (
        "from",
        len(ODD),
        sizes,
        len(ODD),
    )


def test_a_leading_dash_is_a_name_where_nothing_stands_in_front_of_it(bastion: Bastion, tmp_path: Path) -> None:
    here, there = folder(tmp_path / "here", ["-r", "-oProxyCommand=false"]), folder(tmp_path / "there", [])
    bastion.saw("sessions")  # writes the context file
    line = [sys.executable, "-m", "saw.cli.main", "cp", "--", "-r", "-oProxyCommand=false", f"ws-a:{there}"]
    environment = {**os.environ, "SAW_CONTEXT": str(bastion.directory / "context.json")}
    subprocess.run(line, check=True, cwd=here, env=environment, stdin=subprocess.DEVNULL, timeout=120)
    assert sorted(path.name for path in there.iterdir()) == ["-oProxyCommand=false", "-r"]


def test_folders_go_with_all_that_is_in_them_and_need_r(bastion: Bastion, tmp_path: Path) -> None:
    here = folder(tmp_path / "tree", ["one"])
    folder(here / "sub dir", ["two", "three"])
    (here / "empty").mkdir()
    before = count(bastion)
    assert refused(bastion, str(here), f"ws-a:{tmp_path}/copy")["code"] == "folder_without_r"
    assert count(bastion) == before, "no session is opened for it"
    assert copied(bastion, "-r", str(here), f"ws-a:{tmp_path}/copy")["files"] == 3
    assert (tmp_path / "copy/sub dir/two").read_text() == "content of two\n"
    assert (tmp_path / "copy/empty").is_dir()
    assert refused(bastion, f"ws-a:{tmp_path}/copy", f"{tmp_path}/back")["code"] == "not_copied"
    back = folder(tmp_path / "back", ["other"])
    assert copied(bastion, "-r", f"ws-a:{tmp_path}/copy", str(back))["files"] == 3, "what was there is not counted"
    assert (back / "copy/sub dir/three").read_text() == "content of three\n"
    assert copied(bastion, "-r", f"ws-a:{tmp_path}/copy", str(back))["files"] == 3, "written again"


@pytest.mark.thorough
def test_what_is_missing_is_said_with_a_cure(bastion: Bastion, tmp_path: Path) -> None:
    here = folder(tmp_path / "here", ["one", "two"])
    before = count(bastion)
    assert refused(bastion, f"{here}/none", f"ws-a:{here}")["code"] == "source_missing"
    assert refused(bastion, f"ws-a:{here}/one", f"{tmp_path}/none/x")["code"] == "target_missing"
    assert refused(bastion, f"{here}/one", f"{tmp_path}/x")["code"] == "paths_refused"
    assert count(bastion) == before
    error = refused(bastion, f"ws-a:{here}/none", str(tmp_path))
    assert (error["code"], "none: No such file or directory" in error["message"]) == ("not_copied", True)
    assert "must exist" in error["cure"]
    assert refused(bastion, f"{here}/one", f"ws-a:{tmp_path}/none/x")["code"] == "not_copied"
    assert refused(bastion, f"{here}/one", f"{here}/two", f"ws-a:{tmp_path}/none/x")["code"] == "not_copied"
    assert refused(bastion, f"{here}/one", f"{here}/two", f"ws-a:{here}/one")["code"] == "not_copied"
    assert not (tmp_path / "none").exists()
    assert copied(bastion, f"{here}/one", f"{here}/two", f"ws-a:{tmp_path}/none")["files"] == 2
    assert sorted(path.name for path in (tmp_path / "none").iterdir()) == ["one", "two"], "scp makes the last folder"


def test_what_a_copy_was_is_in_its_recording_and_its_size_in_the_trail(bastion: Bastion, tmp_path: Path) -> None:
    here = folder(tmp_path / "here", ["report name"])
    [session] = copied(bastion, f"{here}/report name", f"ws-a:{tmp_path}/copy")["sessions"]
    found = bastion.closed(session)
    assert (found["command"], found["reason"]) == ("sftp", "closed")
    size = len("content of report name\n")
    assert found["bytes_in"] > size
    assert bastion.saw("replay", session, "--output", f"{tmp_path}/cast").returncode == 0
    assert f"sftp file {tmp_path}/copy read 0 written {size} bytes" in (tmp_path / "cast").read_text()
    [ended] = [
        item["event"]
        for item in bastion.lab.events()
        if item["event"]["unmapped"]["saw"].get("session") == session and "bytes_in" in item["event"]["unmapped"]["saw"]
    ]
    assert ended["unmapped"]["saw"]["bytes_in"] == found["bytes_in"]
    assert "report name" not in json.dumps(ended), "names are in the recording alone"
    assert str(tmp_path) not in json.dumps(ended)


def test_a_workspace_that_is_not_there_or_not_active_gets_nothing(bastion: Bastion, tmp_path: Path) -> None:
    here = folder(tmp_path / "here", ["one"])
    assert refused(bastion, f"{here}/one", f"ws-none:{tmp_path}/copy")["code"] == "unknown_workspace"
    bastion.lab.workspace("ws-stopped")
    assert refused(bastion, f"{here}/one", f"ws-stopped:{tmp_path}/copy")["code"] == "workspace_not_admitted"
    activate_again = "UPDATE workspaces SET state = ? WHERE id = 'ws-a'"
    bastion.sql(activate_again, "stopped")
    try:
        assert refused(bastion, f"{here}/one", f"ws-a:{tmp_path}/copy")["code"] == "workspace_not_admitted"
        assert not (tmp_path / "copy").exists()
    finally:
        bastion.sql(activate_again, "active")
    assert copied(bastion, f"{here}/one", f"ws-a:{tmp_path}/copy")["files"] == 1


def test_a_certificate_that_does_not_count_from_here_copies_nothing(bastion: Bastion, tmp_path: Path) -> None:
    here = folder(tmp_path / "here", ["one"])
    done = bastion.saw("cp", "--json", f"{here}/one", f"ws-a:{tmp_path}/copy", source_address="192.0.2.1")
    error = json.loads(done.stdout)["error"]
    assert (done.returncode, error["code"]) == (1, "session_failed")
    assert "Permission denied" in error["message"]
    assert not (tmp_path / "copy").exists()


@contextmanager
def endless(bastion: Bastion, directory: Path) -> Iterator[tuple[subprocess.Popen[str], Path, str]]:
    """A copy that nobody waits for: the client, its folder for temporary files, and its session, which is open."""
    temporary = folder(directory / "tmp", [])
    bastion.saw("sessions")  # writes the context file
    environment = {**os.environ, "SAW_CONTEXT": str(bastion.directory / "context.json"), "TMPDIR": str(temporary)}
    big = directory / "big"
    with big.open("wb") as file:
        file.truncate(2**36)  # sparse
    line = [sys.executable, "-m", "saw.cli.main", "cp", "--json", str(big), "ws-a:/dev/null"]
    before = {one["id"] for one in sessions(bastion)}

    def opened() -> str | None:
        new = [one["id"] for one in sessions(bastion) if one["id"] not in before and one["state"] == "open"]
        return str(new[0]) if new else None

    with subprocess.Popen(
        line, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as client:
        try:
            yield client, temporary, str(until(opened, 60))
        finally:
            client.kill()
    big.unlink()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=["hang-up", "request to end"])
def test_a_copy_that_is_ended_from_outside_leaves_no_key_and_no_session(
    bastion: Bastion, tmp_path: Path, number: int
) -> None:
    with endless(bastion, tmp_path) as (client, temporary, session):
        assert list(temporary.rglob("key"))
        for _ in range(5):
            client.send_signal(number)
        assert client.wait(60) == 128 + number
        assert list(temporary.iterdir()) == []
        assert bastion.closed(session)["state"] == "closed"


def test_a_copy_ends_with_its_session(bastion: Bastion, tmp_path: Path) -> None:
    with endless(bastion, tmp_path) as (client, temporary, session):
        bastion.lab.operator.request("POST", f"/v1/sessions/{session}/end", {"reason": "a drill"})
        told, _ = client.communicate(timeout=60)
        error = json.loads(told)["error"]
        assert (client.returncode, error["code"], error["details"]["session"]) == (1, "session_failed", session)
        assert session in error["cure"], "scp does not always pass on what the bastion said at last"
        assert list(temporary.iterdir()) == []


def test_a_terminal_shows_how_far_it_is_and_a_pipe_only_what_was_copied(bastion: Bastion, tmp_path: Path) -> None:
    here = folder(tmp_path / "here", ["one"])
    quiet = bastion.saw("cp", f"{here}/one", f"ws-a:{tmp_path}/copy")  # writes the context file, too
    assert (quiet.stdout, quiet.stderr) == ("copied 1 file, 15 bytes to ws-a\n", "")
    line = [sys.executable, "-m", "saw.cli.main", "cp", "--context", str(bastion.directory / "context.json")]
    # scp shows it to the foreground of a terminal of its session alone.
    terminal = Terminal(["setsid", "--ctty", "--wait", *line, f"{here}/one", f"ws-a:{tmp_path}/copy"])
    terminal.until("100%")
    terminal.until("copied 1 file, 15 bytes to ws-a")
    assert terminal.ends() == 0


def test_without_a_bastion_the_workspace_itself_is_copied_to(bastion: Bastion, tmp_path: Path) -> None:
    here, file = folder(tmp_path / "here", ["one"]), tmp_path / "context.json"
    broker = {"socket": bastion.lab.config.operator_socket, "ssh": None}
    file.write_text(json.dumps({"broker": broker, "ingress": {"base_port": bastion.base, "user": "root"}}))
    before = count(bastion)
    told = copied(bastion, "--context", str(file), f"{here}/one", f"ws-a:{tmp_path}/copy")
    assert (told["files"], (tmp_path / "copy").read_text()) == (1, "content of one\n")
    assert count(bastion) == before, "no session of a bastion, so no recording"
    activities = [name for name, _, _ in bastion.audited(told["sessions"][0])]
    assert len(activities) == 1, "the certificate is all that is audited"


def test_exec_runs_the_words_as_they_are_and_ls_lists(bastion: Bastion) -> None:
    done = bastion.saw("exec", "ws-a", "--", "printf", "<%s>", "two words", "$(id)", "it's", "*")
    assert (done.returncode, done.stdout) == (0, "<two words><$(id)><it's><*>"), done.stderr
    assert bastion.saw("exec", "ws-a", "sh", "-c", "exit 7").returncode == 7
    assert bastion.saw("exec", "ws-a").returncode == 2
    assert bastion.saw("exec", "ws-none", "true").returncode == 1
    rows = json.loads(bastion.saw("ls", "--json").stdout)["workspaces"]
    assert "ws-a" in {one["id"] for one in rows}
    assert json.loads(bastion.saw("ls", "--json", "--state", "active").stdout)["workspaces"][0]["id"] == "ws-a"
