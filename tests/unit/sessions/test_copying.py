"""``saw cp`` before a session is opened: what its arguments mean, what is refused here, and the command line of scp."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.cli import cp
from saw.sessions.copying import Copy, CopyRefused, SawError, arrives_at, check_here, files_at, plan, scp_line

pytestmark = pytest.mark.control("ID-02")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["a", "ws-a:"], Copy("ws-a", up=True, sources=("a",), target=".")),
        (["a", "b c", "ws-a:x/y"], Copy("ws-a", up=True, sources=("a", "b c"), target="x/y")),
        (["./ws-b:a", "/d:e", "-f", "ws-a:/t"], Copy("ws-a", up=True, sources=("./ws-b:a", "/d:e", "-f"), target="/t")),
        (["ws-a:x", "ws-a:", "."], Copy("ws-a", up=False, sources=("x", "."), target=".")),
        (["ws-a:a:b", "./c:d"], Copy("ws-a", up=False, sources=("a:b",), target="./c:d")),
    ],
)
def test_a_word_with_a_colon_in_front_of_any_slash_is_in_the_workspace(words: list[str], wanted: Copy) -> None:
    assert plan(words) == wanted


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["a", "b"], "no workspace is named"),
        (["ws-a:a", "ws-b:b"], "one workspace"),
        (["ws-a:a", "ws-a:b"], "one side here"),
        (["ws-a:a", "b", "ws-a:c"], "one side here"),
        (["a", "ws-a:b", "c"], "one side here"),
        (["", "ws-a:c"], "a path is empty"),
        (["-oProxyCommand=x:a", "b"], "not a workspace id"),
        (["root@ws-a:a", "b"], "not a workspace id"),
        (["A:a", "b"], "not a workspace id"),
        ([":a", "b"], "not a workspace id"),
        (["ws-a\n:a", "b"], "not a workspace id"),
    ],
)
def test_a_copy_has_one_side_here_and_one_in_one_workspace(words: list[str], why: str) -> None:
    with pytest.raises(CopyRefused, match=why) as caught:
        plan(words)
    assert caught.value.cure


def test_what_can_be_seen_here_is_refused_before_a_session_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    file, missing = str(tmp_path / "file"), str(tmp_path / "missing")

    def code(*words: str, recursive: bool = False) -> str:
        try:
            check_here(plan(words), recursive=recursive)
        except SawError as error:
            assert error.cure
            return error.code
        return ""

    assert code(file, "ws-a:") == ""
    assert code(file, missing, "ws-a:") == "source_missing"
    assert code(str(tmp_path), "ws-a:") == "folder_without_r"
    assert code(str(tmp_path), "ws-a:", recursive=True) == ""
    assert code("ws-a:x", missing) == code("ws-a:x", str(tmp_path)) == code("ws-a:x", file) == ""
    assert code("ws-a:x", f"{missing}/x") == code("ws-a:x", f"{missing}/") == "target_missing"
    assert code("ws-a:x", "ws-a:y", missing) == code("ws-a:x", "ws-a:y", file) == "target_missing"
    assert code("ws-a:x", "ws-a:y", str(tmp_path)) == ""


def test_nothing_is_asked_of_anybody_for_a_copy_that_is_refused_here(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr(cp, "load_context", asked.append)
    with pytest.raises(CopyRefused):
        cp.main(["/nowhere/at/all", "ws-a:"])
    with pytest.raises(SystemExit) as caught:
        cp.main(["ws-a:only"])
    assert caught.value.code == 2
    assert asked == []


def test_the_line_of_scp_has_our_key_alone_and_no_name_that_is_an_option(tmp_path: Path) -> None:
    up = scp_line(tmp_path, "alias", "me", ("::1", 2222), plan(["-x", "ws-a:-y"]), recursive=False)
    assert up[:6] == ["scp", "-s", "-F", "/dev/null", "-P", "2222"]
    assert {"HostName=::1", "User=me", "HostKeyAlias=alias", "StrictHostKeyChecking=yes", "ControlMaster=no"} <= set(up)
    assert {f"IdentityFile={tmp_path}/key", f"CertificateFile={tmp_path}/key-cert.pub", "IdentitiesOnly=yes"} <= set(up)
    assert up[up.index("--") :] == ["--", "./-x", "ws-a:-y"]
    assert "-r" not in up
    down = scp_line(tmp_path, "alias", "me", ("h", 1), plan(["ws-a:a[1]*", "-t"]), recursive=True)
    assert down[down.index("--") :] == ["--", "ws-a:a\\[1\\]\\*", "./-t"]
    assert "-r" in down[: down.index("--")]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1))
def test_no_local_name_is_taken_for_an_option_or_a_host(name: str) -> None:
    copy = Copy("ws-a", up=True, sources=(name,), target="t")
    last = scp_line(Path("/d"), "alias", "me", ("h", 1), copy, recursive=False)[-2]
    assert last.startswith(("/", "./"))


def test_what_arrived_is_what_was_written_since(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub/one").write_text("1")
    (tmp_path / "link").symlink_to(folder)
    (folder / "back").symlink_to(folder)
    assert arrives_at("a/b/", str(folder)) == folder / "b"
    assert arrives_at("a/b", str(tmp_path / "new")) == tmp_path / "new"
    assert arrives_at("..", str(folder)) == arrives_at(".", str(folder)) == folder
    assert [Path(name).name for name in files_at(tmp_path / "link")] == ["one"], "links below are not followed"
    (folder / "back").unlink()
    (folder / "more").symlink_to(folder / "sub")
    assert len(files_at(folder)) == 1
    assert len(files_at(folder, follow=True)) == 2, "as scp sends it"
    assert files_at(tmp_path / "none") == {}
    assert [size for size, _ in files_at(folder / "sub/one").values()] == [1]


@pytest.mark.parametrize(
    ("code", "said", "wanted", "words"),
    [
        (1, ["scp: /x: No such file or directory"], "not_copied", "the folder that it is copied into must exist"),
        (1, ["scp: download /x/: not a regular file"], "not_copied", "give -r"),
        (1, ['scp: remote open "/x": Permission denied'], "not_copied", "the policy says"),
        (1, [], "not_copied", "scp said nothing"),
        (255, ["saw: refused: ses-1 was ended", "scp: Connection closed"], "session_failed", "ses-1 was ended"),
        (1, ["me@h: Permission denied (publickey).", "scp: Connection closed"], "session_failed", "(publickey)"),
        (255, ['scp: remote mkdir "/x/y": No such file or directory'], "not_copied", "must exist"),
        (255, ["client_loop: send disconnect: Broken pipe", "lost connection"], "session_failed", "Broken pipe"),
        (255, [], "session_failed", "without a word"),
    ],
)
def test_what_scp_says_becomes_a_refusal_with_a_cure(code: int, said: list[str], wanted: str, words: str) -> None:
    error = cp._failure(code, said, "ses-1")
    assert (error.code, error.details["session"], error.details["said"]) == (wanted, "ses-1", said)
    assert words in str(error)
    assert error.cure


def test_what_is_passed_on_does_not_steer_the_terminal() -> None:
    assert cp._printable(b"scp: \x1b[2Jname\xff\r\n") == "scp: ?[2Jname\N{REPLACEMENT CHARACTER}"


def test_names_with_signs_of_patterns_are_copied_as_they_are(tmp_path: Path) -> None:
    """OpenSSH's own scp and SFTP server, without a connection between them."""
    server = next(
        (path for path in ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server") if Path(path).exists()), ""
    )
    if not server:
        pytest.skip("no SFTP server here")
    names = ["a[b]*c", "{x,y}", "back\\slash", 'it\'s "q" b', "-dash", "q?", "$(id)", "two\nlines", "ünïcode"]
    (tmp_path / "there").mkdir()
    (tmp_path / "axbyc").write_text("what a pattern would take")
    for name in names:
        (tmp_path / "there" / name).write_text(name)
        copy = plan([f"ws-a:{tmp_path}/there/{name}", str(tmp_path / "here")])
        line = scp_line(tmp_path, "alias", "me", ("h", 1), copy, recursive=False)
        without = ["scp", "-s", "-D", server, *line[line.index("--") :]]
        subprocess.run(without, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        assert (tmp_path / "here").read_text() == name
